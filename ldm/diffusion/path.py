"""The path from data to noise: ``x_t = alpha(t)·x0 + sigma(t)·eps`` with t = 0 data, t = 1 noise, eps ~ N(0, I).

A path also defines the network's inputs: ``input_scale(t)·x_t`` and the timestep ``network_time(t)``. They are those of the
diffusers schedulers that sample from the trained model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ldm.errors import UsageError

NUM_TRAIN_TIMESTEPS = 1000  # the discrete steps of diffusers' schedulers


def expand(value: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, …) with as many dimensions as ``like``."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def require_positive(owner: object, **values: float) -> None:
    """Raise UsageError for values that are not finite and greater than 0, in the name of the class of ``owner``."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{type(owner).__name__}: {name} is {value:g}; give a number greater than 0")


def as_float64(values: Tensor) -> Tensor:
    """In float64, on the CPU where the values' device has none (MPS)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


class ProbabilityPath(ABC):
    """A choice of alpha(t) and sigma(t). All functions take t of shape (B,) in [0, 1] and return (B,)."""

    sigma_data: float = 1.0  # standard deviation of the data: normalised latents have 1

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
    def time(self, log_noise_to_signal: Tensor) -> Tensor:
        """The inverse of ln(sigma(t) / alpha(t)), clamped to the ends of the path."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """The network's timestep, in the units of the matching diffusers scheduler."""

    def input_scale(self, t: Tensor) -> Tensor:
        """The factor of x_t in the network's input."""
        return torch.ones_like(t)

    def sample(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t for data ``x0`` and noise ``eps`` of one shape (B, …)."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), eps) * eps


class RectifiedFlow(ProbabilityPath):
    """The straight path alpha = 1 − t, sigma = t (Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, 2210.02747)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, log_noise_to_signal: Tensor) -> Tensor:
        return log_noise_to_signal.sigmoid()

    def network_time(self, t: Tensor) -> Tensor:
        return t * NUM_TRAIN_TIMESTEPS  # as in FlowMatchEulerDiscreteScheduler


@cache
@torch.inference_mode(False)
def _angles(device: torch.device, **scheduler_config: Any) -> Tensor:
    """φ at the ends of the steps of diffusers' ``DDPMScheduler``, (1001,) float64 from φ(0) = 0 on.

    Kept on each device, as every copy there would make the host wait for it.
    """
    if device.type != "cpu":
        return _angles(torch.device("cpu"), **scheduler_config).to(device)
    alpha_bar = DDPMScheduler(**scheduler_config).alphas_cumprod.double()
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt())])


class VariancePreserving(ProbabilityPath):
    """alpha = √ᾱ, sigma = √(1 − ᾱ) (Ho et al. 2020, arXiv 2006.11239), with the ᾱ of diffusers' ``DDPMScheduler``.

    As alpha² + sigma² = 1, alpha = cos φ and sigma = sin φ, with φ(0) = 0. Step k = 0 … 999 of diffusers is t = (k + 1) / 1000;
    between steps the angle φ is interpolated linearly. So t is continuous, and the derivatives are finite at both ends, even
    for alpha(1) = 0.
    """

    def __init__(
        self,
        schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear",
        zero_terminal_snr: bool = False,
    ):
        """
        Args:
            schedule: diffusers' name of the beta schedule; ``squaredcos_cap_v2`` is the cosine of Nichol & Dhariwal 2021.
            zero_terminal_snr: rescale so that alpha(1) = 0: training includes the pure noise that sampling starts from (Lin
                et al. 2023, arXiv 2305.08891). Excludes the prediction Epsilon, which does not determine x0 at alpha = 0.
        """
        betas = {"beta_start": 0.00085, "beta_end": 0.012} if schedule == "scaled_linear" else {}
        self.zero_terminal_snr = zero_terminal_snr
        self.scheduler_config = {
            "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
            "beta_schedule": schedule,
            "rescale_betas_zero_snr": zero_terminal_snr,
            **betas,
        }
        _angles(torch.device("cpu"), **self.scheduler_config)  # refuses an unknown schedule

    def _angle(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """φ(t) and its derivative, both (B,) float64."""
        position = as_float64(t).clamp(0, 1) * NUM_TRAIN_TIMESTEPS
        angles = _angles(position.device, **self.scheduler_config)
        lower = position.floor().long().clamp(max=NUM_TRAIN_TIMESTEPS - 1)
        before, after = angles[lower], angles[lower + 1]
        return torch.lerp(before, after, position - lower), (after - before) * NUM_TRAIN_TIMESTEPS

    def alpha(self, t: Tensor) -> Tensor:
        # the sine of π/2 − φ rather than the cosine of φ: exactly 0 at φ = π/2
        return (math.pi / 2 - self._angle(t)[0]).sin().to(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._angle(t)[0].sin().to(t)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle, rate = self._angle(t)
        return (-rate * angle.sin()).to(t), (rate * (math.pi / 2 - angle).sin()).to(t)

    def time(self, log_noise_to_signal: Tensor) -> Tensor:
        angle = as_float64(log_noise_to_signal).exp().atan()
        angles = _angles(angle.device, **self.scheduler_config)
        upper = torch.searchsorted(angles, angle).clamp(1, NUM_TRAIN_TIMESTEPS)
        before, after = angles[upper - 1], angles[upper]
        t = (upper - 1 + (angle - before) / (after - before)) / NUM_TRAIN_TIMESTEPS
        return t.clamp(0, 1).to(log_noise_to_signal)

    def network_time(self, t: Tensor) -> Tensor:
        return t * NUM_TRAIN_TIMESTEPS - 1


class VarianceExploding(ProbabilityPath):
    """alpha = 1, sigma geometric in t from ``sigma_min`` to ``sigma_max`` (Song et al. 2021, arXiv 2011.13456).

    The network's inputs are EDM's (Karras et al. 2022, arXiv 2206.00364, table 1): c_in·x_t and c_noise = ln(sigma)/4. With
    :class:`ldm.diffusion.prediction.Preconditioned` and :class:`ldm.diffusion.timesteps.LogNormal` the model is EDM.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 1.0):
        """
        Args:
            sigma_min: standard deviation of the noise at t = 0; small compared with the data.
            sigma_max: at t = 1; large compared with the data.
            sigma_data: standard deviation of the data; 1 for normalised latents, 0.5 for the paper's pixels.
        """
        require_positive(self, sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data)
        if sigma_min >= sigma_max:
            raise UsageError(f"VarianceExploding: sigma_min {sigma_min:g} is not below sigma_max {sigma_max:g}; change one")
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self._log_min, self._log_range = math.log(sigma_min), math.log(sigma_max / sigma_min)

    def _log_sigma(self, t: Tensor) -> Tensor:
        return self._log_min + self._log_range * t

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._log_sigma(t).exp()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), self._log_range * self.sigma(t)

    def time(self, log_noise_to_signal: Tensor) -> Tensor:
        return ((log_noise_to_signal - self._log_min) / self._log_range).clamp(0, 1)

    def network_time(self, t: Tensor) -> Tensor:
        return self._log_sigma(t) / 4

    def input_scale(self, t: Tensor) -> Tensor:
        return (self.sigma(t).square() + self.sigma_data**2).rsqrt()
