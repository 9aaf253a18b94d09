"""Whether a model returns the images that it was trained on.

An image that is generated from the caption of a training image resembles that image, memorised or not. The control are images
from captions of held-out images, and their distances to as many of those: where nothing is memorised, both come as near.
Without held-out images the control are training images and their distances to the nearest other one; where captions say nearly
all that an image shows, generated images are then below the threshold without being copies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.evaluation.distances import nearest
from ldm.evaluation.features import FeatureNetwork
from ldm.evaluation.image_sets import ImageSet
from ldm.models.autoencoder import pixels_to_images, reconstruct
from ldm.models.autoencoder_kinds import Autoencoder
from ldm.reporting.grids import captioned_grid
from ldm.reporting.pages import Report

FALSE_ALARMS = 0.05  # share of the control below the threshold
LEAST = 20  # images of the control
SIDE = 32  # pixels
SAME = 1e-6  # distance in pixels
BINS = 30
COLUMNS, CELL = 4, 150  # of the page's images
HEADER = ("too near", "if nothing is memorised", "copies found", "authenticity", "threshold")


def require_threshold(images: int, of_training: bool) -> None:
    """Raise UsageError for a control of too few images."""
    if images < LEAST:
        whose = "training" if of_training else "held-out"
        raise UsageError(f"{images} {whose} images set no threshold; give {LEAST} or more")


class PixelFeatures(FeatureNetwork):
    """The pixels of an image themselves, averaged to 32 x 32: the distance of two is the root mean square of their difference,
    0 to 1."""

    name, description, hash = "pixels", "pixels", "none"
    resize, num_features = f"mean over areas, to {SIDE} x {SIDE}", 3 * SIDE**2

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d((images.float() + 1) / 2, SIDE).flatten(1) / self.num_features**0.5


@dataclass(frozen=True)
class Memorised:
    """How near N generated images come to the training images, by one feature network.

    Attributes:
        generated, control, copies: the distance of each, (N,), to the nearest of as many training images as there are held-out
            ones: of images from captions of training images, and of training images as the autoencoder returns them. Of the
            control to held-out images, or without these to other training images.
        threshold: a distance that :data:`FALSE_ALARMS` of the control are below.
        neighbours, distances: number of the nearest of all training images for each generated one, and how far it is, (N,).
        authenticity: share of generated images that are farther from that training image than it is from the nearest other one
            (Alaa et al. 2022, arXiv 2102.08921).
    """

    generated: Tensor
    control: Tensor
    copies: Tensor
    threshold: float
    neighbours: Tensor
    distances: Tensor
    authenticity: float

    @property
    def share(self) -> float:
        """Share of the generated images below the threshold; about :data:`FALSE_ALARMS` where nothing is memorised."""
        return float((self.generated < self.threshold).double().mean())

    @property
    def error(self) -> float:
        """Standard error of the share where nothing is memorised: of a share of N, and of the threshold by the control."""
        return (FALSE_ALARMS * (1 - FALSE_ALARMS) * (1 / len(self.generated) + 1 / len(self.control))) ** 0.5

    @property
    def recall(self) -> float:
        """Share of perfect copies, but for the autoencoder, that are below the threshold. Where it is low, the share says
        little: the autoencoder hides copies, or the model returns held-out images as exactly as training images."""
        return float((self.copies < self.threshold).double().mean())

    def summary(self) -> dict[str, float]:
        """For JSON."""
        return {
            "share": self.share,
            "expected": FALSE_ALARMS,
            "standard_error": self.error,
            "copies_found": self.recall,
            "authenticity": self.authenticity,
            "threshold": self.threshold,
        }

    def row(self) -> list[str]:
        """For a table under :data:`HEADER`."""
        expected = f"{FALSE_ALARMS:.0%} ± {self.error:.1%}"
        shares = [f"{value:.1%}" for value in (self.share, self.recall, self.authenticity)]
        return [shares[0], expected, *shares[1:], f"{self.threshold:.4g}"]


def memorised(
    train: Tensor, generated: Tensor, copies: Tensor, held_out: Tensor | None = None, control: Tensor | None = None
) -> Memorised:
    """Compare features, (N, D) each; see :class:`Memorised`.

    Images whose captions ``generated`` and ``control`` are of come first in ``train`` and ``held_out``; of the larger of these
    two the rest is left out, because more images have a nearer one among them. Raises :class:`UsageError` for too few.
    """
    if len(train) < 2:
        raise UsageError("one training image has no other to compare with; give more")
    size = len(train)
    if held_out is None or control is None:
        first = torch.arange(len(generated))
        of_control, _ = nearest(train[first], train, own=first)
    else:
        size = min(size, len(held_out))
        of_control, _ = nearest(control, held_out[:size])
    require_threshold(len(of_control), control is None)
    (of_generated, _), (of_copies, _) = (nearest(images, train[:size]) for images in (generated, copies))
    distances, neighbours = nearest(generated, train)
    to_others, _ = nearest(train[neighbours], train, own=neighbours)
    threshold = float(torch.quantile(of_control, FALSE_ALARMS))
    authenticity = float((distances > to_others).double().mean())
    return Memorised(of_generated, of_control, of_copies, threshold, neighbours, distances, authenticity)


@dataclass(frozen=True)
class ComparedImages:
    """Sets of images by their features.

    Attributes:
        trained: all training images; the first N have the captions of ``generated``.
        generated: of N captions of training images.
        copies: the first N of ``trained`` as the autoencoder returns them.
        held_out, control: images that were not trained on, and those generated from the captions of the first N; None of both
            where training images are the control.
    """

    trained: ImageSet
    generated: ImageSet
    copies: ImageSet
    held_out: ImageSet | None = None
    control: ImageSet | None = None

    def by_network(self, networks: Sequence[FeatureNetwork]) -> dict[str, Memorised]:
        """The comparison by each network's name. Raises :class:`UsageError` for too few images."""
        sets = [each for each in (self.trained, self.generated, self.copies, self.held_out, self.control) if each is not None]
        return {network.name: memorised(*(each.features[n] for each in sets)) for n, network in enumerate(networks)}

    def limits(self) -> list[str]:
        """What limits the comparison, in words. The first network is :class:`PixelFeatures`."""
        found, count = [], len(self.generated)
        if self.held_out is not None:
            apart, _ = nearest(self.held_out.features[0][:count], self.trained.features[0])
            if same := int((apart < SAME).sum()):
                found.append(f"{same} of {count} held-out images are among the training images, by their pixels")
            if (compared := len(self.held_out)) < len(self.trained):
                found.append(
                    f"the share is of copies of {compared:,} of the {len(self.trained):,} training images, as many as are held "
                    "out; the nearest pairs and the authenticity are of all"
                )
        return found


