"""Sections of a page about the sizes of images, and about what is lost when they are cropped to a few shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ldm.reporting.pages import Report

BINS = 48
_MARK, _DIM = (204, 44, 44), 0.35


def add_sizes(report: Report, sizes: np.ndarray) -> None:
    """Histograms of the sizes and proportions of images; ``sizes``: (height, width) in pixels, (N, 2)."""
    height, width = np.asarray(sizes, np.float64).T
    sides = np.sqrt(height * width)
    high = float(np.ceil(sides.max() / 64) * 64)
    counts = np.histogram(sides, BINS, (0, high))[0]
    name = f"median {np.median(sides):,.0f}, smallest {sides.min():,.0f}, largest {sides.max():,.0f}"
    report.bars("Image sizes", {name: counts}, 0, high, note="Side in pixels of a square of the same area.")
    aspect = np.maximum(height, width) / np.minimum(height, width)
    high = min(float(np.ceil(aspect.max() + 0.5)), 5.0)
    panels = {}
    for name, of in (("upright", height > width), ("wide", width > height)):
        narrow = f", {(aspect[of] > high).mean():.1%} beyond {high:g}" if (aspect[of] > high).any() else ""
        panels[f"{name}: {of.mean():.1%}{narrow}"] = np.histogram(np.minimum(aspect[of], high), BINS, (1, high))[0]
    note = f"Longer over shorter side; {(height == width).mean():.1%} are square."
    report.bars("Image proportions", panels, 1, high, note=note)


def add_buckets(report: Report, title: str, buckets: Sequence[str], which: np.ndarray, cropped: np.ndarray) -> None:
    """How many images each bucket has, and what they lose, under a ``title``.

    Args:
        buckets: names.
        which: the number of each image's bucket, (N,); −1: none.
        cropped: the share of each image's area that is cropped off, (N,), 0 to 1.
    """
    rows = []
    for number, name in enumerate(buckets):
        lost = cropped[which == number]
        share, average, most = (len(lost) / len(which), lost.mean(), lost.max()) if len(lost) else (0.0, None, None)
        percent = (None if value is None else round(100 * float(value), 1) for value in (share, average, most))
        rows.append((name, len(lost), *percent))
    if without := int((which < 0).sum()):
        rows.append(("none", without, round(100 * without / len(which), 1), None, None))
    report.table(title, ("size", "images", "%", "cropped on average, %", "cropped most, %"), rows)
    lost = 100 * cropped[which >= 0]
    if len(lost):
        high = max(float(np.ceil(lost.max() / 10) * 10), 10.0)
        name = f"{lost.mean():.1f}% on average, {(lost > 20).mean():.1%} of the images lose more than 20%"
        report.bars("Cropped share of each image, %", {name: np.histogram(lost, BINS, (0, high))[0]}, 0, high)


def worst(cropped: np.ndarray, count: int) -> list[int]:
    """The numbers of the images that lose most, up to ``count`` that lose something, the worst first."""
    order = np.argsort(-cropped, kind="stable")[:count]
    return [int(number) for number in order if cropped[number] > 0]


def marked_crop(image: Image.Image, box: Sequence[int]) -> Image.Image:
    """An image with a frame round the ``box`` (top, left, height, width) that is kept of it, and the rest dimmed."""
    top, left, height, width = box
    kept = (left, top, left + width, top + height)
    image = image.convert("RGB")
    marked = Image.blend(Image.new("RGB", image.size, "white"), image, _DIM)
    marked.paste(image.crop(kept), kept)
    thick = max(max(image.size) // 100, 1)
    ImageDraw.Draw(marked).rectangle((kept[0], kept[1], kept[2] - 1, kept[3] - 1), outline=_MARK, width=thick)
    return marked
