"""Images and captions by sample number, from image shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.data.buckets import Buckets, Size, crop_box, scaled_side
from ldm.data.decode import DecodeError, decode_json, decode_pixels, image_size_of
from ldm.data.image_sizes import image_sizes
from ldm.data.manifest import IMAGE_SHARDS, ShardEntry
from ldm.data.plan import PlannedSample
from ldm.data.shard_dataset import ShardDataset
from ldm.data.shards import KeyDot, ShardReader, ShardSample
from ldm.data.sources import ShardSource
from ldm.errors import LdmError, UsageError

Crop = Literal["centre", "random", "window", "bucket"]
SIZES = ("original_size", "crop")  # of a sample, for micro-conditioning


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a sample; by default none. They depend on the seed and the draw's number alone.

    Attributes:
        crop: the square taken from an image: the largest, in the centre or at random along the longer side, then resized; or a
            "window" of the final size, anywhere in the image at its own resolution. Without a draw, in the centre. Or, of the
            proportions of the image's "bucket", the largest part in the centre.
        flip: probability of a mirrored image.
        caption: which of several captions is used; or the weights, by name (:func:`ldm.data.decode.captions_called`), by which
            one is drawn of those that the sample has. Without a draw, the first of them.
        caption_dropout: probability of the empty caption.
        seed: of all these.
    """

    crop: Crop = "centre"
    flip: float = 0.0
    caption: Literal["first", "random"] | Mapping[str, float] = "first"
    caption_dropout: float = 0.0
    seed: int = 0

    def random(self, draw: int | None) -> np.random.Generator | None:
        """The random generator of one draw; None where nothing is random."""
        nothing = self.crop in ("centre", "bucket") and self.caption == "first" and self.flip == self.caption_dropout == 0
        return None if draw is None or nothing else np.random.default_rng([self.seed, draw])


NOTHING_RANDOM = Augmentation()


def weighted_choice(weights: Sequence[float], fraction: float) -> int:
    """The number of one of several things, drawn by weight with ``fraction`` in [0, 1); at 0 it is the first. Raises
    :class:`DecodeError` where there is none with a weight."""
    ends = np.cumsum(weights)
    if not len(ends) or not ends[-1] > 0:
        raise DecodeError("has none of the captions that are drawn by weight")
    return int(np.searchsorted(ends, fraction * ends[-1], side="right"))


