"""Copies of training images are found, whatever the autoencoder makes of them, and other images are not."""

import pytest
import torch

from ldm.errors import UsageError
from ldm.evaluation.memorisation import FALSE_ALARMS, PixelFeatures, closest, memorised


def test_copies_are_found_and_new_images_are_not():
    """Images of a caption resemble its own image; where training and held-out ones do so alike, nothing is memorised."""
    random = torch.Generator().manual_seed(0)
    train, held_out = (torch.rand(number, 3, 40, 40, generator=random) * 2 - 1 for number in (100, 400))
    features = PixelFeatures()

    def near(images, noise):
        return features(images + noise * torch.randn(images.shape, generator=random))

    copies, control = near(train, 0.02), near(held_out[:100], 0.5)
    generated = torch.cat([near(train[:40], 0.05), near(train[40:], 0.5)])
    found = memorised(features(train), features(held_out), generated, control, copies)
    assert found.recall == 1 and abs(found.share - 0.4 - 0.6 * FALSE_ALARMS) < 0.05
    assert found.neighbours.tolist() == [*range(100)]
    assert set(closest({"pixels": found}, 40)) == {*range(40)}
    none = memorised(features(train), features(held_out), near(train, 0.5), control, copies)
    assert none.share < 3 * FALSE_ALARMS
    black, white = -torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    assert torch.dist(features(black), features(white)) == pytest.approx(1, abs=1e-5)


def test_too_few_images_set_no_threshold():
    images = torch.rand(10, 4)
    with pytest.raises(UsageError, match="10 images from held-out captions set no threshold; give 20 or more"):
        memorised(images, images, images, images, images)
