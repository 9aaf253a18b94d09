"""Images and captions as an export encodes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from ldm.data.buckets import Buckets, Size
from ldm.data.decode import DecodeError, image_size_of
from ldm.data.image_dataset import ImageDataset
from ldm.data.image_sizes import image_sizes
from ldm.data.shards import ShardSample
from ldm.data.sources import ShardSource

Captions: TypeAlias = Literal["first", "all", "none"] | list[str]


class CaptionedImages(ImageDataset):
    """Image shards with all captions, original sizes and crops, preprocessed for the autoencoder."""

    def __init__(
        self,
        source: ShardSource,
        resolution: int | None,
        factor: int,
        captions: Captions,
        buckets: Buckets | None = None,
    ):
        """
        Args:
            source: of image shards with captions.
            resolution: side in pixels to crop and resize to; None: to the size of the image's bucket, or without ``buckets``
                keep each image's size, cropped to a multiple of ``factor``.
            factor: image side over latent side.
            captions: which of an image's captions: the first, all, those of some names, or none, in whose place is the empty
                one.
            buckets: sizes to crop and resize to.
        """
        read_captions = captions in ("first", "all")
        super().__init__(source, resolution, read_captions=read_captions, buckets=buckets, read_sizes=True)
        # older manifests have no sizes: the headers tell
        with_sizes = buckets is not None and "sizes" in source.manifest.extra
        self.known_sizes = image_sizes(source) if with_sizes else None  # (N, 2)
        self.factor, self.captions = factor, captions

    def decode(self, raw: tuple[ShardSample, bool], draw: int | None, out: np.ndarray | None = None) -> dict[str, Any]:
        """``image`` uint8 (3, H, W), ``key``, and ``captions``, ``original_size``, ``crop`` as in the schema of latents."""
        sample, _ = raw
        decoded = super().decode(raw, None)
        captions, names = self._captions(sample)
        if not captions:
            raise DecodeError("has no caption")
        crop = decoded["crop"]
        if self.image_size is None and self.buckets is None:
            height, width = decoded["image"].shape[1:]
            crop_height, crop_width = self._cropped(height, width)
            crop = (0, 0, crop_height, crop_width)
            if not crop_height or not crop_width:
                raise DecodeError(f"{width} x {height} pixels, smaller than the autoencoder's factor {self.factor}")
            decoded["image"] = decoded["image"][:, :crop_height, :crop_width]
        return {
            "image": decoded["image"],
            "key": decoded["key"],
            "captions": captions,
            "caption_names": names,
            "original_size": decoded["original_size"],
            "crop": crop,
        }

    def captions_of(self, row: int) -> list[str]:
        """The captions of sample ``row``; none where they cannot be read: decoding the sample gives the reason."""
        try:
            return self._captions(self._sample(row))[0]
        except DecodeError:
            return []

    def _captions(self, sample: ShardSample) -> tuple[list[str], list[int] | None]:
        """Its captions and, where captions of some names are asked for, the numbers of their names."""
        if self.captions == "none":
            return [""], None
        if isinstance(self.captions, list):
            named = [(text, name) for name, called in enumerate(self.captions) for text in sample.captions_called(called)]
            return [text for text, _ in named], [name for _, name in named]
        captions = sample.captions
        return captions if self.captions == "all" else captions[:1], None

    def windows(self, rows: Sequence[int], length: int) -> Iterator[tuple[Sequence[int], list[Sequence[int]]]]:
        """The samples of a shard in the order in which their latents are stored: parts of up to ``length``, one at least, each
        with its groups of samples of one size, which can be encoded together.

        With buckets the samples are ordered by size, in the order of the table.
        """
        sizes: dict[int, Size | None] = {}
        if self.buckets is not None:
            sizes = {row: self._encoded_size(row) for row in rows}
            order: dict[Size | None, int] = {size: place for place, size in enumerate(self.buckets.table)}
            rows = sorted(rows, key=lambda row: order.get(sizes[row], len(order)))
        for start in range(0, max(len(rows), 1), length):
            part = rows[start : start + length]
            groups: dict[Size | None, list[int]] = {}
            for row in part:
                groups.setdefault(sizes[row] if row in sizes else self._encoded_size(row), []).append(row)
            yield part, [*groups.values()]

    def _encoded_size(self, row: int) -> Size | None:
        """The size at which a sample is encoded; None where it cannot be told: decoding the sample gives the reason."""
        if self.image_size is not None:
            return self.image_size, self.image_size
        try:
            known = self.known_sizes
            height, width = image_size_of(self._sample(row).image or b"") if known is None else known[row].tolist()
        except DecodeError:
            return None
        if self.buckets is None:
            return self._cropped(height, width)
        number = self.buckets.choose(height, width)
        return None if number is None else self.buckets.table[number]

    def _cropped(self, height: int, width: int) -> tuple[int, int]:
        return height - height % self.factor, width - width % self.factor

    def _sample(self, row: int) -> ShardSample:
        shard, number = self.locate(row)
        with self._lock:
            return self.read(self.shards[shard][0], self._open(shard), number)[0]
