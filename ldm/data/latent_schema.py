"""Latent shards: the schema, the manifest's entries, writing, and reading.

A latent shard is an uncompressed tar of chunks. A chunk of n images of one size, with m captions, is two members::

    00000012.safetensors   mean           (n, C, h, w)  posterior mean, as the encoder gives it (not normalised)
                           std            (n, C, h, w)  posterior standard deviation; absent in an export of modes
                           mean_flip, std_flip          the same for the mirrored image, where exported
                           original_size  (n, 2) int32  height, width in pixels of the image that was packed, where its
                                                        .json tells, otherwise of the image in the image shard
                           crop           (n, 4) int32  top, left, height, width: what was encoded of the image in the shard
                           caption_start  (n + 1) int64  image i has the captions caption_start[i] to caption_start[i + 1] - 1
                           caption_name   (m,) int32    number of a caption's name in the manifest, where captions have names
                           text           (T, D)        the token embeddings of all captions, unpadded, one after another
                           text_start     (m + 1) int64 caption j is text[text_start[j] : text_start[j + 1]]
                           text_2, text_2_start, ...    the same for further text encoders
    00000012.json          {"keys": [a key for each image], "captions": [a list of captions for each image]}

The samples of a shard are in the order of the image shard, or, where images were assigned to buckets, ordered by size (as
:attr:`ldm.data.buckets.Buckets.table` is) and then as there.

Floats are float16 or float32. A caption's attention mask is all ones over its own tokens, hence not stored.
``manifest.json`` adds the entries named in :class:`LatentInfo`; ``null_text.safetensors`` beside it holds the encoded empty
caption (``text``, ``text_2``, ...), the null condition of training and sampling. Nothing but ``tarfile`` and ``safetensors``
is needed to read it.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from struct import error as StructError
from struct import unpack
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load, save
from typing_extensions import TypedDict

from ldm.data.buckets import Buckets
from ldm.data.decode import DecodeError
from ldm.data.moments import Moments
from ldm.data.shards import MAX_MEMBER_BYTES, ShardReader
from ldm.data.sources import ShardSource
from ldm.errors import LdmError, UsageError, first_line
from ldm.files import atomic_file, parse_json

NULL_TEXT_NAME = "null_text.safetensors"
EXPORT_AGAIN = "restore it, or export the latents again"
# entries that only manifests of several sizes, or of captions with names, have
OPTIONAL = ("buckets", "shard_shapes", "caption_names")
DTYPES = {"F16": np.dtype(np.float16), "F32": np.dtype(np.float32), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
MAX_HEADER_BYTES = 2**20  # of a chunk's safetensors, which holds a dozen tensors


_Side = Annotated[int, Field(ge=1, le=2**24)]


@dataclass(frozen=True)
class TextInfo:
    """One text encoder of an export.

    Attributes:
        name: ``minilm``, a hub name, or the name of the folder that it was loaded from.
        hash: sha256 of its weights, config and tokenizer.
        width: features per token.
        max_tokens: limit of a caption's tokens.
        cut: how many captions were truncated to it.
        folder: that it was loaded from, or its file of classes, relative to the manifest's; None: it was neither.
        settings: how its output is read, where that is not the default (:class:`ldm.models.text_encoder.TextEncoderConfig`).
    """

    name: str
    hash: str
    width: _Side
    max_tokens: _Side
    cut: int
    folder: str | None = None
    settings: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LatentInfo:
    """What the manifest of latent shards holds beside its list of shards; entries with a default are known after the export.

    Attributes:
        autoencoder: sha256 of the weights and architecture of the autoencoder that made the latents.
        text_encoders: those that the captions went through, in the order of ``text``, ``text_2``, ...
        latent_shapes: (C, h, w) of every size that occurs, the most frequent first.
        resolution: side in pixels that images were resized to; None: to those of ``buckets``, or each at its own size,
            cropped to a multiple of the autoencoder's downsampling factor.
        posterior: "gaussian" (mean and std) or "mode" (the mean alone).
        flips: whether the latents of mirrored images are stored too.
        captions: "first" or "all" of an image's captions, or "none": the empty one, for unconditional models.
        caption_names: of the captions, where those of these names are stored; entries of older manifests lack it.
        dtype: of the stored floats.
        precision: of the networks' computation.
        latents_mean, latents_std: per channel over the whole set, in expectation over the posterior; C numbers each.
        source: hash of the image shards' manifest.
        source_shards: where those were: a URL, or a path relative to the manifest's folder.
        versions: of the libraries used.
        null_text: sha256 of the file of the encoded empty caption; None in older manifests.
        buckets: that images were assigned to.
        shard_shapes: the shapes of the samples of each shard in order, as runs (place in ``latent_shapes``, samples). Empty
            where all samples have one shape, and in older manifests.
    """

    autoencoder: str
    text_encoders: tuple[TextInfo, ...] = ()
    latent_shapes: tuple[tuple[_Side, _Side, _Side], ...] = ()
    resolution: _Side | None
    posterior: Literal["gaussian", "mode"]
    flips: bool
    captions: Literal["first", "all", "none"]
    caption_names: tuple[str, ...] = ()
    dtype: Literal["float16", "float32"]
    precision: str
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[Annotated[float, Field(ge=0)], ...] = ()
    source: str
    source_shards: str
    versions: dict[str, str]
    null_text: str | None = None
    buckets: Buckets | None = None
    shard_shapes: dict[str, tuple[tuple[Annotated[int, Field(ge=0)], _Side], ...]] = field(default_factory=dict)

    def as_extra(self) -> dict[str, Any]:
        """The manifest's entries, and a fingerprint of those that training computes with."""
        extra = {name: value for name, value in asdict(self).items() if value or name not in OPTIONAL}
        for text in extra["text_encoders"]:
            if not text["settings"]:  # as manifests were before there were any
                del text["settings"]
        if self.buckets is not None and self.buckets.max_crop is None:  # as manifests were before
            del extra["buckets"]["max_crop"]
        return extra | {"fingerprint": self.fingerprint}

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of all that a training takes from the manifest: whoever changes one of these numbers is found out."""
        texts = [text.hash for text in self.text_encoders]
        taken = [
            self.autoencoder,
            texts,
            self.latent_shapes,
            self.posterior,
            self.latents_mean,
            self.latents_std,
            self.null_text,
            *([sorted(self.shard_shapes.items())] if self.shard_shapes else []),
            *([self.caption_names] if self.caption_names else []),
        ]
        return hashlib.sha256(json.dumps(taken).encode()).hexdigest()

    @property
    def latent_shape(self) -> tuple[int, int, int] | None:
        """(C, h, w), or None where there are several sizes."""
        return self.latent_shapes[0] if len(self.latent_shapes) == 1 else None


def path_of(source: ShardSource, place: str) -> str:
    """Where the relative path in a source's manifest leads; another one, of older manifests, stays as it is."""
    found = os.path.join(os.path.dirname(source.beside), place)
    return os.path.realpath(found) if "://" not in found and os.path.lexists(found) else place


