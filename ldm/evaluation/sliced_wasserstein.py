"""Distance between the fine structure of two sets of images, by the patches of their Laplacian pyramids.

Karras et al. 2018 (arXiv 1710.10196, section 5). It needs no pretrained network, and tells at which scale images differ: a soft
reconstruction has too few strong patches at the finest level.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UsageError

# of the paper: patches of 7 x 7 pixels, 128 an image and level, and the coarsest level of 16 pixels
PATCH_SIDE, PATCHES, SMALLEST_SIDE, DIRECTIONS = 7, 128, 16, 512
# projected at once, which bounds the memory
DIRECTIONS_AT_ONCE = 64


def pyramid_distances(
    images: Tensor,
    others: Tensor,
    patches: int = PATCHES,
    directions: int = DIRECTIONS,
    normalised_by: Literal["each", "first"] = "each",
    seed: int = 0,
) -> list[float]:
    """The distance at each level of the pyramid, the finest first; the paper prints a thousand times as much.

    Args:
        images, others: two sets of as many images of one size, (N, 3, H, W) float.
        patches: taken of an image at each level, at random places, which are the same in both sets.
        directions: random directions on which the patches are projected.
        normalised_by: statistics of the colour channels by which the patches are normalised. ``each``: those of their own set,
            as published: contrast does not count, only structure. ``first``: those of ``images`` for both, so that a lack of
            contrast counts, too.
        seed: of places and directions.

    Raises:
        UsageError: where the sets differ in shape, or the images are smaller than ``SMALLEST_SIDE``.
    """
    if images.shape != others.shape or images.ndim != 4 or min(images.shape[-2:]) < SMALLEST_SIDE:
        raise UsageError(
            f"sets of images of shapes {tuple(images.shape)} and {tuple(others.shape)} cannot be compared; give as many of one "
            f"size, of {SMALLEST_SIDE} pixels a side or more"
        )
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for first, second in zip(laplacian_pyramid(images.float()), laplacian_pyramid(others.float()), strict=True):
        taken, theirs = _patches((first, second), patches, generator)  # (M, C, 7, 7)
        reference = theirs if normalised_by == "each" else taken
        sets = _normalised(taken, by=taken).flatten(1), _normalised(theirs, by=reference).flatten(1)
        distances.append(float(sliced_wasserstein_distance(*sets, directions, generator)))
    return distances


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """The levels of (N, C, H, W), the finest first (Burt & Adelson 1983); the last is the image scaled down.

    A level has half the sides of the one before, rounded up, down to less than twice ``SMALLEST_SIDE``.
    """
    levels = []
    while min(images.shape[-2:]) >= 2 * SMALLEST_SIDE:
        half = _blurred(images)[..., ::2, ::2]
        levels.append(images - doubled(half, images))
        images = half
    return [*levels, images]


def doubled(half: Tensor, like: Tensor) -> Tensor:
    """``half`` scaled up to the size of ``like``: zeros between its pixels, blurred."""
    spread = torch.zeros_like(like)
    spread[..., ::2, ::2] = half
    return 4 * _blurred(spread)


def sliced_wasserstein_distance(points: Tensor, others: Tensor, directions: int, generator: torch.Generator) -> Tensor:
    """The mean of the Wasserstein-1 distances of two sets of points (M, D) projected on random directions, ().

    In one dimension it is the mean distance of the sorted values (Rabin et al. 2011).
    """
    total = points.new_zeros(())
    for start in range(0, directions, DIRECTIONS_AT_ONCE):
        axes = torch.randn(points.shape[1], min(DIRECTIONS_AT_ONCE, directions - start), generator=generator).to(points)
        axes = axes / axes.norm(dim=0)  # (D, K)
        projected = ((some @ axes).sort(dim=0).values for some in (points, others))
        total += torch.sub(*projected).abs().mean(0).sum()
    return total / directions


def _blurred(images: Tensor) -> Tensor:
    """Convolved with the binomial kernel of 5 x 5; edges are mirrored."""
    weights = images.new_tensor([1, 4, 6, 4, 1]) / 16
    kernel = weights.outer(weights).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.shape[1])


def _patches(levels: tuple[Tensor, Tensor], count: int, generator: torch.Generator) -> list[Tensor]:
    """``count`` patches of each image, (N·count, C, 7, 7), at the same places of both."""
    number, _, height, width = levels[0].shape
    y, x = (torch.randint(side - PATCH_SIDE + 1, (number, count), generator=generator) for side in (height, width))
    image = torch.arange(number)[:, None]
    views = (level.unfold(2, PATCH_SIDE, 1).unfold(3, PATCH_SIDE, 1) for level in levels)  # (N, C, H - 6, W - 6, 7, 7)
    return [view[image, :, y, x].flatten(0, 1) for view in views]


def _normalised(patches: Tensor, by: Tensor) -> Tensor:
    """(M, C, 7, 7) less the mean of ``by`` in each channel, over its deviation; a constant channel stays."""
    deviation, mean = torch.std_mean(by, dim=(0, 2, 3), correction=0, keepdim=True)
    return (patches - mean) / torch.where(deviation > 0, deviation, 1)
