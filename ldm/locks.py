"""Locks between processes, on one machine or on several that share a file system."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from ldm.errors import LdmError, UsageError, first_line
from ldm.files import LOCK_NAME
from ldm.terminal import printable


def new_lock(path: str | os.PathLike, timeout: float = -1) -> FileLock:
    """A lock file, not acquired yet; ``timeout`` in seconds, negative: none. The kernel frees it if the process dies.

    Where the file system has no locks, the file's existence is the lock.
    """
    warnings.filterwarnings("ignore", "flock not supported")
    return FileLock(path, timeout=timeout)


@contextlib.contextmanager
def hold(path: str | os.PathLike, doing: str) -> Iterator[None]:
    """Hold the lock file ``path``, see :func:`new_lock`, while the block runs, and remove it afterwards.

    Args:
        doing: what the block does, for the message to another process, such as ``"training into runs/dit"``.

    Raises:
        UsageError: another process holds it; the message names that process and its machine.
        LdmError: the lock cannot be made.
    """
    path = Path(path)
    lock = new_lock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        # a process that was killed on another machine leaves its soft lock behind
        gone = f", or, if that process is gone, remove {printable(path)}" if isinstance(lock, SoftFileLock) else ""
        raise UsageError(f"another ldm is {doing}{_holder(path)}; wait for it, or give another folder{gone}") from None
    except OSError as error:
        raise LdmError(f"{path} cannot be made, so nothing keeps others out of {path.parent} ({error.strerror})") from None
    try:
        if not isinstance(lock, SoftFileLock):  # which writes the same two lines by itself
            path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
        yield
    finally:
        if not isinstance(lock, SoftFileLock):
            path.unlink(missing_ok=True)  # while it is held: who waits for this file finds it unlinked and tries again
        lock.release()


@contextlib.contextmanager
def hold_folder(folder: str | os.PathLike, doing: str) -> Iterator[None]:
    """:func:`hold` the lock of a folder. It and its parents are made where absent, and removed again if they stay empty."""
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: NUL in the name, or half a surrogate pair
        raise UsageError(f"{printable(folder)} cannot be made ({first_line(error)}); give another folder") from None
    try:
        with hold(folder / LOCK_NAME, doing):
            yield
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # it holds the work, or was removed with it
                place.rmdir()


def _holder(path: Path) -> str:
    """`` (process 123 on host)``, or nothing where the lock does not say."""
    with contextlib.suppress(OSError, ValueError):
        process, machine, *_ = path.read_text().split("\n")
        return f" (process {int(process)} on {machine})"
    return ""