def text_name(encoder: int) -> str:
    """Name of the embeddings of text encoder number ``encoder`` (from 0) in a chunk and in the null text."""
    return "text" if encoder == 0 else f"text_{encoder + 1}"


def write_null_text(folder: str | Path, texts: Sequence[np.ndarray]) -> str:
    """Write the encoded empty caption, (L, D) for each text encoder, beside the manifest; returns its hex sha256."""
    data = save({text_name(encoder): np.ascontiguousarray(text) for encoder, text in enumerate(texts)})
    with atomic_file(Path(folder) / NULL_TEXT_NAME) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def read_null_text(source: ShardSource, encoder: int = 0) -> np.ndarray:
    """The empty caption encoded by text encoder number ``encoder``, (L, D) float32. Raises LdmError where it is broken."""
    info, name = latent_info(source), text_name(encoder)
    try:
        data = source.read(NULL_TEXT_NAME)
        if info.null_text not in (None, hashlib.sha256(data).hexdigest()):
            raise DecodeError("has other bytes than the manifest's sha256")
        texts = load(data)
        if name not in texts:
            raise DecodeError(f"is without {name}, which the manifest promises")
        text, width = texts[name].astype(np.float32), info.text_encoders[encoder].width
        if text.ndim != 2 or not len(text) or text.shape[1] != width:
            raise DecodeError(f"has {name} of {' x '.join(map(str, text.shape))}, the manifest says {width} a token")
        if not np.isfinite(text).all():
            raise DecodeError(f"has values in {name} that are not finite")
    except DecodeError as error:
        raise LdmError(f"{NULL_TEXT_NAME} of {source.spec} {error}; {EXPORT_AGAIN}") from None
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise LdmError(f"{NULL_TEXT_NAME} of {source.spec} cannot be read ({first_line(error)}); {EXPORT_AGAIN}") from None
    return text


