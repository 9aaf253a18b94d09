"""Densities of t during training: they sample a time in [0, 1] for each sample of a batch, (B,) float32."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from ldm.diffusion.path import NUM_TRAIN_TIMESTEPS, ProbabilityPath, require_positive
from ldm.errors import UsageError


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t ← shift·t / (1 + (shift − 1)·t): more noise for larger images (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class ResolutionShift:
    """The shift of :func:`shift_time` by the size of latents (Esser et al. 2024, section 5.3.2).

    Attributes:
        shift: that of square latents of side ``base_side``, or of all sizes where that is None.
        base_side: in latent pixels.
    """

    shift: float = 1.0
    base_side: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, shift=self.shift, base_side=1 if self.base_side is None else self.base_side)

    def at(self, height: int, width: int) -> float:
        """The shift of latents of a size: shift·√(H·W) / base_side."""
        return self.shift if self.base_side is None else self.shift * math.sqrt(height * width) / self.base_side


class TimestepSampler(ABC):
    """A density over t."""

    @abstractmethod
    def __call__(self, x0: Tensor, path: ProbabilityPath, generator: torch.Generator | None = None) -> Tensor:
        """Sample a time for each of the latents ``x0`` (B, C, H, W), on their device."""


class ShiftedSampler(TimestepSampler):
    """A density over t with a shift; designed for rectified flow, usable with any path."""

    def __init__(self, shift: float = 1.0, base_side: int | None = None):
        """
        Args:
            shift: of :func:`shift_time`; 1 for none, more for more noise.
            base_side: side of the square latents, in latent pixels, for which ``shift`` holds; for others it is multiplied
                by √(H·W) / base_side (Esser et al. 2024, section 5.3.2), and the pipeline of a rectified flow shifts the steps
                of its samplers alike. Without it, ``shift`` holds for every size, and for training alone.
        """
        require_positive(self, shift=shift, base_side=1 if base_side is None else base_side)
        self.resolution_shift = ResolutionShift(shift, base_side)

    @abstractmethod
    def sample(self, batch_size: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Sample ``batch_size`` times before the shift."""

    def __call__(self, x0: Tensor, path: ProbabilityPath, generator: torch.Generator | None = None) -> Tensor:
        return shift_time(self.sample(len(x0), x0.device, generator), self.resolution_shift.at(*x0.shape[-2:]))


class Uniform(ShiftedSampler):
    """t ~ U(0, 1)."""

    def sample(self, batch_size: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        return torch.rand(batch_size, device=device, generator=generator)


class LogitNormal(ShiftedSampler):
    """t = sigmoid(location + scale·n), n ~ N(0, 1) (Esser et al. 2024, section 3.1): mostly in the middle."""

    def __init__(self, location: float = 0.0, scale: float = 1.0, shift: float = 1.0, base_side: int | None = None):
        """
        Args:
            location: mean of logit t; more means more noise.
            scale: standard deviation of logit t.
            shift, base_side: see :class:`ShiftedSampler`.
        """
        super().__init__(shift, base_side)
        require_positive(self, scale=scale)
        self.location, self.scale = location, scale

    def sample(self, batch_size: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        return compute_density_for_timestep_sampling(
            "logit_normal", batch_size, self.location, self.scale, device=device, generator=generator
        )


class Mode(ShiftedSampler):
    """t = 1 − u − scale·(cos²(πu/2) − 1 + u), u ~ U(0, 1) (Esser et al. 2024, section 3.1): positive at both ends."""

    def __init__(self, scale: float = 1.29, shift: float = 1.0, base_side: int | None = None):
        """
        Args:
            scale: from −1 to 2/(π − 2) = 1.75; negative favours the ends, positive the middle, 0 is uniform.
            shift, base_side: see :class:`ShiftedSampler`.
        """
        super().__init__(shift, base_side)
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise UsageError(f"Mode: scale is {scale:g}; give a number from -1 to 1.75")
        self.scale = scale

    def sample(self, batch_size: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        return compute_density_for_timestep_sampling(
            "mode", batch_size, mode_scale=self.scale, device=device, generator=generator
        )


class DiscreteUniform(TimestepSampler):
    """Uniform over the 1000 steps of diffusers' ``DDPMScheduler``, t = (k + 1) / 1000 (Ho et al. 2020)."""

    def __call__(self, x0: Tensor, path: ProbabilityPath, generator: torch.Generator | None = None) -> Tensor:
        steps = torch.randint(1, NUM_TRAIN_TIMESTEPS + 1, (len(x0),), device=x0.device, generator=generator)
        return steps / NUM_TRAIN_TIMESTEPS


class LogNormal(TimestepSampler):
    """ln(sigma / alpha) ~ N(location, scale²), the noise levels of EDM (Karras et al. 2022, arXiv 2206.00364, table 1).

    Noise levels beyond the ends of the path are clamped to them. On rectified flow this is :class:`LogitNormal`.
    """

    def __init__(self, location: float = -1.2, scale: float = 1.2):
        """
        Args:
            location: the paper's P_mean, for data of standard deviation 0.5; −0.5 is the equivalent for 1.
            scale: the paper's P_std.
        """
        require_positive(self, scale=scale)
        self.location, self.scale = location, scale

    def __call__(self, x0: Tensor, path: ProbabilityPath, generator: torch.Generator | None = None) -> Tensor:
        normal = torch.randn(len(x0), device=x0.device, generator=generator)
        return path.time(self.location + self.scale * normal)
