"""Random access to latents and text embeddings of latent shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from math import prod
from pathlib import Path
from struct import unpack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.decode import DecodeError
from ldm.data.image_dataset import NOTHING_RANDOM, SIZES, Augmentation, weighted_choice
from ldm.data.latent_schema import LatentShard, StoredTensor, common_info, sample_shapes, text_name
from ldm.data.manifest import LATENT_SHARDS, ShardEntry
from ldm.data.plan import PlannedSample
from ldm.data.shard_dataset import ShardDataset
from ldm.data.shards import KeyDot
from ldm.data.sources import ShardSource
from ldm.errors import LdmError

#: captions are padded to a multiple of this: on a GPU each new length costs a plan or a compilation of the attention
TOKENS_MULTIPLE = 16


def padded_length(tokens: int) -> int:
    """The length that captions of up to this number of tokens are padded to."""
    return -(-tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE


class LatentDataset(ShardDataset[LatentShard]):
    """Latents and embeddings by sample number, in the order of the manifest."""

    format = LATENT_SHARDS
    # a shuffle window may span a thousand shards: a quarter of the files that this process may open
    open_shards = max(ShardDataset.open_shards, min(4096, os.sysconf("SC_OPEN_MAX") // 4 if hasattr(os, "sysconf") else 0))

    def __init__(
        self,
        sources: str | Path | ShardSource | Sequence[ShardSource],
        augmentation: Augmentation = NOTHING_RANDOM,
        null_text: np.ndarray | Sequence[np.ndarray] | None = None,
        text_encoder: int | Sequence[int] = 0,
        read_sizes: bool = False,
    ):
        """
        Args:
            sources: a folder of latent shards with its manifest, or opened sources.
            augmentation: ``flip`` (if the latents of mirrored images were exported), ``caption`` and ``caption_dropout``; the
                export has fixed the others.
            null_text: the encoded empty caption, (L, D) of each text encoder, which replaces a dropped caption.
            text_encoder: whose embeddings are read, by its position in the export, from 0; one or several.
            read_sizes: also read ``original_size`` and ``crop``; of a mirrored image, those of the image as it is.
        """
        super().__init__(sources)
        self.augmentation = augmentation
        self.texts = [text_name(number) for number in ([text_encoder] if isinstance(text_encoder, int) else text_encoder)]
        self.null_texts = [null_text] if isinstance(null_text, np.ndarray) else null_text
        self._sizes = SIZES if read_sizes else ()
        self.caption_names = self.sources[0].manifest.extra.get("caption_names", ())
        self._names = ("mean",) if self.sources[0].manifest.extra.get("posterior") == "mode" else ("mean", "std")

    @cached_property
    def groups(self) -> np.ndarray | None:
        return sample_shapes(self.sources)

    @cached_property
    def group_sizes(self) -> Sequence[tuple[int, int]]:
        return [(height, width) for _, height, width in common_info(self.sources).latent_shapes]

    def open_shard(self, path: Path, entry: ShardEntry, key_dot: KeyDot = "first") -> LatentShard:
        return LatentShard(path, entry.samples)

    def key(self, shard: LatentShard, row: int) -> str:
        chunk, row = shard.locate(row)
        return shard.metadata(chunk)["keys"][row]

    def keys(self, shard: LatentShard, samples: int) -> Sequence[str]:
        return [key for chunk in range(len(shard.spans)) for key in shard.metadata(chunk)["keys"]]

    def read(self, source: ShardSource, shard: LatentShard, row: int) -> tuple[dict[str, StoredTensor], int]:
        """The tensors of the image's chunk (:mod:`ldm.data.latent_schema`), and its row there."""
        chunk, row = shard.locate(row)
        return shard.tensors(chunk), row

    def decode(
        self, raw: tuple[dict[str, StoredTensor], int], draw: int | None, out: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """``mean``, ``std`` (C, h, w), ``text`` (L, D); ``original_size`` (2,) and ``crop`` (4,) where read. The draw's random
        numbers choose flip, caption and dropout.

        Nothing is written to ``out``. ``std`` is absent where modes were exported. Of several text encoders the tokens follow
        one another, filled up with zeros to the widest, and ``text_mask`` (L,) numbers them from 1.
        """
        tensors, row = raw
        mirrored, caption, dropped = self._choose(draw)
        try:
            sample = {name: tensors[f"{name}_flip" if mirrored else name][row] for name in self._names}
            first, end = tensors["caption_start"][row : row + 2].tolist()
            if first == end:
                raise DecodeError("has no caption")
            number = first + self._number_of(caption, tensors, first, end)
            spans = [tensors[f"{text}_start"][number : number + 2].tolist() for text in self.texts]
            texts = [tensors[text][start:stop] for text, (start, stop) in zip(self.texts, spans, strict=True)]
        except KeyError as error:
            raise DecodeError(f"is in a chunk without {error}") from None
        if dropped:
            assert self.null_texts is not None  # given wherever captions are dropped
            texts = [null.astype(text.dtype, copy=False) for null, text in zip(self.null_texts, texts, strict=True)]
        sample |= {name: tensors[name][row] for name in self._sizes}
        if len(texts) == 1:
            return sample | {"text": texts[0]}
        width = max(text.shape[1] for text in texts)
        text = np.concatenate([np.pad(text, ((0, 0), (0, width - text.shape[1]))) for text in texts])
        return sample | {"text": text, "text_mask": np.repeat(np.arange(1, len(texts) + 1), [*map(len, texts)])}

    def _number_of(self, caption: int, tensors: Mapping[str, StoredTensor], first: int, end: int) -> int:
        """Which of the captions ``first`` to ``end - 1`` of a chunk ``caption`` means, a fraction of 2^64; from 0."""
        weights = self.augmentation.caption
        if not isinstance(weights, Mapping):
            return caption * (end - first) >> 64
        if self.caption_names:
            names = [self.caption_names[name] for name in tensors["caption_name"][first:end].tolist()]
        else:
            names = [*map(str, range(end - first))]
        return weighted_choice([weights.get(name, 0) / names.count(name) for name in names], caption / 2**64)

    def _choose(self, draw: int | None) -> tuple[bool, int, bool]:
        """Whether a draw is mirrored, its caption as a fraction of 2^64, and whether the caption is dropped.

        By a hash of seed and draw: ten times faster than seeding a generator per draw.
        """
        how = self.augmentation
        if draw is None or (how.flip == how.caption_dropout == 0 and how.caption == "first"):
            return False, 0, False
        flip, caption, dropout = unpack("<3Q", blake2b(b"%d %d" % (how.seed, draw), digest_size=24).digest())
        return flip < how.flip * 2**64, caption if how.caption != "first" else 0, dropout < how.caption_dropout * 2**64

    def batch(self, draws: Sequence[PlannedSample | int], empty: Callable[..., Tensor] = torch.empty) -> dict[str, Any]:
        """The batch of these draws; located all at once, which takes half the time of one by one."""
        indices = np.array([draw.sample if isinstance(draw, PlannedSample) else draw for draw in draws])
        if indices.min() < 0 or indices.max() >= len(self):
            raise IndexError(indices)
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        samples = []
        for draw, shard, row in zip(draws, shards.tolist(), (indices - self.starts[shards]).tolist(), strict=True):
            try:
                raw = self.read(self.shards[shard][0], self._open(shard), row)
                samples.append(self.decode(raw, draw.number if isinstance(draw, PlannedSample) else None) | {"bad": []})
            except DecodeError:
                samples.append(self._next_good(draw))
        return self.collate(samples, empty)

    def chunked(self) -> Iterator[dict[str, StoredTensor]]:
        """The tensors of every chunk, in order; see :mod:`ldm.data.latent_schema`."""
        for number in range(len(self.shards)):
            shard = self._open(number)
            for chunk in range(len(shard.spans)):
                yield shard.tensors(chunk)

    @staticmethod
    def collate(samples: list[dict[str, Any]], empty: Callable[..., Tensor] = torch.empty) -> dict[str, Any]:
        """``mean``, ``std`` (B, C, h, w), ``text`` (B, L, D) padded with zeros, ``text_mask`` (B, L) int64: 0 for padding,
        and for a token the number of its text encoder, from 1.

        L is a multiple of 16. All are in the stored dtype, which halves the bytes to move; the training step converts to
        float32. And ``bad`` where present. The tensors are allocated by ``empty``.
        """
        texts, lengths = [sample["text"] for sample in samples], [len(sample["text"]) for sample in samples]
        arrays = {name: [sample[name] for sample in samples] for name in ("mean", "std") if name in samples[0]}
        if len(differing := {array.shape for array in arrays["mean"]}) > 1:
            found = ", ".join(f"{width} x {height}" for _, height, width in sorted(differing))
            raise LdmError(f"one batch holds latents of several sizes ({found}); export them with one image_size")
        tokens = len(samples), padded_length(max(lengths))
        shapes = {name: ((len(samples), *array[0].shape), _dtype(array)) for name, array in arrays.items()}
        read = [name for name in SIZES if name in samples[0]]
        sizes = {name: np.stack([sample[name] for sample in samples]) for name in read}
        shapes |= {name: (array.shape, torch.int32) for name, array in sizes.items()}
        shapes |= {"text": ((*tokens, texts[0].shape[1]), _dtype(texts)), "text_mask": (tokens, torch.int64)}
        batch: dict[str, Any] = allocate(shapes, empty)
        for name in arrays:
            for place, array in zip(batch[name].numpy(), arrays[name], strict=True):
                place[...] = array
        for name, array in sizes.items():
            batch[name].numpy()[...] = array
        batch["text"].zero_()
        for place, text, length in zip(batch["text"].numpy(), texts, lengths, strict=True):
            place[:length] = text
        batch["text_mask"].numpy()[...] = np.arange(tokens[1]) < np.array(lengths)[:, None]
        for place, sample, length in zip(batch["text_mask"].numpy(), samples, lengths, strict=True):
            if "text_mask" in sample:
                place[:length] = sample["text_mask"]
        return batch | {name: [sample[name] for sample in samples] for name in ("bad",) if name in samples[0]}


def _dtype(arrays: Sequence[np.ndarray]) -> torch.dtype:
    """float16 where all arrays have it, else float32."""
    return torch.float16 if all(array.dtype == np.float16 for array in arrays) else torch.float32


def allocate(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], empty: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Tensors of these shapes and dtypes in one block of memory: each block that a loader worker sends costs a third of a
    millisecond, whatever its size."""
    largest_first = sorted(shapes.items(), key=lambda item: -item[1][1].itemsize)  # so that all are aligned
    sizes = [prod(shape) * dtype.itemsize for _, (shape, dtype) in largest_first]
    parts = empty((sum(sizes),), dtype=torch.uint8).split(sizes)
    return {name: part.view(dtype).view(shape) for part, (name, (shape, dtype)) in zip(parts, largest_first, strict=True)}