class ImageDataset(ShardDataset[ShardReader]):
    """Random access to the images and captions of image shards."""

    format = IMAGE_SHARDS
    # simplejpeg and Pillow release the GIL
    decode_threads = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

    def __init__(
        self,
        sources: str | Path | ShardSource | Sequence[ShardSource],
        image_size: int | None = None,
        augmentation: Augmentation = NOTHING_RANDOM,
        require_captions: bool = True,
        read_captions: bool = True,
        buckets: Buckets | None = None,
        read_sizes: bool = False,
    ):
        """
        Args:
            sources: a folder of image shards with its manifest, or opened sources.
            image_size: crop and resize every image to this side (:func:`fit`); None: leave them as they are.
            augmentation: random changes.
            require_captions: in a folder with captions, a sample without one cannot be used.
            read_captions: False: captions are neither read nor required, and all of them are empty.
            buckets: the sizes to crop and resize images to, in place of ``image_size``; the sources tell the images' sizes.
            read_sizes: also give ``original_size`` and ``crop``, as in the schema of latents; of a mirrored image, those of the
                image as it is.
        """
        if augmentation.crop == "window" and image_size is None:
            raise UsageError("crop window needs the side of the window; set image_size")
        super().__init__(sources)
        self.image_size, self.augmentation = image_size, augmentation
        self.require_captions, self.read_captions = require_captions and read_captions, read_captions
        self.buckets, self.read_sizes = buckets, read_sizes
        self._size = (image_size, image_size) if image_size else None  # expected of an image

    def open_shard(self, path: Path, entry: ShardEntry, key_dot: KeyDot = "first") -> ShardReader:
        return ShardReader(path, key_dot=key_dot)

    def batch_bytes(self, draws: Sequence[PlannedSample | int]) -> int:
        return 3 * len(draws) * prod(self._size_of(draws) or (0,))

    def _size_of(self, draws: Sequence[PlannedSample | int]) -> Size | None:
        """(height, width) expected of the images of a batch; None where that is not known."""
        if self.buckets is None or self.groups is None:
            return self._size
        first = draws[0].sample if isinstance(draws[0], PlannedSample) else draws[0]
        return self.buckets.table[self.groups[first]]

    @cached_property
    def groups(self) -> np.ndarray | None:
        """The number of each image's bucket; -1 where it fits none. Raises as :func:`image_sizes` does."""
        if self.buckets is None:
            return None
        return self.buckets.assign(np.concatenate([image_sizes(source) for source in self.sources]))

    @cached_property
    def group_sizes(self) -> Sequence[tuple[int, int]]:
        if self.buckets is not None:
            return self.buckets.table
        return [(self.image_size, self.image_size)] if self.image_size else []

    def key(self, shard: ShardReader, row: int) -> str:
        return shard.key(row) if row < len(shard) else f"#{row}"

    def read(self, source: ShardSource, shard: ShardReader, row: int) -> tuple[ShardSample, bool]:
        """The sample's bytes, and whether it needs a caption."""
        if row >= len(shard):
            raise DecodeError(f"is missing: the shard {shard.damage or f'holds {len(shard)} samples'}")
        named = isinstance(self.augmentation.caption, Mapping)
        return shard[row], self.require_captions and (named or bool(source.manifest.captioned))

    def decode(self, raw: tuple[ShardSample, bool], draw: int | None, out: np.ndarray | None = None) -> dict[str, Any]:
        """``image`` uint8 (3, H, W), ``caption`` (empty where there is none) and ``key``, and ``original_size``, ``crop`` where
        read; pixels may be written to ``out``."""
        sample, captioned = raw
        if sample.image is None:
            raise DecodeError("has no image")
        how, weights = self.augmentation, list[float]()
        if not isinstance(how.caption, Mapping) or not self.read_captions:
            captions = sample.captions if self.read_captions else []
        else:
            named = [(sample.captions_called(name), weight) for name, weight in how.caption.items()]
            captions = [caption for texts, _ in named for caption in texts]
            weights = [weight / len(texts) for texts, weight in named for _ in texts]
        if not captions and captioned:
            raise DecodeError("has no caption")
        random = how.random(draw)
        pixels, sizes = self._pixels(sample.image, random, out)
        if self.read_sizes:
            sizes["original_size"] = original_size_of(sample) or sizes["original_size"]
        caption = captions[weighted_choice(weights, 0) if weights else 0] if captions else ""
        if random is not None:
            if random.random() < how.flip:
                pixels = pixels[:, ::-1]
            if how.caption == "random" and captions:
                caption = captions[random.integers(len(captions))]
            elif weights:
                caption = captions[weighted_choice(weights, random.random())]
            if random.random() < how.caption_dropout:
                caption = ""
        return {"image": pixels.transpose(2, 0, 1), "caption": caption, "key": sample.key} | sizes

    def _pixels(
        self, image: bytes, random: np.random.Generator | None, out: np.ndarray | None
    ) -> tuple[np.ndarray, dict[str, tuple[int, ...]]]:
        """The pixels (H, W, 3) of an image, cropped and resized; and, where ``read_sizes``, its ``original_size`` and its
        ``crop`` in its own pixels."""
        crop, side = self.augmentation.crop, self.image_size
        whole = image_size_of(image) if self.read_sizes or self.buckets is not None else None
        if self.buckets is not None and whole is not None:
            size = self.buckets.size_for(*whole)
            pixels = decode_pixels(image, out, scaled_side(*whole, size))
        else:
            pixels = decode_pixels(image, out, None if crop == "window" else side)
            size = None if side is None else (side, side)
        found = pixels.shape[0], pixels.shape[1]
        centred = crop in ("centre", "bucket")
        if size is None:
            box = (0, 0, *found)
        else:
            box = crop_box(*found, size) if centred else square(*found, size[0], random, crop == "window")
            pixels = resize(pixels, box, size)
        if not self.read_sizes or whole is None:
            return pixels, {}
        if size is not None and found != whole:  # decoded smaller
            box = crop_box(*whole, size) if centred else enlarged_square(box, found, whole)
        return pixels, {"original_size": whole, "crop": box}

    def batch(self, draws: Sequence[PlannedSample | int], empty: Callable[..., Tensor] = torch.empty) -> dict[str, Any]:
        """The batch of these draws; most images are decoded in place, which at 256 px saves a third of the time."""
        size = self._size_of(draws)
        memory = None if size is None else empty((len(draws), *size, 3), dtype=torch.uint8)
        batch = self.collate(self.__getitems__(draws, None if memory is None else memory.numpy()), memory)
        self._size = batch["image"].shape[2:]
        return batch

    @staticmethod
    def collate(samples: list[dict[str, Any]], memory: Tensor | None = None) -> dict[str, Any]:
        """``image`` uint8 (B, 3, H, W), ``caption`` and ``key`` lists of B, and where present ``original_size`` (B, 2) and
        ``crop`` (B, 4) int32, and ``bad``.

        The image is channels-last in memory, as decoders write it; converting to float on the device changes that at no cost.
        ``memory`` is (B, H, W, 3) and may hold some of the images in place already.
        """
        images = [sample["image"].transpose(1, 2, 0) for sample in samples]
        sizes = {image.shape for image in images}
        if len(sizes) > 1:
            found = ", ".join(f"{width} x {height}" for height, width, _ in sorted(sizes))
            raise LdmError(f"one batch holds images of several sizes ({found}); set image_size to fit them to one")
        shape = (len(images), *images[0].shape)
        memory = memory if memory is not None and memory.shape == shape else torch.empty(shape, dtype=torch.uint8)
        for image, place in zip(images, memory.numpy(), strict=True):
            if image.ctypes.data != place.ctypes.data or image.strides != place.strides:
                place[...] = image
        batch = {name: [sample[name] for sample in samples] for name in (*SIZES, "caption", "key", "bad") if name in samples[0]}
        batch |= {name: torch.tensor(batch[name], dtype=torch.int32) for name in SIZES if name in batch}
        return {"image": memory.permute(0, 3, 1, 2)} | batch