@dataclass
class Chunk:
    """Latents of one size and all data of their images; the names are those of the schema above.

    Attributes:
        keys: n.
        captions: n lists, m captions in all.
        latents: ``mean``, and ``std``, ``mean_flip``, ``std_flip`` where stored, (n, C, h, w) each.
        texts: for each text encoder the embeddings of the m captions, (L_j, D).
        original_size: (n, 2).
        crop: (n, 4).
        caption_names: m numbers of names; None where captions have none.
    """

    keys: list[str]
    captions: list[list[str]]
    latents: dict[str, np.ndarray]
    texts: list[list[np.ndarray]]
    original_size: np.ndarray
    crop: np.ndarray
    caption_names: list[int] | None = None

    def members(self) -> dict[str, bytes]:
        """Its two members, by extension."""
        tensors = {name: np.ascontiguousarray(latents) for name, latents in self.latents.items()}
        tensors |= {name: np.asarray(getattr(self, name), np.int32) for name in ("original_size", "crop")}
        tensors["caption_start"] = _starts(self.captions)
        if self.caption_names is not None:
            tensors["caption_name"] = np.array(self.caption_names, np.int32)
        for encoder, texts in enumerate(self.texts):
            tensors |= {text_name(encoder): np.concatenate(texts), f"{text_name(encoder)}_start": _starts(texts)}
        words = json.dumps({"keys": self.keys, "captions": self.captions}, ensure_ascii=False)
        return {"safetensors": save(tensors), "json": words.encode()}

    def moments(self) -> Moments:
        """Moments of latents sampled from the posteriors, per channel; mirrored ones are not counted."""
        return Moments.of(self.latents["mean"], self.latents.get("std"))


def _starts(parts: Sequence[Any]) -> np.ndarray:
    """Start offsets of the concatenated parts, and the end of the last."""
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)


