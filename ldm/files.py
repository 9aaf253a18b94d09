"""Atomic writes, hashes, format versions, and checks of input and output folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ldm.errors import LdmError, UsageError


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file in the target's own folder; on success fsync it and rename it to ``path``.

    On an exception the temporary file is removed and ``path`` keeps its previous content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on success rename it to ``path``, which must be absent or empty."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        os.rename(temporary, path)
        fsync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync_folder(path: Path) -> None:
    """Make a rename inside ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file. Raises :class:`LdmError` for a missing or broken one."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise LdmError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LdmError(f"{path} is not readable JSON ({error}); write it again or restore it") from None


def require_version(found: object, known: int, what: str) -> None:
    """Refuse a file of a newer format than this ldm reads; the caller handles older ones.

    Args:
        found: the version that the file carries; None in files written before formats had versions, which count as 0.
        known: the newest version that the caller reads.
        what: the file and its kind, for the message, such as ``shards/manifest.json: the manifest``.

    Raises:
        LdmError: when ``found`` is newer, or no version at all.
    """
    if found is None:
        return
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise LdmError(f"{what} has format version {found!r}, which is not a whole number; write it again or restore it")
    if found > known:
        raise LdmError(
            f"{what} has format version {found}, and this ldm reads up to {known}; install the newer ldm that wrote it"
        )


def sha256_file(path: str | os.PathLike) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(path: str | os.PathLike, suffixes: tuple[str, ...] = (".json", ".safetensors")) -> str:
    """Hex sha256 over names and contents of a folder's files with these suffixes (a model's weights and config)."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")):
        if file.is_file() and file.suffix in suffixes:
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def require_new_folder(path: str | os.PathLike, what: str) -> Path:
    """Return ``path`` if it is absent or an empty folder, else raise :class:`UsageError`."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} already holds other work; give a new folder for {what}, or remove that one first")
    return path


def require_folder(path: str | os.PathLike, what: str) -> Path:
    """Return ``path`` if it is a folder, else raise :class:`UsageError`."""
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder; expected {what}")
    return path
