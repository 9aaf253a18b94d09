"""Latent shards: the schema, writing and memory-mapped reading.

A latent shard is an uncompressed tar of chunks. A chunk of n samples is two members::

    00000012.safetensors   mean        (n, C, h, w)  posterior mean, as the encoder gives it (not normalised)
                           std         (n, C, h, w)  posterior standard deviation
                           text        (T, D)        the token embeddings of all captions, unpadded, one after another
                           text_start  (n + 1,)      int64; caption i is text[text_start[i] : text_start[i + 1]]
    00000012.json          {"keys": [...], "captions": [...]}

``manifest.json`` adds ``extra`` entries named in :class:`LatentInfo`; ``null_text.safetensors`` beside it holds the encoded
empty caption (``text``), the null condition of training and sampling. Floats are float16 or float32.
Nothing but ``tarfile`` and ``safetensors`` is needed to read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from ldm.data.decode import DecodeError
from ldm.data.images import NOTHING_RANDOM, Augmentation
from ldm.data.manifest import LATENT_SHARDS, Manifest, ShardEntry
from ldm.data.samples import ShardSamples
from ldm.data.shards import ShardReader
from ldm.data.sources import ShardSource, open_source
from ldm.data.writer import ShardWriter
from ldm.errors import LdmError, UsageError
from ldm.files import atomic_file

NULL_TEXT_NAME = "null_text.safetensors"
DTYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64}


@dataclass(frozen=True)
class LatentInfo:
    """What the manifest of latent shards knows beyond its shards.

    Attributes:
        autoencoder: sha256 of the weights and architecture of the autoencoder that made the latents.
        text_encoder: the name it was loaded by.
        text_encoder_hash: sha256 of its weights.
        text_width: features per token.
        latent_shape: (C, h, w).
        dtype: of the stored floats.
        latents_mean: per channel over the whole set, in expectation over the posterior; C numbers.
        latents_std: likewise.
        source: hash of the image shards' manifest.
    """

    autoencoder: str
    text_encoder: str
    text_encoder_hash: str
    text_width: int
    latent_shape: tuple[int, int, int]
    dtype: str
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    source: str

    @classmethod
    def of(cls, manifest: Manifest) -> LatentInfo:
        """Read it back from a manifest."""
        return cls(**{name: manifest.extra[name] for name in cls.__dataclass_fields__})

    def as_extra(self) -> dict[str, Any]:
        """What goes into the manifest."""
        return asdict(self)


def write_null_text(folder: str | Path, text: np.ndarray) -> None:
    """Keep the encoded empty caption, (L, D), beside the manifest."""
    with atomic_file(Path(folder) / NULL_TEXT_NAME) as file:
        file.write(save({"text": np.ascontiguousarray(text)}))


def read_null_text(source: ShardSource) -> np.ndarray:
    """The encoded empty caption, (L, D) float32."""
    return load(source.read(NULL_TEXT_NAME))["text"].astype(np.float32)


def write_chunk(
    writer: ShardWriter,
    name: str,
    mean: np.ndarray,
    std: np.ndarray,
    texts: list[np.ndarray],
    keys: list[str],
    captions: list[str],
) -> None:
    """Append one chunk; ``texts`` are (L_i, D), the others as in the schema above."""
    lengths = [len(text) for text in texts]
    tensors = {
        "mean": np.ascontiguousarray(mean),
        "std": np.ascontiguousarray(std),
        "text": np.concatenate(texts),
        "text_start": np.cumsum([0, *lengths], dtype=np.int64),
    }
    members = {"safetensors": save(tensors), "json": json.dumps({"keys": keys, "captions": captions}).encode()}
    writer.write(name, members)


def tensors_in(data: np.ndarray) -> dict[str, np.ndarray]:
    """Read-only views of the tensors in the bytes of a safetensors file, uint8 (n,); nothing is copied.

    The format: 8 bytes little-endian header length, a JSON header with dtype, shape and offsets, the data.
    Raises :class:`DecodeError` where the bytes are none.
    """
    try:
        header_size = int(data[:8].view("<u8")[0])
        header = json.loads(bytes(data[8 : 8 + header_size]))
        views = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (8 + header_size + position for position in entry["data_offsets"])
                views[name] = data[start:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise DecodeError(f"is in a chunk that is no safetensors of latents ({error})") from None
    return views


class LatentShard:
    """The chunks of one latent shard, its file mapped into memory."""

    def __init__(self, path: Path, samples: int):
        """Raises :class:`LdmError` unless the shard is whole and holds so many ``samples``."""
        with ShardReader(path, ("json", "safetensors")) as reader:
            if reader.damage:
                raise LdmError(f"{path} {reader.damage}; export again")
            self.spans = [reader.spans(index) for index in range(len(reader))]
        self.reopen(path)
        self.starts = np.cumsum([0] + [len(self.tensors(chunk)["text_start"]) - 1 for chunk in range(len(self.spans))])
        if self.starts[-1] != samples:
            raise LdmError(f"{path} holds {self.starts[-1]} latents, its manifest says {samples}; export again")

    def reopen(self, path: Path) -> None:
        self.path = path
        try:
            self.data = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise LdmError(f"{path} cannot be read ({error.strerror}); restore it") from None
        self._mapped: dict[int, dict[str, np.ndarray]] = {}

    def close(self) -> None:
        del self.data, self._mapped

    def tensors(self, chunk: int) -> dict[str, np.ndarray]:
        """What chunk number ``chunk`` holds; see the schema above. Raises :class:`DecodeError` where it is broken."""
        if chunk not in self._mapped:
            tensors = tensors_in(self._member(chunk, "safetensors"))
            try:
                starts, text = tensors["text_start"], tensors["text"]
                samples = {len(tensors["mean"]), len(tensors["std"]), len(starts) - 1}
                whole = len(samples) == 1 and starts[0] == 0 and starts[-1] == len(text) and (np.diff(starts) >= 0).all()
            except (KeyError, TypeError, IndexError) as error:
                raise DecodeError(f"is in a chunk whose tensors are not those of latents ({error})") from None
            if not whole:
                raise DecodeError("is in a chunk whose tensors disagree about its samples")
            self._mapped[chunk] = tensors
        return self._mapped[chunk]

    def words(self, chunk: int) -> dict[str, list[str]]:
        """``keys`` and ``captions`` of a chunk. Raises :class:`DecodeError` where they are broken."""
        try:
            words = json.loads(bytes(self._member(chunk, "json")))
            samples = {len(words["keys"]), len(words["captions"]), len(self.tensors(chunk)["mean"])}
        except (ValueError, KeyError, TypeError, RecursionError):
            samples = set()
        if len(samples) != 1:
            raise DecodeError("is in a chunk without its keys and captions")
        return words

    def _member(self, chunk: int, extension: str) -> np.ndarray:
        """The bytes of one of a chunk's two members, uint8 (n,)."""
        if extension not in self.spans[chunk]:
            raise DecodeError(f"is in a chunk without its .{extension}")
        offset, size = self.spans[chunk][extension]
        return self.data[offset : offset + size]

    def locate(self, row: int) -> tuple[int, int]:
        """The chunk that holds sample ``row`` of the shard, and its row there."""
        chunk = int(np.searchsorted(self.starts, row, side="right")) - 1
        return chunk, row - int(self.starts[chunk])


