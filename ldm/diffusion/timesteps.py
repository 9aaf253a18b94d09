"""Where t is drawn during training. Each sampler returns (B,) in (0, 1), float32."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t ← shift·t / (1 + (shift − 1)·t): more noise for larger pictures (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


class TimestepSampler(ABC):
    """A density over t."""

    @abstractmethod
    def __call__(self, batch_size: int, device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``batch_size`` times."""


class Uniform(TimestepSampler):
    """t ~ U(0, 1), optionally shifted."""

    def __init__(self, shift: float = 1.0):
        self.shift = shift

    def __call__(self, batch_size: int, device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
        return shift_time(torch.rand(batch_size, device=device, generator=generator), self.shift)


class LogitNormal(TimestepSampler):
    """t = sigmoid(location + scale·n), n ~ N(0, 1) (Esser et al. 2024, section 3.1), optionally shifted."""

    def __init__(self, location: float = 0.0, scale: float = 1.0, shift: float = 1.0):
        self.location, self.scale, self.shift = location, scale, shift

    def __call__(self, batch_size: int, device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
        t = compute_density_for_timestep_sampling(
            "logit_normal", batch_size, self.location, self.scale, device=device, generator=generator
        )
        return shift_time(t, self.shift)
