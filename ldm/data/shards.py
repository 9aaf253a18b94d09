"""Random access to webdataset shards, damaged ones included.

A shard is an uncompressed tar. A sample is the set of its members that share a key; key and extension part at the
*first* dot of the base name, as in webdataset, so ``a/b.jpg`` and ``a/b.txt`` are the sample ``a/b``.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.decode import IMAGE_EXTENSIONS, DecodeError, captions_of
from ldm.data.tar import TarIndex, index_tar
from ldm.errors import LdmError

# Whatever else a tar holds (pickles, arrays, archives) is never read.
EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json", "safetensors")
MAX_MEMBER_BYTES = 2**28

_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own


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
        return captions_of(self.files.get("txt"), self.files.get("json"))


class ShardReader:
    """Random access to the samples of one uncompressed tar, in the order in which their keys first occur.

    Only headers are read up front; the index takes about sixty bytes per sample, so that a million samples can stay open. Data
    are read with ``pread``: a reader may be used after a fork. It holds one open file: :meth:`close` it.

    Raises :class:`LdmError` naming the shard where it is missing or cannot be read. A damaged one is read as far as it goes:
    ``damage`` says what is wrong with it, or is None.
    """

    def __init__(self, path: str | os.PathLike, extensions: Iterable[str] = EXTENSIONS) -> None:
        self._descriptor: int | None = None
        descriptor = self.reopen(path)
        try:
            tar = index_tar(descriptor)
        except OSError as error:
            self.close()
            raise LdmError(f"{self.path} cannot be read ({error.strerror or error}); restore it") from None
        self.damage = tar.damage
        self._group(tar, {extension: code for code, extension in enumerate(EXTENSIONS) if extension in set(extensions)})

    def _group(self, tar: TarIndex, codes: dict[str, int]) -> None:
        """Members => samples: arrays sorted by sample, and one string of all keys."""
        numbers: dict[str, int] = {}
        members = []  # (sample, extension, member)
        for member, name in enumerate(tar.names):
            match = _KEY.fullmatch(name)
            if match is None or _META.match(name):
                continue
            code = codes.get(match[2].lower())
            if code is not None:
                members.append((numbers.setdefault(match[1], len(numbers)), code, member))
        members.sort(key=lambda entry: entry[0])  # stable: a sample's members keep their order
        table = np.array(members, np.int64).reshape(-1, 3)  # (M, 3)
        self._starts = np.searchsorted(table[:, 0], np.arange(len(numbers) + 1)).astype(np.int32)
        self._extensions = table[:, 1].astype(np.uint8)
        self._offsets, self._sizes = tar.offsets[table[:, 2]], tar.sizes[table[:, 2]]
        keys = [key.encode("utf-8", "surrogateescape") for key in numbers]
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([0, *map(len, keys)]).astype(np.int32)

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
        return ShardSample(self.key(index), {extension: self._read(*span) for extension, span in self.spans(index).items()})

    def __iter__(self) -> Iterator[ShardSample]:
        return (self[index] for index in range(len(self)))

    def reopen(self, path: str | os.PathLike) -> int:
        """Open the file again after :meth:`close`, perhaps at another path; returns its descriptor."""
        self.close()
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            what = "does not exist" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
            raise LdmError(f"{self.path} {what}; restore it") from None
        return self._descriptor

    def stamp(self) -> tuple[int, int, int]:
        """Inode, size in bytes and time of modification of the open file: others where it was replaced or overwritten."""
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        stat = os.fstat(self._descriptor)
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

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

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()

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
