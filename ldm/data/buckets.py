"""Aspect-ratio buckets: the sizes that images of many shapes are cropped and resized to, so that little of each is lost.

An image goes into the tier of the largest base of which it fills a bucket, and there into the bucket that crops least of it.
Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

import numpy as np

from ldm.errors import UsageError
from ldm.images import MAX_PIXELS, DecodeError

Size = tuple[int, int]

# (short, long) of paper and screens, as diffusers has them up to 1:2; longer ones follow in halves (2:5, 1:3, ...)
RATIOS = ((1, 1), (4, 5), (3, 4), (2, 3), (9, 16))
MAX_ASPECT, MAX_UPSCALE = 16.0, 1024.0
TOO_SMALL, TOO_LONG = "too small for every bucket", "cropped too much in every bucket"  # why an image fits none
UNFIT_SHARE = 0.1  # of images that fit no bucket; more are refused unless that is asked for


@dataclass(frozen=True)
class Buckets:
    """The sizes of images, and which image gets which.

    Attributes:
        bases: the areas of the tiers, as the sides of squares in pixels; multiples of ``step``.
        step: all sides are multiples of it.
        max_aspect: longer over shorter side, at most, before the sides are rounded to ``step``.
        max_upscale: an image may be enlarged by this factor at most; 1: not at all.
        max_crop: the share of an image's area that may be cropped off, at most; None: any.
    """

    bases: tuple[int, ...]
    step: int = 32
    max_aspect: float = 2.0
    max_upscale: float = 1.0
    max_crop: float | None = field(default=None, repr=False)  # runs of before are known by the repr

    def __post_init__(self) -> None:
        """Raises :class:`UsageError` for settings that make no table."""
        if not self.bases:
            raise UsageError("buckets are given without a side; give one or more, for example 256")
        if self.step < 1:
            raise UsageError(f"the step of buckets is {self.step}; give 1 or more")
        for base in self.bases:
            if not 1 <= base <= MAX_PIXELS**0.5:
                raise UsageError(f"buckets hold the side {base}; give 1 to {int(MAX_PIXELS**0.5)}")
            if base % self.step:
                near = max(round(base / self.step), 1) * self.step
                raise UsageError(f"buckets hold the side {base}, which their step {self.step} does not divide; give {near}")
        if not 1 <= self.max_aspect <= MAX_ASPECT:  # NaN too
            raise UsageError(f"the largest aspect ratio of buckets is {self.max_aspect}; give 1 to {MAX_ASPECT:g}")
        if not 1 <= self.max_upscale <= MAX_UPSCALE:
            raise UsageError(f"images may be enlarged {self.max_upscale} times; give 1 to {MAX_UPSCALE:g}")
        if self.max_crop is not None and not 0 <= self.max_crop < 1:
            raise UsageError(f"the share that may be cropped off is {self.max_crop}; give 0 to 1, or leave it out")

    @cached_property
    def tiers(self) -> tuple[tuple[Size, ...], ...]:
        """The buckets of each base, the largest base first; in a tier from the widest to the tallest."""
        return tuple(_tier(base, self.step, self.max_aspect) for base in sorted(set(self.bases), reverse=True))

    @cached_property
    def table(self) -> tuple[Size, ...]:
        """All buckets; a bucket's number is its place here."""
        return tuple(dict.fromkeys(size for tier in self.tiers for size in tier))

    def choose(self, height: int, width: int) -> int | None:
        """The number of an image's bucket; None where it would have to be enlarged or cropped too much for every one.

        Of the tier of the largest base in which any serves, the one that crops least; of equal ones the first.
        """
        if not (height and width):  # of an image that cannot be read
            return None
        for tier in self.tiers:
            serve = [size for size in tier if enlargement(height, width, size) <= self.max_upscale]
            best = min(serve, key=lambda size: cropped_share(height, width, size), default=None)
            if best and (self.max_crop is None or cropped_share(height, width, best) <= self.max_crop):
                return self.table.index(best)
        return None

    def size_for(self, height: int, width: int) -> Size:
        """The size of an image's bucket. Raises :class:`DecodeError` where there is none."""
        if (number := self.choose(height, width)) is None:
            least = ceil(100 * min(enlargement(height, width, size) for size in self.table)) / 100
            what = f"is {width} x {height} pixels, {TOO_SMALL}"
            serve = [size for size in self.table if enlargement(height, width, size) <= self.max_upscale]
            if serve and self.max_crop is not None:
                lost = ceil(1000 * min(cropped_share(height, width, size) for size in serve)) / 1000
                what = f"is {width} x {height} pixels, {TOO_LONG}"
                raise DecodeError(f"{what}: that takes a max_crop of {lost:g}, it is {self.max_crop:g}")
            raise DecodeError(f"{what}: that takes a max_upscale of {least:g}, it is {self.max_upscale:g}")
        return self.table[number]

    def assign(self, sizes: np.ndarray) -> np.ndarray:
        """The bucket numbers of images of these ``sizes`` (N, 2), of which some may be unknown (0): int32 (N,), −1 for none."""
        packed = sizes.astype(np.int64) @ [2**32, 1]  # one number, which sorts faster
        different, which = np.unique(packed, return_inverse=True)
        numbers = [self.choose(*divmod(size, 2**32)) for size in different.tolist()]
        return np.array([-1 if number is None else number for number in numbers], np.int32)[which.reshape(-1)]

    def require_multiples(self, unit: int, what: str) -> None:
        """Raise :class:`UsageError` naming the sides that ``unit``, which is ``what``, does not divide."""
        if sides := sorted({side for size in self.table for side in size if side % unit}):
            raise UsageError(
                f"the buckets have sides of {', '.join(map(str, sides))} pixels, which {what} ({unit}) does not divide; give a "
                f"step that is a multiple of {unit}, and sides that it divides"
            )


