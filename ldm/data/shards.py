"""Random access to webdataset shards, damaged ones included.

A shard is an uncompressed tar. A sample is the set of its members that share a key; key and extension part at the
*first* dot of the base name, as in webdataset, so ``a/b.jpg`` and ``a/b.txt`` are the sample ``a/b``. In a folder whose
manifest says so they part at the *last* dot, so that ``0.input.jpg`` is an image of the sample ``0.input``.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldm.data.decode import IMAGE_EXTENSIONS, DecodeError, captions_called, captions_of
from ldm.data.tar import TarIndex, index_tar
from ldm.errors import LdmError
from ldm.files import open_regular
from ldm.images import KIND_BYTES, is_image

# Whatever else a tar holds (pickles, arrays, archives) is never read.
EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "caption", "json", "safetensors")
MAX_MEMBER_BYTES = 2**28

KeyDot = Literal["first", "last"]
_NAME = {
    "first": re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL),
    "last": re.compile(r"((?:.*/)?[^./][^/]*)\.([^./]*)", re.DOTALL),
}
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own


def split_name(name: str, key_dot: KeyDot) -> tuple[str, str] | None:
    """A member's key and lower-case extension, parted at the first or last dot of its base name; None where it has none."""
    match = _NAME[key_dot].fullmatch(name)
    return None if match is None or _META.match(name) else (match[1], match[2].lower())


@dataclass(frozen=True)
class ShardSample:
    """One sample as stored in a shard: its key, and its members' bytes by lower-case extension."""

    key: str
    files: dict[str, bytes]

    @property
    def image(self) -> bytes | None:
        """The image's encoded bytes, or None where the sample has no image."""
        return next((self.files[extension] for extension in IMAGE_EXTENSIONS if extension in self.files), None)

    @property
    def captions(self) -> list[str]:
        """All its captions; none where it has none. Raises :class:`DecodeError` for a broken one, see :func:`captions_of`."""
        return captions_of(self.files.get("txt", self.files.get("caption")), self.files.get("json"))

    def captions_called(self, name: str) -> list[str]:
        """Those of one name, see :func:`ldm.data.decode.captions_called`."""
        return captions_called(name, self.files.get("txt", self.files.get("caption")), self.files.get("json"))


