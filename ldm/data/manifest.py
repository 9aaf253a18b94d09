"""What a shard directory holds (``manifest.json``), and proof that it still does."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from ldm.data.shards import KeyDot
from ldm.errors import LdmError, UsageError
from ldm.files import atomic_file, parse_json, read_bytes, require_folder, require_version, write_json

MANIFEST_NAME = "manifest.json"
SIZES_NAME = "sizes.npy"  # beside the manifest of image shards
PACK_JOURNAL_NAME = ".pack.jsonl"  # there while a folder is being packed
IMAGE_SHARDS = "ldm-image-shards"
LATENT_SHARDS = "ldm-latent-shards"
VERSION = 1

MAX_MANIFEST_BYTES = 2**28  # a million shards
MAX_SHARD_BYTES = 2**40
# numbers of samples are permuted in memory; a shard has thousands
MAX_SHARD_SAMPLES = 2**24

_FIXES = {IMAGE_SHARDS: "run `ldm shards index {folder}`", LATENT_SHARDS: "run `ldm latents export` again"}
_Bytes = bytes  # which is the name of a field below
_RESERVED = ("format", "version", "shards", "samples", "bytes")


def _plain_name(name: str) -> str:
    """A manifest may come from elsewhere: its names must stay inside the folder."""
    if os.path.basename(name) != name or not name.endswith(".tar") or "\0" in name or len(name.encode()) > 255:
        raise ValueError("must be the plain name of a .tar file")
    return name


@dataclass(frozen=True)
class ShardEntry:
    """One tar: its file name in the folder, how many samples it holds, its size in bytes, its hex sha256."""

    name: Annotated[str, AfterValidator(_plain_name)]
    samples: Annotated[int, Field(ge=0, le=MAX_SHARD_SAMPLES)]
    bytes: Annotated[int, Field(ge=0, le=MAX_SHARD_BYTES)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # it names files of the cache


class PackedTable(TypedDict):
    """A table of captions or images, by its path, as in :class:`PackedFrom`, and the hex sha256 of the file."""

    path: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PackedFrom(TypedDict):
    """What image shards were packed from: ``path`` of a folder or a file, relative to the manifest's folder, and the tables
    that were read."""

    path: str
    tables: list[PackedTable]


class _Contents(TypedDict):
    """What every manifest has, and what some have."""

    shards: list[ShardEntry]
    samples: int
    bytes: int
    location: NotRequired[str | None]
    captioned: NotRequired[Annotated[int, Field(ge=0)] | None]
    key_dot: NotRequired[KeyDot]
    sizes: NotRequired[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
    packed_from: NotRequired[PackedFrom]


@dataclass(frozen=True)
class Problem:
    """One problem of a shard folder: where (a file name, or ``file: key``), what, how to fix it, and how many samples it makes
    unusable."""

    where: str
    what: str
    fix: str
    samples: int = 0

    def __str__(self) -> str:
        return f"{self.where} {self.what}; {self.fix}"


@dataclass(frozen=True)
class Manifest:
    """The contents of a shard folder.

    Attributes:
        extra: whatever the writer adds (image size, autoencoder hash, ...), and ``sizes``, the sha256 of their file.
        sizes: (height, width) of every image, (N, 2), to save beside it; :func:`ldm.data.image_sizes.image_sizes` reads them.
    """

    format: str
    shards: tuple[ShardEntry, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    sizes: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if taken := [key for key in _RESERVED if key in self.extra]:
            raise ValueError(f"extra must not hold the manifest's own keys: {', '.join(taken)}")
        if self.sizes is not None:
            object.__setattr__(self, "extra", self.extra | {"sizes": hashlib.sha256(_npy(self.sizes)).hexdigest()})

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes in all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def location(self) -> str | None:
        """Where the shards are if not beside the manifest: a URL, or a path relative to the manifest's folder."""
        return self.extra.get("location")

    @property
    def packed_from(self) -> PackedFrom | None:
        """What image shards were packed from; None where that is not known."""
        return self.extra.get("packed_from")

    @property
    def captioned(self) -> bool | None:
        """Whether any of its images has a caption; None where the writer did not count them."""
        count = self.extra.get("captioned")
        return None if count is None else count > 0

    @property
    def key_dot(self) -> KeyDot:
        """Which dot of a member's name ends the key; see :mod:`ldm.data.shards`."""
        return self.extra.get("key_dot", "first")

    @property
    def hash(self) -> str:
        """Hex sha256 of the shard list (names, counts, sizes, hashes): the identity of the data, in this order."""
        shards = [vars(shard) for shard in self.shards]
        return hashlib.sha256(json.dumps(shards, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def save(self, folder: str | os.PathLike) -> Path:
        """Write ``folder/manifest.json`` atomically, after the images' sizes where they are known; returns its path."""
        path = Path(folder) / MANIFEST_NAME
        if self.sizes is not None:
            with atomic_file(path.with_name(SIZES_NAME)) as file:
                file.write(_npy(self.sizes))
        value = {"format": self.format, "version": VERSION, "shards": [vars(shard) for shard in self.shards]}
        write_json(path, value | {"samples": self.samples, "bytes": self.bytes} | self.extra)
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike, format: str | None = None) -> Manifest:
        """Read ``folder/manifest.json``; ``format`` is the one the caller can use (None: either).

        Raises :class:`UsageError` where the folder is missing, has no manifest or holds another format, and
        :class:`LdmError` where the manifest is broken or of a newer format. Reads no shard: see
        :meth:`check_cheap`.
        """
        folder = require_folder(folder, "a folder of shards (.tar files and their manifest.json)")
        path = folder / MANIFEST_NAME
        if not os.path.lexists(path):
            require_finished_pack(folder)
            raise UsageError(f"{folder} has no {MANIFEST_NAME}; {_fix(format, folder)}")
        return cls.parse(read_bytes(path, MAX_MANIFEST_BYTES, "restore the manifest"), folder, format)

    @classmethod
    def parse(cls, data: _Bytes, folder: str | os.PathLike, format: str | None = None) -> Manifest:
        """Read the bytes of a ``manifest.json``; ``folder`` (a path or a URL) is for messages. Raises as :meth:`load` does."""
        path, fix = f"{folder}/{MANIFEST_NAME}", _fix(format, folder)
        value = parse_json(data, path, dict[str, Any])
        if value.get("format") not in (IMAGE_SHARDS, LATENT_SHARDS):
            raise LdmError(f'{path} is not a manifest of shards (no known "format"); {fix}')
        version = value.get("version")
        require_version(version, VERSION, path)
        if version != VERSION:  # there has been one version so far
            raise LdmError(f"{path} has no format version of a manifest ({version!r}); {fix}")
        if format is not None and value["format"] != format:
            raise UsageError(f"{path} describes {value['format']}, but {format} are needed here; give another folder")
        contents = parse_json(data, path, _Contents)
        names = [shard.name for shard in contents["shards"]]
        if len(set(names)) != len(names):
            raise LdmError(f"{path} lists a shard twice; {fix}")
        manifest = cls(value["format"], tuple(contents["shards"]), {k: v for k, v in value.items() if k not in _RESERVED})
        for total in ("samples", "bytes"):
            if contents[total] != getattr(manifest, total):
                raise LdmError(f'{path}: "{total}" is {contents[total]}, its shards sum to {getattr(manifest, total)}; {fix}')
        return manifest

    def cheap_problems(self, folder: str | os.PathLike, unlisted: bool = True) -> Iterator[Problem]:
        """What file names and sizes show: missing, resized and (if asked for) unlisted shards."""
        folder, fix = Path(folder), _fix(self.format, folder)
        if not self.shards:
            yield Problem(MANIFEST_NAME, "lists no shard", fix)
        for shard in self.shards:
            path = folder / shard.name
            if not path.is_file():
                yield Problem(shard.name, "is listed in the manifest but missing", f"restore it, or {fix}")
            elif (size := path.stat().st_size) != shard.bytes:
                yield Problem(shard.name, f"has {size} bytes, the manifest says {shard.bytes}", f"restore it, or {fix}")
        stray = {path.name for path in tar_paths(folder)} - {shard.name for shard in self.shards} if unlisted else ()
        for name in sorted(stray):
            yield Problem(name, "is not listed in the manifest", f"move it away, or {fix}")

    def check_cheap(self, folder: str | os.PathLike, unlisted: bool = True) -> None:
        """Raise :class:`LdmError` unless every shard exists with the stated size, and (if asked for) no other tar does."""
        for problem in self.cheap_problems(folder, unlisted):
            raise LdmError(f"{folder}: {problem}")


def require_finished_pack(folder: Path) -> None:
    """Raise :class:`UsageError` where a pack was interrupted: its shards are complete, but some are missing."""
    if (folder / PACK_JOURNAL_NAME).exists():
        raise UsageError(f"{folder} is a pack that was not finished; run the same `ldm shards pack` again")


def tar_paths(folder: str | os.PathLike) -> list[Path]:
    """The folder's ``*.tar`` by name, whatever they are, except folders and hidden ones (temporary files, macOS ``._x``)."""
    return sorted(path for path in Path(folder).glob("*.tar") if not path.name.startswith(".") and not path.is_dir())


def relative_path(place: str | Path, folder: str | Path) -> str:
    """``place`` seen from ``folder``, for a manifest there: nothing that moves or is passed on names a machine's folders. A URL
    stays as it is."""
    return str(place) if "://" in str(place) else os.path.relpath(os.path.realpath(place), os.path.realpath(folder))


def _npy(sizes: np.ndarray) -> bytes:
    """The bytes of ``sizes.npy``."""
    file = io.BytesIO()
    np.save(file, sizes.astype("<i4"))
    return file.getvalue()


def _fix(format: str | None, folder: str | os.PathLike) -> str:
    where = f"{folder} --out DIR" if "://" in str(folder) else folder
    return _FIXES.get(format or IMAGE_SHARDS, "").format(folder=where)
