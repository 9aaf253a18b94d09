"""Whether a model returns the images that it was trained on.

An image that is generated from the caption of a training image resembles that image, memorised or not. The control are images
from captions of held-out images, and their distances to as many of those: where nothing is memorised, both come as near.
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
from ldm.models.autoencoder import pixels_to_images, reconstruct
from ldm.models.autoencoder_kinds import Autoencoder
from ldm.reporting.grids import paired_grid
from ldm.reporting.pages import Report

FALSE_ALARMS = 0.05  # share of the control below the threshold
LEAST = 20  # images of the control
SIDE = 32  # pixels
BINS = 30
ROWS = 2048  # of a matrix of pairs, which bounds the memory


class PixelFeatures(FeatureNetwork):
    """The pixels of an image themselves, averaged to 32 x 32: the distance of two is the root mean square of their difference,
    0 to 1."""

    name, description, hash = "pixels", "pixels", "none"
    resize, num_features = f"mean over areas, to {SIDE} x {SIDE}", 3 * SIDE**2

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d((images.float() + 1) / 2, SIDE).flatten(1) / self.num_features**0.5


@dataclass(frozen=True)
class Memorised:
    """How near generated images come to the training images, by one feature network.

    Attributes:
        generated, control, copies: of images from captions of training images, of those from captions of held-out images, and
            of training images as the autoencoder returns them, the distance of each, (N,), to the nearest of as many training
            images, or, of the control, held-out images.
        threshold: a distance that :data:`FALSE_ALARMS` of the control are below.
        neighbours: number of the nearest of all training images for each generated one, (N,).
        authenticity: share of generated images that are farther from that training image than it is from the nearest other one
            (Alaa et al. 2022, arXiv 2102.08921).
    """

    generated: Tensor
    control: Tensor
    copies: Tensor
    threshold: float
    neighbours: Tensor
    authenticity: float

    @property
    def share(self) -> float:
        """Share of the generated images below the threshold; about :data:`FALSE_ALARMS` where nothing is memorised."""
        return float((self.generated < self.threshold).double().mean())

    @property
    def recall(self) -> float:
        """Share of perfect copies, but for the autoencoder, that are below the threshold. Where it is low, the share says
        little: the autoencoder hides copies, or the model returns held-out images as exactly as training images."""
        return float((self.copies < self.threshold).double().mean())


def memorised(train: Tensor, held_out: Tensor, generated: Tensor, control: Tensor, copies: Tensor) -> Memorised:
    """Compare features, (N, D) each; see :class:`Memorised`.

    Images whose captions ``generated`` and ``control`` are of come first in ``train`` and ``held_out``; of the larger of these
    two the rest is left out, because more images have a nearer one among them. Raises :class:`UsageError` for too few.
    """
    if len(control) < LEAST:
        raise UsageError(f"{len(control)} images from held-out captions set no threshold; give {LEAST} or more")
    if len(train) < 2:
        raise UsageError("one training image has no other to compare with; give more")
    size = min(len(train), len(held_out))
    (distances, _), (of_control, _) = nearest(generated, train[:size]), nearest(control, held_out[:size])
    of_copies, _ = nearest(copies, train[:size])
    to_train, neighbours = nearest(generated, train)
    own = train[neighbours].double()
    # the nearest is the image itself
    to_others = torch.cat([torch.cdist(rows, train.double()).kthvalue(2).values for rows in own.split(ROWS)])
    threshold = float(torch.quantile(of_control, FALSE_ALARMS))
    return Memorised(distances, of_control, of_copies, threshold, neighbours, float((to_train > to_others).double().mean()))


def through_autoencoder(pixels: Tensor, autoencoder: Autoencoder, device: torch.device) -> Tensor:
    """Images as a model returns them that has learnt their latents by heart: uint8 (B, 3, H, W) to the same."""
    with torch.no_grad():
        images = reconstruct(autoencoder, pixels_to_images(pixels.to(device)))
    return ((images + 1) * 127.5).round().byte().cpu()


def closest(found: Mapping[str, Memorised], count: int) -> list[int]:
    """The numbers of the generated images that are nearest to a training image, relative to the threshold by the network that
    finds each nearest; the nearest first."""
    relative = torch.stack([each.generated / each.threshold for each in found.values()]).amin(0)
    return torch.argsort(relative)[:count].tolist()


@dataclass(frozen=True)
class Pair:
    """A generated image beside its nearest training image, with the key of that and the distances by each network."""

    generated: Image.Image
    trained: Image.Image
    key: str
    distances: Mapping[str, float]


def write_page(
    path: str | os.PathLike, title: str, found: Mapping[str, Memorised], pairs: Sequence[Pair], protocol: Mapping[str, Any]
) -> None:
    """Write the page, one HTML file."""
    report = Report("Memorisation", title)
    columns = ["network", "below the threshold", "expected", "copies found", "authenticity", "threshold"]
    rows = [[name, each.share, FALSE_ALARMS, each.recall, each.authenticity, each.threshold] for name, each in found.items()]
    report.table("Generated images that are nearer to a training image than chance lets them be", columns, rows)
    for name, each in found.items():
        panels = {"generated": each.generated, "from held-out captions": each.control, "copies by the autoencoder": each.copies}
        high = max(float(values.max()) for values in panels.values())
        if high > 0:
            shares = {label: np.histogram(values, BINS, (0, high))[0] / len(values) for label, values in panels.items()}
            report.bars(
                f"Distance to the nearest training image ({name})", shares, 0.0, high, note=f"threshold {each.threshold:.4g}"
            )
    if pairs:
        labelled = [
            (
                f"{pair.key}: {', '.join(f'{name} {value:.3g}' for name, value in pair.distances.items())}",
                [pair.generated, pair.trained],
            )
            for pair in pairs
        ]
        report.image("The nearest: generated, and its training image", paired_grid(labelled))
    report.folded("Protocol", json.dumps(protocol, indent=2, ensure_ascii=False))
    report.save(path)