class StoredTensor:
    """A tensor in a file: its rows are read when it is indexed by one of them or by a slice, or converted to an array."""

    def __init__(self, read: Callable[[int, int], bytes], offset: int, dtype: np.dtype, shape: tuple[int, ...]):
        """``read`` returns so many bytes from an offset on."""
        self.dtype, self.shape = dtype, shape
        self._read, self._offset, self._row_bytes = read, offset, prod(shape[1:]) * dtype.itemsize
        self._kept: np.ndarray | None = None

    @property
    def place(self) -> tuple[int, np.dtype, tuple[int, ...]]:
        """Its offset in the file, dtype and shape."""
        return self._offset, self.dtype, self.shape

    def keep(self) -> None:
        """Read it now, once for all."""
        self._kept = self[:]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        if self._kept is not None:
            return self._kept[rows]
        if isinstance(rows, int):
            first = range(len(self))[rows]
            return self[first : first + 1][0]
        start, stop, step = rows.indices(len(self))
        assert step == 1, "consecutive rows only"
        count = max(stop - start, 0)
        data = self._read(self._offset + start * self._row_bytes, count * self._row_bytes)
        return np.ndarray((count, *self.shape[1:]), self.dtype, data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def tensors_in(read: Callable[[int, int], bytes], offset: int, size: int) -> dict[str, StoredTensor]:
    """The tensors of the safetensors file of ``size`` bytes at ``offset`` of what ``read`` reads.

    The format: 8 bytes little-endian header length, a JSON header with dtype, shape and offsets, the data.
    Raises :class:`DecodeError` for anything else.
    """
    try:
        (header_size,) = unpack("<Q", read(offset, 8) if size >= 8 else b"")
        if header_size > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"a header of {header_size} bytes")
        start, header = offset + 8 + header_size, json.loads(read(offset + 8, header_size))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                (first, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], tuple(entry["shape"])
                if not all(type(number) is int and number >= 0 for number in (first, end, *shape)):
                    raise ValueError(f"{name} has numbers below 0")
                if end - first != prod(shape) * dtype.itemsize or start + end > offset + size:
                    raise ValueError(f"{name} does not fit its place")
                found[name] = StoredTensor(read, start + first, dtype, shape)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, StructError) as error:
        raise DecodeError(f"is in a chunk that is no safetensors of latents ({error})") from None
    return found


def _are_starts(starts: np.ndarray, parts: int | None, end: int) -> bool:
    """Whether these are the start offsets of so many concatenated parts (None: any number) that end at ``end``."""
    right = starts.ndim == 1 and len(starts) == (len(starts) if parts is None else parts + 1)
    return right and starts[0] == 0 and starts[-1] == end and bool((np.diff(starts) >= 0).all())


class Metadata(TypedDict):
    """The ``.json`` of a chunk."""

    keys: list[str]
    captions: list[list[str]]


