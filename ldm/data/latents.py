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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.manifest import LATENT_SHARDS, Manifest
from ldm.data.shards import ShardReader, ShardWriter
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


def read_null_text(folder: str | Path) -> Tensor:
    """The encoded empty caption, (L, D) float32."""
    path = Path(folder) / NULL_TEXT_NAME
    if not path.is_file():
        raise LdmError(f"{path} does not exist; export the latents again: ldm latents export")
    return torch.from_numpy(load_file(path)["text"].astype(np.float32))


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


def map_tensors(path: str | Path, offset: int, size: int) -> dict[str, np.ndarray]:
    """Read-only views of the tensors in a safetensors file that lies inside ``path``; nothing is copied.

    The format: 8 bytes little-endian header length, a JSON header with dtype, shape and offsets, the data.
    """
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(size,))
    header_size = int(data[:8].view("<u8")[0])
    try:
        header = json.loads(bytes(data[8 : 8 + header_size]))
        views = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (8 + header_size + position for position in entry["data_offsets"])
                views[name] = data[start:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise LdmError(f"{path}: the chunk at byte {offset} is no safetensors of latents ({error}); export again") from None
    return views


def read_texts(path: str | Path) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Captions and their embeddings (L_i, D), chunk by chunk, from one shard."""
    reader = ShardReader(path, ("json", "safetensors"))
    for index, words in enumerate(ShardReader(path, ("json",))):
        tensors = map_tensors(path, *reader.spans(index)["safetensors"])
        texts = np.split(np.array(tensors["text"]), tensors["text_start"][1:-1])
        yield json.loads(words.files["json"])["captions"], texts


class LatentDataset(Dataset):
    """Latents by sample number, in the order of the manifest."""

    def __init__(self, folder: str | Path, manifest: Manifest | None = None):
        """
        Args:
            folder: latent shards.
            manifest: of them, where it is not written yet.
        """
        self.folder = Path(folder)
        manifest = manifest or Manifest.load(self.folder, LATENT_SHARDS)
        manifest.check_cheap(self.folder)
        self.chunks: list[tuple[Path, int, int]] = []  # path, offset, size
        starts = [0]
        for shard in manifest.shards:
            reader = ShardReader(self.folder / shard.name)
            for index in range(len(reader)):
                offset, size = reader.spans(index)["safetensors"]
                self.chunks.append((reader.path, offset, size))
                starts.append(starts[-1] + len(self._tensors(len(self.chunks) - 1)["text_start"]) - 1)
        self.starts = np.array(starts)  # first sample of each chunk, and the total
        if self.starts[-1] != manifest.samples:
            raise LdmError(f"{self.folder} holds {self.starts[-1]} latents, its manifest says {manifest.samples}; export again")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _tensors(self, chunk: int) -> dict[str, np.ndarray]:
        # Kept per process once mapped: a mapping costs address space, not memory.
        cache = self.__dict__.setdefault("_mapped", {})
        if chunk not in cache:
            cache[chunk] = map_tensors(*self.chunks[chunk])
        return cache[chunk]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_mapped"}

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """``mean`` and ``std`` (C, h, w), ``text`` (L, D)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = index - int(self.starts[chunk])
        tensors = self._tensors(chunk)
        start, stop = tensors["text_start"][row : row + 2]
        return {"mean": tensors["mean"][row], "std": tensors["std"][row], "text": tensors["text"][start:stop]}

    def chunked(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Mean and std of every sample, chunk by chunk: (n, C, h, w) float64 each."""
        for chunk in range(len(self.chunks)):
            tensors = self._tensors(chunk)
            yield tensors["mean"].astype(np.float64), tensors["std"].astype(np.float64)

    @staticmethod
    def collate(samples: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        """``mean``, ``std`` (B, C, h, w), ``text`` (B, L, D) padded with zeros, ``text_mask`` (B, L) int64; float32."""
        lengths = [len(sample["text"]) for sample in samples]
        text = np.zeros((len(samples), max(lengths), samples[0]["text"].shape[1]), np.float32)
        mask = np.zeros((len(samples), max(lengths)), np.int64)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            text[row, :length] = sample["text"]
            mask[row, :length] = 1
        stacked = {name: np.stack([sample[name] for sample in samples]).astype(np.float32) for name in ("mean", "std")}
        batch = stacked | {"text": text, "text_mask": mask}
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def latent_manifest(folder: str | Path) -> tuple[Manifest, LatentInfo]:
    """The manifest of a latent folder and what it knows."""
    manifest = Manifest.load(folder, LATENT_SHARDS)
    try:
        return manifest, LatentInfo.of(manifest)
    except KeyError as error:
        raise UsageError(f"{Path(folder) / 'manifest.json'} lacks {error}; export again: ldm latents export") from None