def through_autoencoder(pixels: Tensor, autoencoder: Autoencoder, device: torch.device) -> Tensor:
    """Images as a model that has memorised their latents returns them: uint8 (B, 3, H, W) to the same."""
    with torch.no_grad():
        images = reconstruct(autoencoder, pixels_to_images(pixels.to(device)))
    return ((images + 1) * 127.5).round().byte().cpu()


def closest(found: Mapping[str, Memorised], count: int) -> list[tuple[int, str]]:
    """The numbers of the generated images that are nearest to a training image, relative to the threshold, each with the
    network by which it is; the nearest first."""
    names = [*found]
    relative = torch.stack([each.distances / max(each.threshold, 1e-12) for each in found.values()]).min(0)
    order = torch.argsort(relative.values, stable=True)[:count].tolist()
    return [(number, names[int(relative.indices[number])]) for number in order]


@dataclass(frozen=True)
class Pair:
    """A generated image beside its nearest training image: the name of that, and their distance by a network."""

    generated: Image.Image
    trained: Image.Image
    name: str
    network: str
    distance: float


def write_page(
    path: str | os.PathLike, title: str, found: Mapping[str, Memorised], pairs: Sequence[Pair], protocol: Mapping[str, Any]
) -> None:
    """Write the page, one HTML file."""
    report = Report("Memorisation", title)
    report.table("Copies of training images", ("network", *HEADER), [(name, *each.row()) for name, each in found.items()])
    report.text(
        "",
        [
            f"Too near: the share of generated images that are nearer to a training image than {1 - FALSE_ALARMS:.0%} of the "
            f"control, which is {protocol['control']}. Copies found: the same share of training images, encoded and decoded by "
            "the autoencoder; where it is low, copies cannot be told apart. Authenticity: the share of generated images that "
            "are farther from the nearest training image than that is from another.",
            *(f"{limit[0].upper()}{limit[1:]}." for limit in protocol["limits"]),
        ],
    )
    if pairs:
        images = [image for pair in pairs for image in (pair.generated, pair.trained)]
        texts = [text for pair in pairs for text in (f"generated; {pair.network} {pair.distance:.3g}", pair.name)]
        grid = captioned_grid(images, texts, COLUMNS, CELL)
        report.image("The nearest pairs: a generated image, and at its right the training image", grid)
    for name, each in found.items():
        panels = {"generated": each.generated, "control": each.control, "copies by the autoencoder": each.copies}
        high = max(float(values.max()) for values in panels.values())
        if high > 0:
            shares = {label: np.histogram(values, BINS, (0, high))[0] / len(values) for label, values in panels.items()}
            report.bars(f"Distance to the nearest image ({name})", shares, 0.0, high, note=f"threshold {each.threshold:.4g}")
    report.folded("Protocol", json.dumps(protocol, indent=2, ensure_ascii=False))
    report.save(path)