class LatentShard:
    """The chunks of one latent shard, read when they are used.

    Nothing is mapped into memory: of a mapped file that is truncated while it is used, the next access ends the process. A file
    that was replaced or overwritten since it was opened is compared with what it was, by its headers.
    """

    def __init__(self, path: Path, samples: int):
        """Raises :class:`LdmError` unless the shard is complete and holds so many ``samples``."""
        self.path, self.samples = path, samples
        self.reader = ShardReader(path, ("json", "safetensors"))
        if self.reader.damage:
            raise LdmError(f"{path} {self.reader.damage}; export again")
        self._stamp = self.reader.stamp()
        self.spans = [self.reader.spans(index) for index in range(len(self.reader))]
        self._tensors: dict[int, dict[str, StoredTensor]] = {}
        self.starts = [0, *accumulate(len(self._open(chunk)["mean"]) for chunk in range(len(self.spans)))]
        if self.starts[-1] != samples:
            raise LdmError(f"{path} holds {self.starts[-1]} latents, its manifest says {samples}; export again")

    def reopen(self, path: Path) -> None:
        """Open it again, perhaps at another path (a cache). Raises :class:`LdmError` where it is missing or another shard."""
        self.path = path
        self.reader.reopen(path)
        self._require_unchanged()

    def close(self) -> None:
        """Close the file; the index is kept."""
        self.reader.close()

    def _require_unchanged(self) -> None:
        if (stamp := self.reader.stamp()) == self._stamp:
            return
        try:
            now = LatentShard(self.path, self.samples)
        except DecodeError as error:
            raise LdmError(f"{self.path} changed while it was used: a sample {error}; restore it") from None
        now.close()
        if now._layout() != self._layout():
            raise LdmError(f"{self.path} changed while it was used: it holds other samples now; restore it")
        self._stamp = stamp

    def _layout(self) -> list[Any]:
        """Where everything is in the file."""
        return [self.spans, [{name: tensor.place for name, tensor in self._open(n).items()} for n in range(len(self.spans))]]

    def tensors(self, chunk: int) -> dict[str, StoredTensor]:
        """The tensors of chunk number ``chunk``; see the schema above. Raises :class:`DecodeError` where it is broken, and
        :class:`LdmError` where the file is no longer what was opened."""
        self._require_unchanged()
        return self._open(chunk)

    def _open(self, chunk: int) -> dict[str, StoredTensor]:
        if chunk not in self._tensors:
            tensors = tensors_in(self.reader.read, *self._span(chunk, "safetensors"))
            try:
                for name in tensors:
                    if name.endswith("_start"):
                        tensors[name].keep()
                shape, captions = tensors["mean"].shape, int(tensors["caption_start"][-1:].item())
                whole = len(shape) == 4 and _are_starts(tensors["caption_start"][:], shape[0], captions)
                for name in tensors.keys() & {"std", "mean_flip", "std_flip"}:
                    whole &= tensors[name].shape == shape
                whole &= tensors["original_size"].shape == (shape[0], 2) and tensors["crop"].shape == (shape[0], 4)
                whole &= "caption_name" not in tensors or tensors["caption_name"].shape == (captions,)
                for name in tensors:
                    if name.startswith("text") and not name.endswith("_start"):
                        whole &= _are_starts(tensors[f"{name}_start"][:], captions, len(tensors[name]))
                        whole &= len(tensors[name].shape) == 2
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise DecodeError(f"is in a chunk whose tensors are not those of latents ({error})") from None
            if not whole:
                raise DecodeError("is in a chunk whose tensors disagree about its samples")
            self._tensors[chunk] = tensors
        return self._tensors[chunk]

    def metadata(self, chunk: int) -> Metadata:
        """``keys`` and ``captions`` of a chunk. Raises :class:`DecodeError` where they are broken."""
        self._require_unchanged()
        offset, size = self._span(chunk, "json")
        if size > MAX_MEMBER_BYTES:
            raise DecodeError(f"is in a chunk with keys and captions of {size} bytes, the limit is {MAX_MEMBER_BYTES}")
        try:
            metadata = parse_json(self.reader.read(offset, size), "", Metadata)
        except LdmError as error:
            raise DecodeError(f"is in a chunk without its keys and captions ({str(error).removeprefix(': ')})") from None
        counts = [len(captions) for captions in metadata["captions"]]
        if len(metadata["keys"]) != len(counts) or counts != np.diff(self._open(chunk)["caption_start"]).tolist():
            raise DecodeError("is in a chunk without its keys and captions: their numbers disagree")
        return metadata

    def _span(self, chunk: int, extension: str) -> tuple[int, int]:
        """Offset and size in bytes of one of a chunk's two members."""
        if extension not in self.spans[chunk]:
            raise DecodeError(f"is in a chunk without its .{extension}")
        return self.spans[chunk][extension]

    def locate(self, row: int) -> tuple[int, int]:
        """The chunk that holds sample ``row`` of the shard, and its row there."""
        chunk = bisect_right(self.starts, row) - 1
        return chunk, row - self.starts[chunk]


def latent_info(source: ShardSource) -> LatentInfo:
    """The latent entries of a source's manifest. Raises LdmError for values that no export writes, or changed since."""
    extra, manifest = source.manifest.extra, f"the manifest of {source.spec}"
    optional = ("null_text", *OPTIONAL)
    if lacking := [name for name in LatentInfo.__dataclass_fields__ if name not in extra and name not in optional]:
        raise UsageError(f"{manifest} lacks {lacking[0]!r}; export again: ldm latents export")
    info = parse_json(json.dumps(extra).encode(), manifest, LatentInfo)
    if {len(info.latents_mean), len(info.latents_std), *(shape[0] for shape in info.latent_shapes)} != {len(info.latents_mean)}:
        raise LdmError(f"{manifest} has statistics of another number of channels than the latents; {EXPORT_AGAIN}")
    if extra.get("fingerprint") not in (None, info.fingerprint):  # manifests had none at first
        raise LdmError(f"{manifest} was changed after the export: its statistics or hashes are others; {EXPORT_AGAIN}")
    for entry in source.manifest.shards if info.shard_shapes else ():
        runs = info.shard_shapes.get(entry.name, ())
        if sum(count for _, count in runs) != entry.samples or any(shape >= len(info.latent_shapes) for shape, _ in runs):
            raise LdmError(f"{manifest} does not say which size each sample of {entry.name} has; {EXPORT_AGAIN}")
    return info


