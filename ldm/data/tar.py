"""Where the members of an uncompressed tar are: one fast scan of its headers, which reports damage.

``tarfile`` scans a tar too, about ten times slower, and stops silently at a cut or broken header; this scan reports it.
Formats: POSIX.1-1988 (ustar), pax and GNU long names, as ``tarfile``, GNU tar, img2dataset and webdataset write them.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass, field

import numpy as np

BLOCK = 512
# a foreign tar may hold anything: a limit on what is read
_MAX_HEADER_DATA = 2**20
# bytes per read: a header, and often a small file and the header after it
_AHEAD = 2**12

_PLAIN, _LONG_NAME, _PAX, _WITHOUT_FILE = b"07\0", b"L", b"xX", b"5gK"
# as many digits as a file may need: Python refuses to read thousands
_PAX_LENGTH, _DIGITS = re.compile(rb"(\d{1,8}) "), re.compile(rb"\d{1,18}")


@dataclass
class TarIndex:
    """The regular files of a tar, in order.

    Attributes:
        names: as the tar has them (UTF-8, other bytes as surrogate escapes).
        offsets, sizes: of their data in bytes, (n,) int64.
        others: names of links, devices and sparse files, which have no plain bytes to point at.
        damage: what is wrong after the last of them, or None where the tar ends as it should.
    """

    names: list[str] = field(default_factory=list)
    offsets: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    others: list[str] = field(default_factory=list)
    damage: str | None = None


class _Damage(Exception):
    """Why the scan stops here."""


class _File:
    """Reads of an open file. It is not mapped: if another process cuts a mapped file, this one ends by a signal."""

    def __init__(self, descriptor: int):
        self.descriptor, self._start, self._data = descriptor, 0, b""

    def read(self, position: int, length: int) -> bytes:
        """The bytes at ``position``, fewer where the file ends."""
        start = position - self._start
        if not 0 <= start <= start + length <= len(self._data):
            self._data, self._start, start = os.pread(self.descriptor, max(length, _AHEAD), position), position, 0
        return self._data[start : start + length]


def index_tar(descriptor: int) -> TarIndex:
    """Scan the headers of the open file, not its data. Raises nothing for bad content: see ``damage``."""
    size, index, offsets, sizes = os.fstat(descriptor).st_size, TarIndex(), [], []
    if size == 0:
        return TarIndex(damage="is empty")
    file, position, name, length = _File(descriptor), 0, None, None
    try:
        while True:
            header = file.read(position, BLOCK) if position < size else b""
            if len(header) < BLOCK:
                raise _Damage("is cut short" if position else "is too short for a tar")
            if header[0] == 0 and not any(header):
                break
            if header[257:262] != b"ustar":
                raise _Damage("has a broken header" if position else "is not an uncompressed tar")
            _check_sum(header)
            kind, stored = header[156:157], _number(header[124:136])
            start = position + BLOCK
            if start + stored > size:
                position = start + stored
                raise _Damage("is cut short")
            if kind in _PAX or kind == _LONG_NAME:
                extra = file.read(start, stored) if stored <= _MAX_HEADER_DATA else b""
                if len(extra) < stored:
                    raise _Damage("has a broken header")
                if kind == _LONG_NAME:
                    name = extra.rstrip(b"\0")
                else:
                    name, length = _pax(extra, name, length)
                position = start + _whole_blocks(stored)
                continue
            stored = stored if length is None else length
            if kind in _PLAIN:
                if start + stored > size:
                    position = start + stored
                    raise _Damage("is cut short")
                index.names.append(_decoded(name or _name(header)))
                offsets.append(start)
                sizes.append(stored)
            elif kind not in _WITHOUT_FILE:
                index.others.append(_decoded(name or _name(header)))
            position = start + _whole_blocks(stored)
            name = length = None
        _check_end(file, position + BLOCK)
    except _Damage as damage:
        index.damage = f"{damage} at byte {min(position, size)}"
    index.offsets, index.sizes = np.array(offsets, np.int64), np.array(sizes, np.int64)
    return index


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check_end(file: _File, position: int) -> None:
    """After the end mark there are zeros."""
    while data := file.read(position, 2**20):
        if data.count(0) < len(data):
            raise _Damage("holds data after its end mark")
        position += len(data)


def _check_sum(header: bytes) -> None:
    """A header states the sum of its bytes, the eight of the sum itself counted as spaces."""
    stated = header[148:156]
    try:
        total = int(stated.strip(b" \0"), 8)
    except ValueError:
        raise _Damage("has a broken header") from None
    # Adler-32 sums fast: its low half is 1 and the sum of all bytes, modulo 65521
    if (total - 8 * 32 + sum(stated) + 1 - (zlib.adler32(header) & 0xFFFF)) % 65521:
        raise _Damage("has a broken header")


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    # GNU tar keeps times where POSIX keeps the prefix; its magic ends in a space
    return prefix + b"/" + name if prefix and header[262:263] == b"\0" else name


def _number(octal: bytes) -> int:
    if octal[0] & 0x80:  # GNU: a binary number, for files of 8 GiB and more
        return int.from_bytes(octal[1:], "big")
    try:
        value = int(octal.strip(b" \0") or b"0", 8)
    except ValueError:
        raise _Damage("has a broken header") from None
    if value < 0:
        raise _Damage("has a broken header")
    return value


def _pax(records: bytes, name: bytes | None, length: int | None) -> tuple[bytes | None, int | None]:
    """Path and size, where the pax records ("LENGTH KEY=VALUE\\n" each) give them."""
    at = 0
    while at < len(records):
        start = _PAX_LENGTH.match(records, at)
        end = at + int(start[1]) if start else 0
        if start is None or not start.end() < end <= len(records):
            raise _Damage("has a broken header")
        key, _, value = records[start.end() : end - 1].partition(b"=")
        if key == b"path":
            name = value
        elif key == b"size":
            if _DIGITS.fullmatch(value) is None:
                raise _Damage("has a broken header")
            length = int(value)
        at = end
    return name, length
