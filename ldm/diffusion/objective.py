"""The training objective: denoiser, latents and captions -> the loss of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition, denoise_with_activations
from ldm.diffusion.path import ProbabilityPath, expand
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.timesteps import TimestepSampler
from ldm.diffusion.weighting import Weighting


class DenoisingLoss(NamedTuple):
    """The result for a batch; the first three are (B,). A NaN in one sample stays in that sample's loss."""

    loss: Tensor
    """The weighted squared error."""
    unweighted: Tensor
    """The mean squared error."""
    t: Tensor
    """The times."""
    prediction: Tensor
    """(B, C, H, W), float32."""
    target: Tensor
    """(B, C, H, W)."""
    activations: dict[int, Tensor]
    """Block number -> output (B, N, D), of the requested blocks."""


class DenoisingObjective:
    """weight(t)·mean((ŷ − y)²): ŷ the denoiser's output, y the target of the prediction."""

    def __init__(
        self,
        path: ProbabilityPath,
        prediction: Prediction,
        timesteps: TimestepSampler,
        weighting: Weighting | None = None,
    ):
        self.path, self.prediction, self.timesteps, self.weighting = path, prediction, timesteps, weighting

    def __call__(
        self,
        denoiser: nn.Module,
        x0: Tensor,
        condition: Condition,
        t: Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        blocks: Sequence[int] = (),
    ) -> DenoisingLoss:
        """
        Args:
            denoiser: called as in :func:`ldm.diffusion.conditioning.denoise`, on the path's input_scale(t)·x_t.
            x0: normalised latents (B, C, H, W), float32.
            t: times (B,); sampled if not given.
            eps: noise like ``x0``; sampled if not given.
            generator: of times and noise.
            blocks: numbers of the denoiser's blocks whose activations to return.
        """
        path = self.path
        t = self.timesteps(x0, path, generator) if t is None else t
        eps = randn_tensor(x0.shape, generator, x0.device) if eps is None else eps
        x_t = path.sample(x0, eps, t)
        target = self.prediction.target(path, x0, eps, t)
        scale = expand(path.input_scale(t), x_t)
        prediction, activations = denoise_with_activations(denoiser, scale * x_t, path.network_time(t), condition, blocks)
        prediction = prediction.float()
        unweighted = (prediction - target).square().flatten(1).mean(1)
        loss = unweighted if self.weighting is None else self.weighting(path, self.prediction, t) * unweighted
        return DenoisingLoss(loss, unweighted, t, prediction, target, activations)
