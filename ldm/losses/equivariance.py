"""Latents that turn and shrink as images do: EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509)."""

from __future__ import annotations

from math import ceil
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UsageError

# in pixels; of smaller images LPIPS' trunks and a patch discriminator of three halvings keep nothing
SMALLEST_SIDE = 32


@final
class Equivariance:
    """Now and then the decoder is asked for τ(x) from τ(z), τ a turn by quarters and a scaling down.

    All losses then compare with τ(x), as in the paper; τ(z) and the latents of τ(x) are never compared themselves.
    Latents that bear this are smoother, and easier for a diffusion model to learn. The batch so treated takes the place of
    the plain one, and its images are no larger: a step costs no more than without.

    Zero to three quarter turns are as likely, and so are all sizes of whole latent places from ``min_scale`` to 1, both sides
    alike. They are drawn on the CPU, whatever the device, once for the whole batch.
    """

    def __init__(self, probability: float = 0.5, min_scale: float = 0.25):
        """
        Args:
            probability: share of batches that are treated; 0 leaves it out. The paper's is 0.5.
            min_scale: the smallest scaling, to the nearest latent place; the paper's is 0.25. No image's shorter side is
                scaled below 32 pixels.

        Raises:
            UsageError: where these lie outside 0 to 1.
        """
        if not 0 <= probability <= 1 or not 0 < min_scale <= 1:
            raise UsageError(
                f"model.equivariance.probability {probability} and min_scale {min_scale} must lie in 0 to 1, min_scale above 0"
            )
        self.probability, self.min_scale = probability, min_scale

    def __call__(self, images: Tensor, latents: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) and (B, C, h, w) -> the same, both treated alike or both as they were, as ``generator`` has it."""
        if not self.probability or torch.rand((), generator=generator) >= self.probability:
            return images, latents
        height, width = latents.shape[-2:]
        factor, shorter = images.shape[-2] // height, min(height, width)
        smallest = min(shorter, max(round(self.min_scale * shorter), ceil(SMALLEST_SIDE / factor)))
        side = int(torch.randint(smallest, shorter + 1, (), generator=generator))
        turns = int(torch.randint(4, (), generator=generator))
        size = round(height * side / shorter), round(width * side / shorter)
        return (
            turn_and_scale(images, turns, (size[0] * factor, size[1] * factor)),
            turn_and_scale(latents, turns, size),
        )


def turn_and_scale(maps: Tensor, turns: int, size: tuple[int, int]) -> Tensor:
    """Scale (B, C, H, W) to ``size``, bilinear with antialiasing, and turn it by so many quarters."""
    if maps.shape[-2:] != size:
        maps = F.interpolate(maps.float(), size, mode="bilinear", antialias=True).to(maps)
    return torch.rot90(maps, turns, (-2, -1))
