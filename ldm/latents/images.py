"""Images and captions as an export encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ldm.data.decode import DecodeError, decode_json, image_size_of
from ldm.data.image_dataset import ImageDataset
from ldm.data.shards import ShardSample
from ldm.data.sources import ShardSource


class CaptionedImages(ImageDataset):
    """Image shards with all captions, original sizes and crops, preprocessed for the autoencoder."""

    def __init__(self, source: ShardSource, resolution: int | None, factor: int, captions: Literal["first", "all"]):
        """
        Args:
            source: of image shards with captions.
            resolution: side in pixels to crop and resize to; None: keep each image's size, cropped to a multiple of ``factor``.
            factor: image side over latent side.
            captions: which of an image's captions.
        """
        super().__init__(source, resolution)
        self.factor, self.captions = factor, captions

    def decode(self, raw: tuple[ShardSample, bool], draw: int | None, out: np.ndarray | None = None) -> dict[str, Any]:
        """``image`` uint8 (3, H, W), ``key``, and ``captions``, ``original_size``, ``crop`` as in the schema of latents."""
        sample, _ = raw
        decoded = super().decode(raw, None)
        captions = self._captions(sample)
        if not captions:
            raise DecodeError("has no caption")
        if self.image_size is None:
            height, width = decoded["image"].shape[1:]
            crop_height, crop_width = self._cropped(height, width)
            crop = (0, 0, crop_height, crop_width)
            if not crop_height or not crop_width:
                raise DecodeError(f"{width} x {height} pixels, smaller than the autoencoder's factor {self.factor}")
            decoded["image"] = decoded["image"][:, :crop_height, :crop_width]
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
        """The captions of sample ``row``; none where they cannot be read: decoding the sample gives the reason."""
        try:
            return self._captions(self._sample(row))
        except DecodeError:
            return []

    def _captions(self, sample: ShardSample) -> list[str]:
        captions = sample.captions
        return captions if self.captions == "all" else captions[:1]

    def alike(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """Sample numbers grouped by cropped size, read from the headers: groups that can be encoded together."""
        if self.image_size is not None:
            return [rows] if rows else []
        groups: dict[tuple[int, int] | None, list[int]] = {}
        for row in rows:
            try:
                size = self._cropped(*image_size_of(self._sample(row).image or b""))
            except DecodeError:
                size = None
            groups.setdefault(size, []).append(row)
        return [*groups.values()]

    def _cropped(self, height: int, width: int) -> tuple[int, int]:
        return height - height % self.factor, width - width % self.factor

    def _sample(self, row: int) -> ShardSample:
        shard, number = self.locate(row)
        with self._lock:
            return self.read(self.shards[shard][0], self._open(shard), number)[0]


def _original_size(sample: ShardSample) -> tuple[int, int] | None:
    """(height, width) of the image before packing, where the json has it (ours and img2dataset's)."""
    fields = decode_json(sample.files["json"]) if "json" in sample.files else {}
    for height, width in (("original_height", "original_width"), ("height", "width")):
        size = fields.get(height, 0), fields.get(width, 0)
        if all(type(side) is int and 0 < side < 2**31 for side in size):
            return size
    return None
