"""A sample of stored latents, and the images that they were encoded from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.buckets import Buckets
from ldm.data.decode import DecodeError, decode_image
from ldm.data.latent_schema import LatentShard, latent_info, path_of
from ldm.data.manifest import IMAGE_SHARDS
from ldm.data.shards import ShardReader, ShardSample
from ldm.data.sources import ShardSource, open_source
from ldm.errors import LdmError, UsageError
from ldm.latents.images import CaptionedImages
from ldm.models.autoencoder import decode, downsampling_factor, pixels_to_images
from ldm.models.autoencoder_kinds import Autoencoder


class StoredLatent(NamedTuple):
    """The stored latents of one image.

    Attributes:
        shard: name of the latent shard.
        key: of the image.
        captions: of the image.
        latents: ``mean`` and, where stored, ``std``, ``mean_flip``, ``std_flip``: float32 (C, h, w).
    """

    shard: str
    key: str
    captions: list[str]
    latents: dict[str, np.ndarray]


def sample_latents(source: ShardSource, count: int) -> Iterator[StoredLatent]:
    """``count`` latents (or all, if there are fewer), evenly spaced over the whole set and always the same ones.

    Raises :class:`LdmError` for a broken shard.
    """
    entries = source.manifest.shards
    starts = np.cumsum([0, *(entry.samples for entry in entries)])
    total = int(starts[-1])
    count = min(count, total)
    rows = np.array([(2 * number + 1) * total // (2 * count) for number in range(count)], np.int64)
    for number, entry in enumerate(entries):
        wanted = rows[(rows >= starts[number]) & (rows < starts[number + 1])] - starts[number]
        if not len(wanted):
            continue
        shard = LatentShard(source.path(number), entry.samples)
        for row in wanted.tolist():
            chunk, row = shard.locate(row)
            try:
                tensors, metadata = shard.tensors(chunk), shard.metadata(chunk)
            except DecodeError as error:
                raise LdmError(f"{source.name(number)}: sample {row} {error}; restore it, or export again") from None
            names = [name for name in ("mean", "std", "mean_flip", "std_flip") if name in tensors]
            latents = {name: tensors[name][row].astype(np.float32) for name in names}
            yield StoredLatent(entry.name, metadata["keys"][row], metadata["captions"][row], latents)
        shard.close()


def decode_mean(autoencoder: Autoencoder, mean: np.ndarray) -> Tensor:
    """A stored mean (C, h, w) -> the image (1, 3, H, W), not clamped to [−1, 1]; not finite where the latent is broken."""
    return decode(autoencoder, torch.from_numpy(mean)[None].to(autoencoder.device)).float()


class SourceImages:
    """The images that latents were encoded from, found by shard and key and preprocessed as the export did."""

    def __init__(self, source: ShardSource, resolution: int | None, factor: int, buckets: Buckets | None):
        """``source`` is of image shards; the other arguments are those of :class:`CaptionedImages`."""
        self.source = source
        self.dataset = CaptionedImages(source, resolution, factor, "none", buckets)
        self._number: int | None = None

    @classmethod
    def open(cls, source: ShardSource, autoencoder: Autoencoder, shards: str | Path | None = None) -> SourceImages | None:
        """The images of a source of latents; None where the image shards are no longer where they were.

        Args:
            source: of latents.
            autoencoder: that encoded them.
            shards: the image shards; None: where they were when they were exported.

        Raises:
            UsageError: these are other shards than were exported.
        """
        info = latent_info(source)
        # a sample of every shard of a remote set would download all of it: only where the user names it
        if shards is None and "://" in info.source_shards:
            return None
        try:
            images = open_source(path_of(source, info.source_shards) if shards is None else shards, IMAGE_SHARDS)
        except UsageError:
            if shards is None:
                return None
            raise
        if (found := images.manifest.hash) != info.source:
            raise UsageError(
                f"{source.spec} holds latents of image shards {info.source[:12]}, but {images.spec} is {found[:12]}; give the "
                "shards that they were exported from, or export again: ldm latents export"
            )
        images.check_cheap()
        return cls(images, info.resolution, downsampling_factor(autoencoder), info.buckets)

    def image(self, stored: StoredLatent, device: torch.device | str = "cpu") -> Tensor | None:
        """The image (1, 3, H, W) in [−1, 1] of a latent; None where its shard has no such key.

        Raises :class:`DecodeError` where it cannot be used.
        """
        if (sample := self._sample(stored.shard, stored.key)) is None:
            return None
        pixels = self.dataset.decode((sample, False), None)["image"]
        return pixels_to_images(torch.from_numpy(np.ascontiguousarray(pixels))[None].to(device))

    def whole(self, shard: str, key: str) -> Image.Image | None:
        """The whole image of which a latent shard holds a part under ``key``; None and errors as for :meth:`image`."""
        sample = self._sample(shard, key)
        return None if sample is None else decode_image(sample.image or b"")

    def _sample(self, shard: str, key: str) -> ShardSample | None:
        # latents-00012.tar was made from image shard 12
        digits = shard.removesuffix(".tar").rpartition("-")[2]
        number = int(digits) if digits.isdecimal() else -1
        if not 0 <= number < len(self.source.manifest.shards):
            return None
        if number != self._number:  # latents come shard by shard
            self._reader, self._number = ShardReader(self.source.path(number), key_dot=self.source.manifest.key_dot), number
            self._rows = {key: row for row, key in enumerate(self._reader.keys)}
        return self._reader[self._rows[key]] if key in self._rows else None
