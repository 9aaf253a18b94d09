"""Latents that rotate and scale as images do: EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509)."""

from __future__ import annotations

from math import ceil
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UsageError

# in pixels: the smallest images that LPIPS' trunks and a patch discriminator with three strided layers take
SMALLEST_SIDE = 32


@final
class Equivariance:
    """In some batches the decoder must reconstruct τ(x) from τ(z), where τ rotates by quarter turns and scales down.

    All losses then compare with τ(x), as in the paper; τ(z) and the latents of τ(x) are not compared with each other. Such
    latents are smoother, and easier for a diffusion model to learn. The transformed batch replaces the original one and its
    images are no larger, so a step costs no more than without.

    The number of quarter turns and the size, in whole latent pixels from ``min_scale`` to 1, are uniform, and sampled on the
    CPU, once per batch.
    """

    def __init__(self, probability: float = 0.5, min_scale: float = 0.25):
        """
        Args:
            probability: share of batches that are transformed; the paper's is 0.5, and 0 turns it off.
            min_scale: the smallest scale, rounded to whole latent pixels; the paper's is 0.25. An image's shorter side is
                never scaled below 32 pixels.
        """
        if not 0 <= probability <= 1 or not 0 < min_scale <= 1:
            raise UsageError(
                f"Equivariance: probability {probability} must be from 0 to 1, and min_scale {min_scale} above 0 and up to 1"
            )
        self.probability, self.min_scale = probability, min_scale

    def __call__(self, images: Tensor, latents: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and latents (B, C, h, w), both transformed alike or both unchanged."""
        if not self.probability or torch.rand((), generator=generator) >= self.probability:
            return images, latents
        height, width = latents.shape[-2:]
        factor, shorter = images.shape[-2] // height, min(height, width)
        smallest = min(shorter, max(round(self.min_scale * shorter), ceil(SMALLEST_SIDE / factor)))
        side = int(torch.randint(smallest, shorter + 1, (), generator=generator))
        turns = int(torch.randint(4, (), generator=generator))
        size = round(height * side / shorter), round(width * side / shorter)
        pixels = size[0] * factor, size[1] * factor
        return turn_and_scale(images, turns, pixels), turn_and_scale(latents, turns, size)


def turn_and_scale(maps: Tensor, turns: int, size: tuple[int, int]) -> Tensor:
    """Scale (B, C, H, W) to ``size``, bilinearly with antialiasing, and rotate it by ``turns`` quarter turns."""
    if maps.shape[-2:] != size:
        maps = F.interpolate(maps.float(), size, mode="bilinear", antialias=True).to(maps)
    return torch.rot90(maps, turns, (-2, -1))
