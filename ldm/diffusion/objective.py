"""The training objective: a path, what is predicted, where t is drawn; denoiser + data -> per-sample loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.diffusion.guidance import Condition, denoise
from ldm.diffusion.path import Path
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.timesteps import TimestepSampler


class DenoisingLoss(NamedTuple):
    """``loss`` and the ``t`` it was measured at, both (B,)."""

    loss: Tensor
    t: Tensor


class DenoisingObjective:
    """Mean squared error between what the denoiser says and the prediction's target."""

    def __init__(self, path: Path, prediction: Prediction, timesteps: TimestepSampler):
        self.path, self.prediction, self.timesteps = path, prediction, timesteps

    def __call__(
        self,
        denoiser: nn.Module,
        x0: Tensor,
        condition: Condition,
        t: Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DenoisingLoss:
        """
        Args:
            denoiser: called as in :func:`ldm.diffusion.guidance.denoise`.
            x0: normalised latents (B, C, H, W), float32.
            t: fixed times (B,); drawn when not given.
            eps: fixed noise like ``x0``; drawn when not given.
        """
        t = self.timesteps(x0.shape[0], x0.device, generator) if t is None else t
        eps = torch.randn(x0.shape, device=x0.device, generator=generator) if eps is None else eps
        x_t = self.path.sample(x0, eps, t)
        target = self.prediction.target(self.path, x0, eps, t)
        prediction = denoise(denoiser, x_t, self.path.network_time(t), condition)
        return DenoisingLoss((prediction.float() - target).square().flatten(1).mean(1), t)
