"""Seeded damage to files: JSON of other types and sizes, cut and changed bytes, things that are no files."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Values of other types and sizes, as they stand in the file. "\u001b" must not reach a terminal.
VALUES = (
    "null", "true", "-1", "0", "1e308", "1e400", "NaN", "-Infinity", "1000000000000000", "9" * 5000, '""', '"x"', "[]", "{}",
    '[[1, "a"], null]', '"\\u001b]0;title\\u0007\\nldm: all is well"', '"\\ud800"', '"' + "a" * 5000 + '"', '"/dev/zero"',
    '"../.."',
)  # fmt: skip
_MARK = "@@here@@"

Damage = tuple[str, Callable[[Path], None]]  # a name for the message, and what is done to a file


def json_damage(path: Path, count: int, seed: int) -> list[Damage]:
    """``count`` ways to change one value of a JSON file, or to drop it, and the ways to break all of it."""
    content, chance = json.loads(path.read_text()), random.Random(seed)
    found = []
    for place in _places(content):
        found.append((f"without {'.'.join(map(str, place))}", _replaced(content, place, None)))
        found += [(f"{'.'.join(map(str, place))} = {value[:40]}", _replaced(content, place, value)) for value in VALUES]
    chosen = chance.sample(found, min(count, len(found)))
    chosen += [
        (f"all of it {value[:40]}", value) for value in ("null", "[]", "7", '"x"', "[" * 100_000, '{"a":' * 5000, "\ufeff{}")
    ]
    return [(name, lambda file, text=text: _write(file, text.encode())) for name, text in chosen]


def bytes_damage(path: Path, count: int, seed: int) -> list[Damage]:
    """``count`` cuts, changed bytes and overwritten parts of any file."""
    data, chance = path.read_bytes(), random.Random(seed)
    found: list[tuple[str, bytes]] = [("empty", b""), ("zeros", bytes(len(data))), ("text", b"<html>not found</html>")]
    while len(found) < count:
        at = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                found.append((f"cut at {at}", data[:at]))
            case 1:
                found.append((f"byte {at} flipped", data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]))
            case 2:
                size = chance.randrange(1, 64)
                found.append((f"{size} random bytes at {at}", data[:at] + chance.randbytes(size) + data[at + size :]))
            case _:
                found.append((f"{at} bytes twice", data[:at] + data[at // 2 :]))
    return [(name, lambda file, data=data: _write(file, data)) for name, data in found[:count]]


def special_damage(path: Path) -> list[Damage]:
    """Things that are no regular files, and names without a file; a sparse terabyte for what is never hashed."""
    return [
        *([] if path.suffix in (".tar", ".ckpt") else [("a sparse terabyte", _sparse)]),
        ("a named pipe", os.mkfifo),
        ("a link to /dev/zero", lambda file: file.symlink_to("/dev/zero")),
        ("a link to /dev/random", lambda file: file.symlink_to("/dev/random")),
        ("a link to nothing", lambda file: file.symlink_to("nowhere")),
        ("a link to itself", lambda file: file.symlink_to(file.name)),
        ("a folder", lambda file: file.mkdir()),
        ("missing", lambda file: None),
    ]


def _sparse(file: Path) -> None:
    with open(file, "wb") as open_file:
        open_file.truncate(2**40)


def _write(file: Path, data: bytes) -> None:
    file.write_bytes(data)


def _places(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:2] if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*place, key))


def _replaced(content: Any, place: tuple[str | int, ...], value: str | None) -> str:
    """``content`` as JSON with the text ``value`` at a place, or without that place."""
    changed = json.loads(json.dumps(content))
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    if value is None:
        del parent[place[-1]]
        return json.dumps(changed)
    parent[place[-1]] = _MARK
    return json.dumps(changed).replace(f'"{_MARK}"', value)
