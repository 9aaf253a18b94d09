"""Distances of patches of Laplacian pyramids against closed forms, and against SciPy's convolution."""

from __future__ import annotations

from math import gamma, pi, sqrt

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from ldm.errors import UsageError
from ldm.evaluation.sliced_wasserstein import doubled, laplacian_pyramid, pyramid_distances, sliced_wasserstein_distance


def texture(seed: int, count: int = 12, height: int = 64, width: int = 64) -> Tensor:
    """Smooth colours with grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.nn.functional.interpolate(torch.randn(count, 3, 4, 4, generator=generator), (height, width), mode="bicubic")
    return 0.5 * coarse + 0.2 * torch.randn(count, 3, height, width, generator=generator)


@pytest.mark.parametrize("size", [(64, 64), (65, 96), (33, 47)])
def test_levels_of_the_pyramid_add_up_to_the_image_and_are_those_of_scipy(size: tuple[int, int]):
    images = texture(0, 2, *size)
    *bands, image = laplacian_pyramid(images)
    assert len(bands) == (2 if min(size) >= 64 else 1)
    weights = np.array([1, 4, 6, 4, 1]) / 16
    half = ndimage.convolve(images.numpy(), np.outer(weights, weights)[None, None], mode="mirror")[..., ::2, ::2]
    torch.testing.assert_close(images - doubled(torch.from_numpy(half), images), bands[0])
    for band in reversed(bands):
        assert image.shape[2:] == tuple((side + 1) // 2 for side in band.shape[2:])
        image = band + doubled(image, band)
    torch.testing.assert_close(image, images)
    flat = laplacian_pyramid(torch.full((1, 3, *size), 0.7))
    torch.testing.assert_close(flat[0], torch.zeros(1, 3, *size))


@pytest.mark.parametrize("dimensions", [1, 5, 147])
def test_gaussians_have_the_distances_of_their_closed_forms(dimensions: int):
    """W1 of N(0, 1) and N(m, 1) is |m|, of N(0, 1) and N(0, s²) it is |s − 1|·√(2/π); a direction of a sphere has a mean
    component of Γ(D/2) / (√π·Γ((D + 1)/2))."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(4000, dimensions, generator=generator) for _ in range(2))
    offset = torch.zeros(dimensions)
    offset[0] = 3
    component = gamma(dimensions / 2) / (sqrt(pi) * gamma((dimensions + 1) / 2))
    for other, expected in ((b + offset, 3 * component), (1.7 * b, 0.7 * sqrt(2 / pi)), (a, 0.0)):
        found = sliced_wasserstein_distance(a, other, 200, generator)
        assert float(found) == pytest.approx(expected, rel=0.08, abs=1e-6)
        assert float(sliced_wasserstein_distance(other, a, 200, generator)) == pytest.approx(float(found), rel=0.15, abs=1e-6)


def test_equal_sets_are_at_no_distance_and_soft_ones_farther_than_others_of_a_kind():
    images = texture(0)
    soft = gaussian_blur(images, [5, 5], [1.0, 1.0])
    assert pyramid_distances(images, images) == [0.0, 0.0, 0.0]
    for by in ("each", "first"):
        kin = pyramid_distances(images, texture(1), normalised_by=by)
        far = pyramid_distances(images, soft, normalised_by=by)
        assert far[0] > 1.5 * kin[0] and far[0] > far[1] > far[2]
        assert far == pyramid_distances(images, soft, normalised_by=by)  # the same places and directions
    assert far[0] > 10 * kin[0]


def test_contrast_counts_where_both_sets_are_normalised_by_the_first():
    images = texture(0)
    assert max(pyramid_distances(images, 0.5 * images + 0.1)) < 1e-6
    # values of deviation 1 and 0.5, and what a direction makes of correlated pixels: all halved
    halved = pyramid_distances(images, 0.5 * images, normalised_by="first")
    assert all(0.2 < distance < 0.5 for distance in halved) and halved[0] == pytest.approx(0.5 * sqrt(2 / pi), rel=0.1)


def test_a_flat_set_is_compared_and_what_cannot_be_is_refused():
    flat = torch.zeros(4, 3, 32, 32)
    assert pyramid_distances(flat, flat + 1) == [0.0, 0.0]
    for images, others in ((flat, flat[:3]), (flat[..., :15], flat[..., :15]), (flat[0], flat[0])):
        with pytest.raises(UsageError, match="of one size, of 16 pixels"):
            pyramid_distances(images, others)
