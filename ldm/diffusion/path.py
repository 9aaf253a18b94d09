"""The path from data to noise: ``x_t = alpha(t)·x0 + sigma(t)·eps`` with t = 0 data, t = 1 noise, eps ~ N(0, I).

A path also says what time its network is told (``network_time``), because the diffusers schedulers that sample from the
trained model call it with *their* timestep: one fact in one place, used in training and in sampling alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000  # the resolution in which diffusers' schedulers count time


def expand(value: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, …) with as many dimensions as ``like``."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


class Path(ABC):
    """A choice of alpha(t) and sigma(t). All functions take t of shape (B,) in [0, 1] and return (B,)."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise."""

    @abstractmethod
    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha / dt and d sigma / dt."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """The timestep that the network is called with, in the units of the matching diffusers scheduler."""

    def sample(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t for data ``x0`` and noise ``eps`` of one shape (B, …)."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), eps) * eps


class RectifiedFlow(Path):
    """The straight path alpha = 1 − t, sigma = t (Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, 2210.02747)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def network_time(self, t: Tensor) -> Tensor:
        # FlowMatchEulerDiscreteScheduler passes sigma · num_train_timesteps
        return t * NUM_TRAIN_TIMESTEPS


class VariancePreserving(Path):
    """alpha = √ᾱ, sigma = √(1 − ᾱ) (Ho et al. 2020, arXiv 2006.11239), ᾱ as diffusers' ``DDPMScheduler`` counts it.

    The discrete step k = 0 … 999 of diffusers stands at t = (k + 1) / 1000, and ᾱ(0) = 1; between two steps log ᾱ is
    interpolated linearly, so t may be drawn continuously.
    """

    def __init__(self, schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"):
        """
        Args:
            schedule: diffusers' name of the beta schedule; ``squaredcos_cap_v2`` is the cosine of Nichol & Dhariwal 2021.
        """
        betas = {"beta_start": 0.00085, "beta_end": 0.012} if schedule == "scaled_linear" else {}
        self.scheduler_config = {"num_train_timesteps": NUM_TRAIN_TIMESTEPS, "beta_schedule": schedule, **betas}
        alpha_bar = DDPMScheduler(**self.scheduler_config).alphas_cumprod.double()
        self._log_alpha_bar = torch.cat([torch.zeros(1, dtype=torch.float64), alpha_bar.log()])  # (1001,)

    def _interpolate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log ᾱ(t) and its derivative, both (B,) float64."""
        table = self._log_alpha_bar.to(t.device)
        position = t.double().clamp(0, 1) * NUM_TRAIN_TIMESTEPS
        lower = position.floor().long().clamp(max=NUM_TRAIN_TIMESTEPS - 1)
        slope = table[lower + 1] - table[lower]
        return table[lower] + slope * (position - lower), slope * NUM_TRAIN_TIMESTEPS

    def alpha(self, t: Tensor) -> Tensor:
        return (self._interpolate(t)[0] / 2).exp().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (-self._interpolate(t)[0].expm1()).sqrt().to(t.dtype)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha_bar, slope = self._interpolate(t)
        alpha_dot = slope / 2 * (log_alpha_bar / 2).exp()
        # sigma² + alpha² = 1  =>  sigma·sigma' = −alpha·alpha'
        sigma_dot = -slope / 2 * log_alpha_bar.exp() / (-log_alpha_bar.expm1()).sqrt()
        return alpha_dot.to(t.dtype), sigma_dot.to(t.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        return t * NUM_TRAIN_TIMESTEPS - 1