def common_info(sources: Sequence[ShardSource]) -> LatentInfo:
    """Several latent sources as one: the same autoencoder, all their sizes, statistics over all samples.

    Raises :class:`UsageError` naming both where two do not match; so do sets of one size each, but for those of buckets.
    """
    infos = [latent_info(source) for source in sources]
    first = infos[0]
    vary = any(info.shard_shapes or info.buckets is not None for info in infos)
    for source, info in zip(sources, infos, strict=True):
        for what, theirs, ours in (
            ("autoencoder", info.autoencoder, first.autoencoder),
            ("text encoders", [text.hash for text in info.text_encoders], [text.hash for text in first.text_encoders]),
            ("latent shape", info.latent_shapes, first.latent_shapes),
            ("resolution", info.resolution, first.resolution),
            ("posterior", info.posterior, first.posterior),
            ("names of captions", info.caption_names, first.caption_names),
        ):
            if theirs != ours and not (vary and what in ("latent shape", "resolution")):
                raise UsageError(
                    f"{source.spec} has another {what} than {sources[0].spec} ({_short(theirs)}, {_short(ours)}); "
                    "export both with the same"
                )
    if len(sources) == 1:  # exact to the last bit
        return first
    shapes = tuple(dict.fromkeys(shape for info in infos for shape in info.latent_shapes))
    counts = [  # as many values count alike
        sum(prod(shape[1:]) * count for shape, count in _runs(source, info)) if vary else source.manifest.samples
        for source, info in zip(sources, infos, strict=True)
    ]
    every = Moments.merge(
        Moments.from_statistics(count, info.latents_mean, info.latents_std) for count, info in zip(counts, infos, strict=True)
    )
    statistics = {"latents_mean": tuple(every.mean.tolist()), "latents_std": tuple(every.std.tolist())}
    return replace(first, latent_shapes=shapes, shard_shapes={}, **statistics)


def sample_shapes(sources: Sequence[ShardSource]) -> np.ndarray | None:
    """The place of each sample's shape in the ``latent_shapes`` of :func:`common_info`, int32 (N,); None where all have one.

    From the manifests alone: no shard is opened.

    Raises :class:`UsageError` for a set of several shapes whose older manifest does not say which sample has which.
    """
    shapes = common_info(sources).latent_shapes
    if len(shapes) == 1:
        return None
    runs = [run for source in sources for run in _runs(source, latent_info(source))]
    return np.repeat(np.array([shapes.index(shape) for shape, _ in runs], np.int32), [count for _, count in runs])


def _runs(source: ShardSource, info: LatentInfo) -> Iterator[tuple[tuple[int, int, int], int]]:
    """The shapes of all samples in order, as (shape, samples)."""
    if len(info.latent_shapes) > 1 and not info.shard_shapes:
        raise UsageError(
            f"{source.spec} holds latents of several sizes, and its older manifest does not say which are where; export again: "
            "ldm latents export"
        )
    for entry in source.manifest.shards:
        for place, count in info.shard_shapes.get(entry.name, ((0, entry.samples),)):
            yield info.latent_shapes[place], count


def _short(value: Any) -> str:
    """A hash, or several, shortened for messages."""
    if isinstance(value, list):
        return " + ".join(map(_short, value))
    return value[:12] if isinstance(value, str) else str(value)
