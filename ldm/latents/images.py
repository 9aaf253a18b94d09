"""Images and captions as they are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ldm.data.decode import DecodeError, captions_of, decode_json, image_size_of
from ldm.data.image_dataset import ImageDataset
from ldm.data.shards import ShardSample
from ldm.data.sources import ShardSource


class CaptionedImages(ImageDataset):
    """Images as they are encoded, with all that is stored of them."""

    def __init__(self, source: ShardSource, resolution: int | None, factor: int, captions: Literal["first", "all"]):
        """
        Args:
            source: of image shards with captions.
            resolution: side in pixels to fit them to; None: as they are, less what is no multiple of ``factor``.
            factor: image side over latent side.
            captions: how many of an image's.
        """
        super().__init__(source, resolution)
        self.factor, self.captions = factor, captions

    def decode(self, raw: tuple[ShardSample, bool], draw: int | None, out: np.ndarray | None = None) -> dict[str, Any]:
        """``image`` (3, H, W), ``key``, ``captions``, ``original_size`` and ``crop`` as the schema of latents has them."""
        sample, _ = raw
        decoded = super().decode(raw, None)
        captions = self._captions(sample)
        if not captions:
            raise DecodeError("has no caption")
        if self.image_size is None:
            height, width = decoded["image"].shape[1:]
            shown_height, shown_width = height - height % self.factor, width - width % self.factor
            crop = (0, 0, shown_height, shown_width)
            if not shown_height or not shown_width:
                raise DecodeError(f"{width} x {height} pixels, smaller than the autoencoder's factor {self.factor}")
            decoded["image"] = decoded["image"][:, :shown_height, :shown_width]
        else:
            height, width = image_size_of(sample.image or b"")  # it may have been decoded smaller
            side = min(height, width)
            crop = ((height - side) // 2, (width - side) // 2, side, side)
        return {
            "image": decoded["image"],
            "key": decoded["key"],
            "captions": captions,
            "original_size": _original_size(sample) or (height, width),
            "crop": crop,
        }

    def captions_of(self, row: int) -> list[str]:
        """Those that are taken of a sample; none where it cannot be used, and why is found out when it is decoded."""
        try:
            return self._captions(self._sample(row))
        except DecodeError:
            return []

    def _captions(self, sample: ShardSample) -> list[str]:
        captions = captions_of(sample.caption, sample.files.get("json"))
        return captions if self.captions == "all" else captions[:1]

    def alike(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """Sample numbers by the size that their headers tell: groups that can be encoded together."""
        if self.image_size is not None:
            return [rows] if rows else []
        groups: dict[tuple[int, int] | None, list[int]] = {}
        for row in rows:
            groups.setdefault(self._trimmed_size(row), []).append(row)
        return [*groups.values()]

    def _trimmed_size(self, row: int) -> tuple[int, int] | None:
        """(height, width) that is left of an image; None where it cannot be told."""
        try:
            height, width = image_size_of(self._sample(row).image or b"")
        except DecodeError:
            return None
        return height - height % self.factor, width - width % self.factor

    def _sample(self, row: int) -> ShardSample:
        shard, number = self.locate(row)
        with self._lock:
            return self.read(self.shards[shard][0], self._open(shard), number)[0]


def _original_size(sample: ShardSample) -> tuple[int, int] | None:
    """(height, width) of the image before it was packed, where packing noted it: img2dataset's and ours."""
    fields = decode_json(sample.files["json"]) if "json" in sample.files else {}
    for height, width in (("original_height", "original_width"), ("height", "width")):
        size = fields.get(height, 0), fields.get(width, 0)
        if all(type(side) is int and 0 < side < 2**31 for side in size):
            return size
    return None
