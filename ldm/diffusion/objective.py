"""The training objective: a path, what is predicted, where t is drawn and what counts; denoiser + data -> per-sample loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition, denoise_with_activations
from ldm.diffusion.path import ProbabilityPath, expand
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.timesteps import TimestepSampler
from ldm.diffusion.weighting import Weighting
from ldm.errors import UsageError

# As a share of the target's length. The denoiser starts from zero, where the cosine has no gradient: there it is one over this.
LEAST_LENGTH = 0.1


class DenoisingLoss(NamedTuple):
    """What to train on, and what to compare between times and runs, each (B,). NaN in a sample is NaN in its loss."""

    loss: Tensor
    """The weighted squared error, with the direction's loss where that is wanted."""
    t: Tensor
    """The time it was measured at."""
    unweighted: Tensor
    """The mean squared error alone."""
    prediction: Tensor
    """(B, C, H, W)."""
    target: Tensor
    """What the prediction should be."""
    activations: dict[int, Tensor]
    """Block number -> output (B, N, D), of the blocks that were asked for."""


class DenoisingObjective:
    """weight(t)·mean((ŷ − y)²) + direction_weight·mean(1 − cos(ŷ, y)): ŷ of the denoiser, y the prediction's target."""

    def __init__(
        self,
        path: ProbabilityPath,
        prediction: Prediction,
        timesteps: TimestepSampler,
        weighting: Weighting | None = None,
        direction_weight: float = 0.0,
    ):
        """
        Args:
            weighting: of the squared error by t; none counts all times alike.
            direction_weight: of the direction's loss (Yao et al. 2025, arXiv 2501.01423, on the velocity; here on whatever
                the prediction is). The cosine is that of the channels of one latent pixel, its mean that over the pixels.
        """
        if direction_weight < 0:
            raise UsageError(f"direction_weight is {direction_weight:g}; give 0 or more")
        self.path, self.prediction, self.timesteps = path, prediction, timesteps
        self.weighting, self.direction_weight = weighting, direction_weight

    def __call__(
        self,
        denoiser: nn.Module,
        x0: Tensor,
        condition: Condition,
        t: Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        blocks: Sequence[int] = (),
    ) -> DenoisingLoss:
        """
        Args:
            denoiser: called as in :func:`ldm.diffusion.conditioning.denoise`, on the path's input_scale(t)·x_t.
            x0: normalised latents (B, C, H, W), float32.
            t: fixed times (B,); drawn when not given.
            eps: fixed noise like ``x0``; drawn when not given.
            generator: of what is drawn; a list has one for each sample, on the CPU, whatever else is in the batch.
            blocks: numbers of the denoiser's blocks whose activations are wanted.
        """
        path = self.path
        t = self._draw_times(x0, generator) if t is None else t
        eps = randn_tensor(x0.shape, generator, x0.device) if eps is None else eps
        x_t = path.sample(x0, eps, t)
        target = self.prediction.target(path, x0, eps, t)
        scale = expand(path.input_scale(t), x_t)
        prediction, activations = denoise_with_activations(denoiser, scale * x_t, path.network_time(t), condition, blocks)
        prediction = prediction.float()
        unweighted = (prediction - target).square().flatten(1).mean(1)
        loss = unweighted if self.weighting is None else self.weighting(path, self.prediction, t) * unweighted
        if self.direction_weight:
            length = target.norm(dim=1, keepdim=True).clamp(min=1e-6)  # (B, 1, H, W)
            cosine = F.cosine_similarity(prediction / length, target / length, dim=1, eps=LEAST_LENGTH)  # (B, H, W)
            loss = loss + self.direction_weight * (1 - cosine).flatten(1).mean(1)
        return DenoisingLoss(loss, t, unweighted, prediction, target, activations)

    def _draw_times(self, x0: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        if not isinstance(generator, list):
            return self.timesteps(x0, self.path, generator)
        one = torch.empty(1, *x0.shape[1:])
        return torch.cat([self.timesteps(one, self.path, own) for own in generator]).to(x0.device)