class ShardReader:
    """Random access to the samples of one uncompressed tar, in the order in which their keys first occur.

    Only headers are read up front; the index takes about sixty bytes per sample, so that a million samples can stay open. Data
    are read with ``pread``: a reader may be used after a fork. It holds one open file: :meth:`close` it.

    Raises :class:`LdmError` naming the shard where it is missing, is no regular file or cannot be read. A damaged one is read
    as far as it goes: ``damage`` says what is wrong with it, or is None. A file that was replaced while it was closed is
    scanned again. So is one that was written while it is open; where its members have moved, reading raises :class:`LdmError`.
    """

    def __init__(self, path: str | os.PathLike, extensions: Iterable[str] = EXTENSIONS, key_dot: KeyDot = "first") -> None:
        self._descriptor: int | None = None
        self._codes = {extension: code for code, extension in enumerate(EXTENSIONS) if extension in set(extensions)}
        self._key_dot: KeyDot = key_dot
        self._scanned: tuple[int, int, int] | None = None  # the stamp of the file that the index is of
        self.reopen(path)

    def _scan(self) -> None:
        assert self._descriptor is not None
        if (stamp := self.stamp()) == self._scanned:
            return
        try:
            self._group(index_tar(self._descriptor))
        except OSError as error:
            self.close()
            raise LdmError(f"{self.path} cannot be read ({error.strerror or error}); restore it") from None
        self._scanned = stamp

    def _group(self, tar: TarIndex) -> None:
        """Members => samples: arrays sorted by sample, and one string of all keys."""
        self.damage = tar.damage
        numbers: dict[str, int] = {}
        members = []  # (sample, extension, member)
        for member, name in enumerate(tar.names):
            key, extension = split_name(name, self._key_dot) or ("", "")
            if (code := self._codes.get(extension)) is not None:
                members.append((numbers.setdefault(key, len(numbers)), code, member))
        members.sort(key=lambda entry: entry[0])  # stable: a sample's members keep their order
        table = np.array(members, np.int64).reshape(-1, 3)  # (M, 3)
        self._starts = np.searchsorted(table[:, 0], np.arange(len(numbers) + 1)).astype(np.int32)
        self._extensions = table[:, 1].astype(np.uint8)
        self._offsets, self._sizes = tar.offsets[table[:, 2]], tar.sizes[table[:, 2]]
        keys = [key.encode("utf-8", "surrogateescape") for key in numbers]
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([0, *map(len, keys)])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def key(self, index: int) -> str:
        """The key of sample ``index``; bytes that are not UTF-8 are shown as escapes."""
        return self._keys[self._key_ends[index] : self._key_ends[index + 1]].decode("utf-8", "backslashreplace")

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, in order."""
        return tuple(self.key(index) for index in range(len(self)))

    def spans(self, index: int) -> dict[str, tuple[int, int]]:
        """Where sample ``index`` lies in the file: extension -> (offset, size) in bytes, for :meth:`read`.

        Raises :class:`DecodeError` where its key comes twice.
        """
        spans: dict[str, tuple[int, int]] = {}
        for member in range(self._starts[index], self._starts[index + 1]):
            extension = EXTENSIONS[self._extensions[member]]
            if extension in spans:
                raise DecodeError(f"comes twice in the shard (two .{extension})")
            spans[extension] = int(self._offsets[member]), int(self._sizes[member])
        return spans

    def __getitem__(self, index: int) -> ShardSample:
        """Sample ``index``. Raises :class:`DecodeError` where it comes twice or a member is over the size limit."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        self._require_unchanged()
        return ShardSample(self.key(index), {extension: self._read(*span) for extension, span in self.spans(index).items()})

    def text(self, index: int) -> ShardSample:
        """Sample ``index`` with its captions alone: its text and json. Raises as indexing does."""
        self._require_unchanged()
        spans = {name: span for name, span in self.spans(index).items() if name in ("txt", "caption", "json")}
        return ShardSample(self.key(index), {extension: self._read(*span) for extension, span in spans.items()})

    def __iter__(self) -> Iterator[ShardSample]:
        return (self[index] for index in range(len(self)))

    def reopen(self, path: str | os.PathLike) -> int:
        """Open the file again after :meth:`close`, perhaps at another path; returns its descriptor."""
        self.close()
        self.path = Path(path)
        try:
            # not to wait for the writer of a named pipe
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
        except (OSError, ValueError) as error:
            what = f"cannot be read ({getattr(error, 'strerror', error)})"
            what = "does not exist" if getattr(error, "errno", 0) == errno.ENOENT else what
            raise LdmError(f"{self.path} {what}; restore it") from None
        self._descriptor = descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            self.close()
            raise LdmError(f"{self.path} is not a regular file; restore the shard")
        self._scan()
        return descriptor

    def stamp(self) -> tuple[int, int, int]:
        """Inode, size in bytes and time of modification of the open file: others where it was replaced or overwritten."""
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        about = os.fstat(self._descriptor)
        return about.st_ino, about.st_size, about.st_mtime_ns

    def close(self) -> None:
        """Close the file; the index is kept."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __getstate__(self) -> dict[str, Any]:
        # the number of an open file means nothing elsewhere: a copy opens the file itself
        return self.__dict__ | {"_descriptor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.reopen(self.path)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the interpreter's end `os` may be gone
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            close(descriptor)

    def _require_unchanged(self) -> None:
        """Raise :class:`LdmError` where the file was written since it was scanned, and its members are elsewhere now."""
        if self.stamp() == self._scanned:
            return
        before = self._layout()
        self._scan()
        if self._layout() != before:
            raise LdmError(f"{self.path} was overwritten or cut while it was open; restore it, or run `ldm shards index` again")

    def _layout(self) -> tuple[bytes, ...]:
        return self._keys, *(a.tobytes() for a in (self._starts, self._extensions, self._offsets, self._sizes))

    def _read(self, offset: int, size: int) -> bytes:
        if size > MAX_MEMBER_BYTES:
            raise DecodeError(f"has a member of {size} bytes, the limit is {MAX_MEMBER_BYTES}")
        return self.read(offset, size)

    def read(self, offset: int, size: int) -> bytes:
        """So many bytes of the file. Raises :class:`LdmError` where it has become shorter."""
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        data = os.pread(self._descriptor, size, offset)
        while 0 < len(data) < size:  # a read of 2 GiB or over a network may come in parts
            if not (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
                break
            data += more
        if len(data) != size:
            raise LdmError(f"{self.path} became shorter while it was read; restore it")
        return data


@dataclass(frozen=True)
class Unread:
    """Images of a shard that are in no sample, for one reason: ``what`` they are, and how to fix it."""

    what: str
    fix: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.names) - _NAMED} more" if len(self.names) > _NAMED else ""
        return f"holds images that are in no sample, because {self.what}: {', '.join(self.shown)}{more}"

    @property
    def shown(self) -> list[str]:
        """The first names; bytes that are not UTF-8 are shown as escapes."""
        return [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in self.names[:_NAMED]]


_NAMED = 3
_KNOWN = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)


def unread_images(path: Path, key_dot: KeyDot) -> list[Unread]:
    """The images of a tar, by extension or first bytes, that are in no sample, by reason."""
    found: dict[tuple[str, str], list[str]] = {}
    with open_regular(path, "restore the shard") as file:
        tar = index_tar(file.fileno())
        for name, offset in zip(tar.names, tar.offsets.tolist(), strict=True):
            key, extension = split_name(name, key_dot) or ("", "")
            base = name.rpartition("/")[2]
            # macOS writes a file ._NAME beside each file
            if extension in EXTENSIONS or base.startswith("._") or _META.match(name):
                continue
            if is_image(name, os.pread(file.fileno(), KIND_BYTES, offset)):
                reason = _why_unread(base, bool(key), key_dot)
                found.setdefault(reason, []).append(name)
    for name in tar.others:
        if is_image(name):
            reason = "they are links or sparse files", "write the tar again with `tar --dereference --hard-dereference`"
            found.setdefault(reason, []).append(name)
    return [Unread(*reason, tuple(names)) for reason, names in found.items()]


def _why_unread(base: str, has_key: bool, key_dot: KeyDot) -> tuple[str, str]:
    if base.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS:
        return f"their extension is none of {_KNOWN}", "rename or convert them"
    if not has_key:
        return "their names begin with a dot", "rename them"
    return "a key ends at the first dot of a name", "rename them, or run `ldm shards index` with --key-dot last"
