"""Webdataset shards: writing them so that equal input gives equal bytes, and reading them in any order.

A shard is an uncompressed tar. A sample is the set of its members that share a key; key and extension part at the
*first* dot of the base name, as in webdataset, so ``a/b.jpg`` and ``a/b.txt`` are the sample ``a/b``.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.decode import IMAGE_EXTENSIONS, DecodeError, decode_image, decode_text
from ldm.data.manifest import IMAGE_SHARDS, Manifest, Problem, ShardEntry, tar_paths
from ldm.errors import LdmError, UsageError
from ldm.files import atomic_file, atomic_folder, require_folder, require_new_folder, sha256_file

# Whatever else a tar holds (pickles, arrays, archives) is never read.
EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "txt", "json", "safetensors"))
MAX_MEMBER_BYTES = 2**28

_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")


@dataclass(frozen=True)
class Sample:
    """One sample as it lies in the shard: its key, and its members' bytes by lower-case extension."""

    key: str
    files: dict[str, bytes]

    @property
    def image(self) -> bytes | None:
        """The image's encoded bytes, or None where the sample has no image."""
        return next((self.files[extension] for extension in IMAGE_EXTENSIONS if extension in self.files), None)

    @property
    def caption(self) -> bytes | None:
        """The ``.txt`` member's bytes, or None."""
        return self.files.get("txt")


class ShardWriter:
    """Write samples to ``folder/{prefix}-{index:05d}.tar``, at most ``samples_per_shard`` to each.

    A context manager. Each shard is written under a temporary name, synced and renamed when it is full; on an
    exception the unfinished one disappears. No time, user or mode of this machine enters the bytes.
    """

    def __init__(self, folder: str | os.PathLike, prefix: str, samples_per_shard: int = 1000, first_index: int = 0) -> None:
        if samples_per_shard < 1:
            raise UsageError(f"samples per shard must be 1 or more, not {samples_per_shard}")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", prefix):
            raise UsageError(f"shard prefix {prefix!r} may hold letters, digits, - and _ only")
        self.folder = Path(folder)
        self.prefix = prefix
        self.samples_per_shard = samples_per_shard
        self.entries: list[ShardEntry] = []
        self._first_index = first_index
        self._open = ExitStack()
        self._writer: Any = None
        self._keys: set[str] = set()

    @property
    def samples(self) -> int:
        """Samples written so far, those of the unfinished shard included."""
        return sum(entry.samples for entry in self.entries) + len(self._keys)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if kind is None:
            self._finish_shard()
        else:
            self._open.__exit__(kind, error, traceback)

    def write(self, key: str, files: dict[str, bytes]) -> None:
        """Append one sample; ``files`` maps extensions without the dot (``png``, ``txt``) to bytes."""
        if not re.fullmatch(r"[^./\\\s]+", key):
            raise ValueError(f"sample key {key!r} must be a file name without dots, slashes and spaces")
        if key in self._keys:
            raise ValueError(f"sample key {key!r} occurs twice in a shard")
        if unknown := files.keys() - EXTENSIONS or not files:
            raise ValueError(f"sample {key!r} needs members of {sorted(EXTENSIONS)}, not {unknown or 'none'}")
        if self._writer is None:
            self._start_shard()
        self._writer.write({"__key__": key, **files})
        self._keys.add(key)
        if len(self._keys) == self.samples_per_shard:
            self._finish_shard()

    def _start_shard(self) -> None:
        # Here, because webdataset imports torch: reading and checking shards should not wait for it.
        from webdataset import TarWriter

        self._path = self.folder / f"{self.prefix}-{self._first_index + len(self.entries):05d}.tar"
        file = self._open.enter_context(atomic_file(self._path))
        self._writer = self._open.enter_context(TarWriter(file, user="ldm", group="ldm", mode=0o644, encoder=False, mtime=0))

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        self._open.close()
        size = self._path.stat().st_size
        self.entries.append(ShardEntry(self._path.name, len(self._keys), size, sha256_file(self._path)))
        self._writer = None
        self._keys = set()


class ShardReader:
    """Random access to the samples of one uncompressed tar, in the order in which their keys first occur.

    Only headers are read up front. The file is opened on first access and read with ``pread``, so one reader may be
    forked or pickled to loader workers. Raises :class:`LdmError` naming the shard where it is missing, cut or no tar.
    """

    def __init__(self, path: str | os.PathLike, extensions: Iterable[str] = EXTENSIONS) -> None:
        self.path = Path(path)
        self._members = _index(self.path, frozenset(extensions))
        self.keys = tuple(self._members)
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        key = self.keys[index]
        return Sample(key, {extension: self._read(key, *span) for extension, span in self._members[key].items()})

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def spans(self, index: int) -> dict[str, tuple[int, int]]:
        """Where sample ``index`` lies in the file: extension -> (offset, size) in bytes, for memory-mapped reading."""
        return dict(self._members[self.keys[index]])

    def close(self) -> None:
        """Close the file; the next access opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def _read(self, key: str, offset: int, size: int) -> bytes:
        if size > MAX_MEMBER_BYTES:
            raise DecodeError(f"{self.path}: a member of {key} has {size} bytes, the limit is {MAX_MEMBER_BYTES}")
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise LdmError(f"{self.path} became shorter while it was read; restore it")
        return data


def _index(path: Path, extensions: frozenset[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """Walk the headers of a tar: key -> extension -> (offset, size)."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                match = _KEY.fullmatch(member.name)
                # Links, devices and sparse files have no plain bytes to point at; `__x__` is webdataset's own.
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None
                if match is None or not plain or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                key, extension = match[1], match[2].lower()
                if extension not in extensions:
                    continue
                files = samples.setdefault(key, {})
                if extension in files:
                    raise LdmError(f"{path} holds {member.name} twice; write the shard again")
                files[extension] = (member.offset_data, member.size)
            # tarfile ends without a word where a header is cut or broken: only the empty end block tells.
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(tarfile.BLOCKSIZE)
    except FileNotFoundError:
        raise LdmError(f"{path} does not exist; restore it") from None
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise LdmError(f"{path} is cut short or not an uncompressed tar ({error}); restore it") from None
    if end != bytes(tarfile.BLOCKSIZE):
        raise LdmError(f"{path} is cut short or broken after {len(samples)} samples; restore it")
    return samples