def read_texts(path: str | Path, samples: int) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Captions and their embeddings (L_i, D), chunk by chunk, from one shard of so many samples."""
    shard = LatentShard(Path(path), samples)
    for chunk in range(len(shard.spans)):
        tensors = shard.tensors(chunk)
        texts = np.split(np.array(tensors["text"]), tensors["text_start"][1:-1])
        yield shard.words(chunk)["captions"], texts


class LatentDataset(ShardSamples[LatentShard]):
    """Latents by sample number, in the order of the manifest."""

    format = LATENT_SHARDS

    def __init__(
        self,
        sources: str | Path | ShardSource | Sequence[ShardSource],
        augmentation: Augmentation = NOTHING_RANDOM,
        null_text: np.ndarray | None = None,
    ):
        """
        Args:
            sources: a folder of latent shards with its manifest, or opened sources.
            augmentation: its ``caption_dropout``; the rest was settled when the latents were exported.
            null_text: the encoded empty caption, (L, D): what a dropped caption becomes.
        """
        super().__init__(sources)
        self.augmentation, self.null_text = augmentation, null_text

    def open_shard(self, path: Path, entry: ShardEntry) -> LatentShard:
        return LatentShard(path, entry.samples)

    def key(self, shard: LatentShard, row: int) -> str:
        chunk, row = shard.locate(row)
        return shard.words(chunk)["keys"][row]

    def read(self, source: ShardSource, shard: LatentShard, row: int) -> dict[str, np.ndarray]:
        """``mean`` and ``std`` (C, h, w), ``text`` (L, D): views of the mapped file."""
        chunk, row = shard.locate(row)
        tensors = shard.tensors(chunk)
        start, stop = tensors["text_start"][row : row + 2]
        return {"mean": tensors["mean"][row], "std": tensors["std"][row], "text": tensors["text"][start:stop]}

    def decode(self, raw: dict[str, np.ndarray], draw: int | None, out: np.ndarray | None = None) -> dict[str, Any]:
        """The same, the caption dropped now and then; nothing is written to ``out``."""
        random = self.augmentation.random(draw)
        if random is not None and random.random() < self.augmentation.caption_dropout:
            return raw | {"text": self.null_text}
        return raw

    def chunked(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Mean and std of every sample, chunk by chunk: (n, C, h, w) float64 each."""
        for number in range(len(self.shards)):
            shard = self._open(number)
            for chunk in range(len(shard.spans)):
                tensors = shard.tensors(chunk)
                yield tensors["mean"].astype(np.float64), tensors["std"].astype(np.float64)

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """``mean``, ``std`` (B, C, h, w), ``text`` (B, L, D) padded with zeros, ``text_mask`` (B, L) int64; float32.

        And ``bad`` where the loader asked for it.
        """
        lengths = [len(sample["text"]) for sample in samples]
        text = np.zeros((len(samples), max(lengths), samples[0]["text"].shape[1]), np.float32)
        mask = np.zeros((len(samples), max(lengths)), np.int64)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            text[row, :length] = sample["text"]
            mask[row, :length] = 1
        stacked = {name: np.stack([sample[name] for sample in samples]).astype(np.float32) for name in ("mean", "std")}
        batch: dict[str, Any] = {
            name: torch.from_numpy(array) for name, array in (stacked | {"text": text, "text_mask": mask}).items()
        }
        return batch | {name: [sample[name] for sample in samples] for name in ("bad",) if name in samples[0]}


