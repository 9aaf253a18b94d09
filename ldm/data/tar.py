"""Where the members of an uncompressed tar are: one fast scan of its headers, which reports damage.

``tarfile`` scans a tar too, about ten times slower, and stops silently at a cut or broken header; this scan reports it.
Formats: POSIX.1-1988 (ustar), pax and GNU long names, as ``tarfile``, GNU tar, img2dataset and webdataset write them.
"""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass, field

import numpy as np

BLOCK = 512
# a foreign tar may hold anything: a limit on what is read
_MAX_HEADER_DATA = 2**20

_PLAIN, _LONG_NAME, _PAX = b"0\0", b"L", b"xX"
_NOT_ZERO = re.compile(rb"[^\0]")
# as many digits as a file may need: Python refuses to read thousands
_PAX_LENGTH, _DIGITS = re.compile(rb"(\d{1,8}) "), re.compile(rb"\d{1,18}")


@dataclass
class TarIndex:
    """The regular files of a tar, in order.

    Attributes:
        names: as the tar has them (UTF-8, other bytes as surrogate escapes).
        offsets, sizes: of their data in bytes, (n,) int64.
        damage: what is wrong after the last of them, or None where the tar ends as it should.
    """

    names: list[str] = field(default_factory=list)
    offsets: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    damage: str | None = None


class _Damage(Exception):
    """Why the scan stops here."""


def index_tar(descriptor: int) -> TarIndex:
    """Scan the headers of the open file, not its data. Raises nothing for bad content: see ``damage``."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return TarIndex(damage="is empty")
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as data:
        return _scan(data, size)


def _scan(data: mmap.mmap, size: int) -> TarIndex:
    index, headers, offsets, sizes = TarIndex(), [], [], []
    owners = []  # how many headers precede each member's data: a broken one invalidates all members after it
    position, name, length = 0, None, None
    try:
        while True:
            header = data[position : position + BLOCK]
            if len(header) < BLOCK:
                raise _Damage("is cut short" if headers else "is too short for a tar")
            if header[0] == 0 and not any(header):
                break
            if header[257:262] != b"ustar":
                raise _Damage("has a broken header" if headers else "is not an uncompressed tar")
            headers.append(position)
            kind, stored = header[156:157], _number(header[124:136])
            start = position + BLOCK
            position = start + -(-stored // BLOCK) * BLOCK
            if start + stored > size:
                raise _Damage("is cut short")
            if kind in _PAX or kind == _LONG_NAME:
                if stored > _MAX_HEADER_DATA:
                    raise _Damage("has a broken header")
                extra = data[start : start + stored]
                if kind == _LONG_NAME:
                    name = extra.rstrip(b"\0")
                else:
                    name, length = _pax(extra, name, length)
                continue
            if length is not None:
                position = start + -(-length // BLOCK) * BLOCK
            if kind in _PLAIN:
                stored = stored if length is None else length
                if start + stored > size:
                    raise _Damage("is cut short")
                index.names.append((name or _name(header)).decode("utf-8", "surrogateescape"))
                offsets.append(start)
                sizes.append(stored)
                owners.append(len(headers))
            # links, folders, devices and sparse files have no plain bytes to point at
            name = length = None
        if _NOT_ZERO.search(data, position + BLOCK):
            raise _Damage("holds data after its end mark")
    except _Damage as damage:
        index.damage = f"{damage} at byte {min(position, size)}"
    sound = _sound_headers(data, headers)
    if sound < len(headers):
        keep = sum(owner <= sound for owner in owners)
        index.names, offsets, sizes = index.names[:keep], offsets[:keep], sizes[:keep]
        index.damage = f"has a broken header at byte {headers[sound]}"
    index.offsets, index.sizes = np.array(offsets, np.int64), np.array(sizes, np.int64)
    return index


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


def _sound_headers(data: mmap.mmap, headers: list[int]) -> int:
    """How many headers from the first on have the checksum that they state."""
    if not headers:
        return 0
    blocks = np.frombuffer(b"".join(data[position : position + BLOCK] for position in headers), np.uint8).reshape(-1, BLOCK)
    # the sum of all bytes, its own eight counted as spaces (32)
    sums = blocks.sum(1, dtype=np.int64) - blocks[:, 148:156].sum(1, dtype=np.int64) + 8 * 32
    for number, (block, total) in enumerate(zip(blocks[:, 148:156], sums.tolist(), strict=True)):
        try:
            stated = int(block.tobytes().strip(b" \0"), 8)
        except ValueError:
            return number
        if stated != total:
            return number
    return len(headers)