def square(
    height: int, width: int, size: int, random: np.random.Generator | None = None, window: bool = False
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a square in an image, in the centre or at random.

    The largest square; for a ``window`` the largest up to ``size``, so that only images smaller than that are resized.
    """
    side = min(height, width, size) if window else min(height, width)
    spare = np.array([height - side, width - side])
    top, left = (spare // 2 if random is None else random.integers(spare, endpoint=True)).tolist()
    return top, left, side, side


def enlarged_square(box: tuple[int, int, int, int], found: Size, whole: Size) -> tuple[int, int, int, int]:
    """The largest square of an image of size ``whole`` that :func:`square` has placed in it at the smaller size ``found``."""
    side = min(whole)
    top, left = (min(round(box[axis] * whole[axis] / found[axis]), whole[axis] - side) for axis in (0, 1))
    return top, left, side, side


def original_size_of(sample: ShardSample) -> Size | None:
    """(height, width) of an image before packing, where its json has it (ours and img2dataset's). Raises
    :class:`DecodeError` for a broken json."""
    fields = decode_json(sample.files["json"]) if "json" in sample.files else {}
    for height, width in (("original_height", "original_width"), ("height", "width")):
        size = fields.get(height, 0), fields.get(width, 0)
        if all(type(side) is int and 0 < side < 2**31 for side in size):
            return size
    return None


def resize(pixels: np.ndarray, box: tuple[int, int, int, int], size: Size) -> np.ndarray:
    """The part (top, left, height, width) of (H, W, 3), resized to (*size, 3).

    Bicubic with antialiasing: within one level of 255 of Pillow's, in a fifth of its time.
    """
    top, left, height, width = box
    part = pixels[top : top + height, left : left + width]
    if (height, width) == size:
        return np.ascontiguousarray(part)  # a view would keep the whole image in memory until the batch is complete
    scaled = interpolate(torch.from_numpy(part).permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()
