"""All files of a folder, sorted by their paths, in memory that does not grow with their number."""

from __future__ import annotations

import heapq
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice

from ldm.errors import UsageError

# Names of one folder that are sorted in memory; more of them are sorted by way of temporary files.
_NAMES_AT_ONCE = 100_000


def walk(folder: str | os.PathLike, inside: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Paths of all files under ``folder``, relative and with /, sorted; hidden ones and hidden folders left out.

    Links are followed, but for those to a folder that they lie in. Raises :class:`UsageError` for a folder that cannot
    be read.
    """
    with ExitStack() as stack:
        try:
            about = os.stat(folder)
            here = (about.st_dev, about.st_ino)
            if here in above:
                return
            with os.scandir(folder) as entries:
                names = _sorted((_name(entry) for entry in entries if not entry.name.startswith(".")), stack)
        except OSError as error:  # os.walk would pass over it in silence
            raise UsageError(f"{error.filename} cannot be read ({error.strerror}); correct its permissions") from None
        for name in names:
            if name.endswith("/"):
                yield from walk(os.path.join(folder, name[:-1]), inside + name, above | {here})
            else:
                yield inside + name


def _name(entry: os.DirEntry[str]) -> str:
    # a folder's / takes part in the order, so that whole paths come sorted; isdir knows links that lead in circles
    is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
    return f"{entry.name}/" if is_folder else entry.name


def _sorted(names: Iterator[str], stack: ExitStack) -> Iterator[str]:
    """The names in order, in bounded memory: what is too much at once is sorted in pieces, which are merged."""
    pieces: list[Iterable[str]] = []
    while piece := sorted(islice(names, _NAMES_AT_ONCE)):
        if len(piece) < _NAMES_AT_ONCE:
            pieces.append(piece)
            break
        file = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 (the caller's stack closes it)
        file.writelines(json.dumps(name) + "\n" for name in piece)  # a name may hold a line break
        file.seek(0)
        pieces.append(map(json.loads, file))
    return heapq.merge(*pieces)