def index_folder(folder: str | os.PathLike, on_progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Make the manifest of image shards from elsewhere (img2dataset, ...); the caller saves it.

    ``extra`` tells how many samples have a caption. ``on_progress(shards_done, shards)`` is called after each shard.
    Raises :class:`UsageError` where there is no tar and :class:`LdmError` where a shard is cut, holds nothing usable
    or holds samples without an image.
    """
    folder = require_folder(folder, "a folder of .tar shards")
    paths = tar_paths(folder)
    if not paths:
        raise UsageError(f"{folder} holds no .tar shard; `ldm shards pack` makes them from a folder of images")
    entries, captioned = [], 0
    for done, path in enumerate(paths, start=1):
        reader = ShardReader(path)
        members = [reader.spans(index) for index in range(len(reader))]
        if any("safetensors" in files for files in members):
            raise UsageError(f"{path} holds latents, not images; run `ldm latents export` again for their manifest")
        bare = [key for key, files in zip(reader.keys, members, strict=True) if not _has_image(files)]
        if bare or not members:
            what = f"{len(bare)} samples without an image (first: {bare[0]})" if bare else "no sample"
            raise LdmError(f"{path} holds {what}; each sample needs one of .{', .'.join(IMAGE_EXTENSIONS)}")
        captioned += sum("txt" in files for files in members)
        entries.append(ShardEntry(path.name, len(reader), path.stat().st_size, sha256_file(path)))
        if on_progress is not None:
            on_progress(done, len(paths))
    return Manifest(IMAGE_SHARDS, tuple(entries), {"source": "index", "captioned": captioned})


def check_folder(
    folder: str | os.PathLike, deep: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """Everything wrong with a shard folder; an empty list means that it is whole.

    Shallow: names and sizes. Deep: hashes, sample counts, and for image shards every image and caption is decoded.
    ``on_progress(samples_done, samples)`` is called after each shard. Raises as :meth:`Manifest.load` does.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    problems = list(manifest.cheap_problems(folder))
    if not deep:
        return problems
    wrong = {problem.where for problem in problems}
    done = 0
    for entry in manifest.shards:
        if entry.name not in wrong:
            problems.extend(_deep_problems(folder / entry.name, entry, manifest.format == IMAGE_SHARDS))
        done += entry.samples
        if on_progress is not None:
            on_progress(done, manifest.samples)
    return problems


def _deep_problems(path: Path, entry: ShardEntry, images: bool) -> Iterator[Problem]:
    again = "restore the shard, or leave the sample out and run `ldm shards index` again"
    if sha256_file(path) != entry.sha256:
        yield Problem(entry.name, "has other bytes than the manifest's sha256", "restore it")
    try:
        reader = ShardReader(path, EXTENSIONS if images else ("json",))
    except LdmError as error:
        yield Problem(entry.name, f"cannot be read: {error}", "restore it")
        return
    try:
        # a latent shard's tar samples are chunks, each with a list of the keys in it
        held = len(reader) if images else sum(len(json.loads(chunk.files["json"])["keys"]) for chunk in reader)
    except (KeyError, TypeError, ValueError):
        yield Problem(entry.name, "has a chunk without its list of keys", "restore it")
        return
    if held != entry.samples:
        yield Problem(entry.name, f"holds {held} samples, the manifest says {entry.samples}", "restore it")
    for sample in reader if images else ():
        where = f"{entry.name}: {sample.key}"
        try:
            if sample.image is None:
                raise DecodeError("has no image")
            decode_image(sample.image)
            if sample.caption is not None:
                decode_text(sample.caption)
        except DecodeError as error:
            yield Problem(where, str(error), again)
    reader.close()


def _has_image(files: Iterable[str]) -> bool:
    return not set(IMAGE_EXTENSIONS).isdisjoint(files)


def encode_png(image: Image.Image) -> bytes:
    """An image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_images(
    folder: str | os.PathLike,
    prefix: str,
    items: Iterable[tuple[str, Image.Image | np.ndarray, str]],
    samples_per_shard: int = 1000,
    extra: dict[str, Any] | None = None,
    total: int | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> Manifest:
    """Write (key, image, caption) items as image shards with a manifest: ``key.png`` and ``key.txt``.

    Arrays are uint8 (H, W, 3). ``folder`` must be new and appears only when all is written. ``on_progress(done,
    total)`` is called after each item.
    """
    folder = require_new_folder(folder, "image shards")
    with atomic_folder(folder) as temporary:
        with ShardWriter(temporary, prefix, samples_per_shard) as writer:
            for done, (key, image, caption) in enumerate(items, start=1):
                png = encode_png(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
                writer.write(key, {"png": png, "txt": caption.encode()})
                if on_progress is not None:
                    on_progress(done, total)
        manifest = Manifest(IMAGE_SHARDS, tuple(writer.entries), dict(extra or {}))
        manifest.save(temporary)
    return manifest