def require_fits(unfit: int, total: int, spec: str, max_bad_share: float) -> None:
    """Raise :class:`UsageError` where more images of ``spec`` fit no bucket than :data:`UNFIT_SHARE` and ``max_bad_share``.

    Such images are not broken: that some are too small is to be expected.
    """
    if unfit and (unfit == total or unfit > max(max_bad_share, UNFIT_SHARE) * total):
        fix = "" if unfit == total else f", or max_bad_share to {ceil(100 * unfit / total) / 100:g} to leave them out"
        raise UsageError(
            f"{unfit} of {total} images in {spec} fit no bucket: they are {TOO_SMALL}, {TOO_LONG}, or cannot be "
            f"read; give smaller buckets, or raise max_upscale, max_crop{fix} (ldm shards show names them)"
        )


def _tier(base: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """Areas of about base², as ``generate_aspect_ratio_buckets`` of ``diffusers.training_utils`` rounds their sides."""
    ratios = [*RATIOS, *((2, longer) for longer in range(4, int(2 * max_aspect) + 1))]
    found: set[Size] = set()
    for ratio in (longer / shorter for shorter, longer in ratios if longer <= max_aspect * shorter):
        longer, shorter = (max(round(side / step), 1) * step for side in (base * ratio**0.5, base / ratio**0.5))
        found |= {(longer, shorter), (shorter, longer)}
    return tuple(sorted(found))


def enlargement(height: int, width: int, size: Size) -> float:
    """The factor by which an image is resized to fill ``size``: over 1 where it is enlarged."""
    return max(size[0] / height, size[1] / width)


def cropped_share(height: int, width: int, size: Size) -> float:
    """The share of an image's area that is lost when it is cropped to the proportions of ``size``, 0 to 1."""
    across, down = height * size[1], width * size[0]
    return 1 - min(across, down) / max(across, down)


def crop_box(height: int, width: int, size: Size) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest part of an image with the proportions of ``size``, to the nearest pixel, in
    the centre: one side is the image's."""
    crop_height, crop_width = height, width
    if height * size[1] <= width * size[0]:
        crop_width = max((2 * height * size[1] + size[0]) // (2 * size[0]), 1)
    else:
        crop_height = max((2 * width * size[0] + size[1]) // (2 * size[1]), 1)
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def scaled_side(height: int, width: int, size: Size) -> int:
    """The shorter side, in pixels, of the whole image at the scale at which it fills ``size``, rounded up."""
    shorter = min(height, width)
    return max(-(-shorter * size[0] // height), -(-shorter * size[1] // width))