def latent_info(source: ShardSource) -> LatentInfo:
    """What the manifest of a latent source knows."""
    try:
        return LatentInfo.of(source.manifest)
    except KeyError as error:
        raise UsageError(f"the manifest of {source.spec} lacks {error}; export again: ldm latents export") from None


def common_info(sources: Sequence[ShardSource]) -> LatentInfo:
    """What several latent sources know together: one autoencoder, one text encoder, one shape, statistics over all samples.

    Raises :class:`UsageError` naming both where two do not go together.
    """
    infos = [latent_info(source) for source in sources]
    first = infos[0]
    for source, info in zip(sources, infos, strict=True):
        for name in ("autoencoder", "text_encoder_hash", "latent_shape"):
            if getattr(info, name) != getattr(first, name):
                raise UsageError(
                    f"{source.spec} has another {name} than {sources[0].spec} ({getattr(info, name)}, {getattr(first, name)}); "
                    "export both with the same"
                )
    counts = np.array([source.manifest.samples for source in sources], np.float64)
    share = (counts / counts.sum())[:, None]
    means, stds = (np.array([getattr(info, name) for info in infos]) for name in ("latents_mean", "latents_std"))  # (n, C)
    mean = (share * means).sum(0)
    # the variance within the sources and that between them
    std = np.sqrt((share * (stds**2 + (means - mean) ** 2)).sum(0))
    if len(sources) == 1:  # to the last bit
        return first
    return replace(first, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))


def latent_manifest(folder: str | Path) -> tuple[Manifest, LatentInfo]:
    """The manifest of a latent folder and what it knows."""
    source = open_source(folder, LATENT_SHARDS)
    return source.manifest, latent_info(source)
