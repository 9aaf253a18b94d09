"""Fetching files over an unreliable network, and a local shard cache of limited size.

fsspec transfers the bytes (aiohttp for http and https, s3fs, gcsfs, huggingface_hub). This file decides which failures are
retried and how long a silent server is waited for, verifies what arrived, and keeps secrets out of messages.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import logging
import os
import random
import re
import string
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from ldm.data.manifest import ShardEntry
from ldm.errors import LdmError, UsageError, first_line
from ldm.files import fsync_folder
from ldm.locks import new_lock

TRANSPORTS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}

# where flock is not implemented (ENOSYS), filelock uses the existence of the file; these it raises
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

_CHUNK = 2**20
_CACHED = re.compile(r"[0-9a-f]{64}\.(tar|part)")
_DEFECTS = (TypeError, AttributeError, NameError, LookupError, AssertionError)
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transfer:
    """Retries and timeouts of a download. Attempt ``n`` is followed by a pause of about ``base_seconds * 2 ** (n - 1)``."""

    attempts: int = 5
    base_seconds: float = 1.0
    connect_seconds: float = 30.0
    read_seconds: float = 30.0  # between two reads: for a server that stops sending, not a slow one

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise UsageError(f"a download needs 1 attempt or more, not {self.attempts}")


DEFAULT_TRANSFER = Transfer()


class MissingError(LdmError):
    """The server has no such file."""


def _cache_folder() -> Path:
    return Path(os.environ.get("LDM_CACHE") or "~/.cache/ldm/shards").expanduser()


@dataclass(frozen=True)
class ShardCache:
    """Remote shards on the local disk, each as ``<sha256>.tar``, at most ``max_bytes`` together.

    ``folder`` is ``$LDM_CACHE`` or ``~/.cache/ldm/shards``. Processes may share it: one downloads a shard while the
    others wait for it, and the least recently used shards are evicted. Open a path soon after it is returned: an open file
    stays readable when it is evicted, others may be gone if ``max_bytes`` is less than the shards in use.
    """

    folder: Path = field(default_factory=_cache_folder)
    max_bytes: int = 50 * 2**30

    def get(self, entry: ShardEntry, url: str, transfer: Transfer = DEFAULT_TRANSFER) -> Path:
        """The shard's local path; a shard not in the cache is first downloaded from ``url`` and verified.

        Raises :class:`LdmError` where it cannot be fetched completely or stored.
        """
        path = self.folder / f"{entry.sha256}.tar"
        try:
            if _use(path, entry.bytes):
                return path
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_lock(path.with_suffix(".lock")):
                if not _use(path, entry.bytes):  # another process may have fetched it meanwhile
                    self._download(entry, url, path, transfer)
            return path
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise LdmError(
                    f"{self.folder} is on a file system without file locks ({error.strerror}); set LDM_CACHE to a folder on a "
                    "local disk"
                ) from None
            raise LdmError(
                f"{self.folder}: {error.strerror or first_line(error)}, while {entry.name} ({entry.bytes:,} bytes) was to be "
                "cached there; free some space or set LDM_CACHE to another folder"
            ) from error

    def _download(self, entry: ShardEntry, url: str, path: Path, transfer: Transfer) -> None:
        part = path.with_suffix(".part")
        path.unlink(missing_ok=True)
        part.unlink(missing_ok=True)  # of a process that was killed: this one has the lock
        try:
            self._reserve(part, entry.bytes)
            fetch(url, entry.bytes, lambda chunks: _store(chunks, part, entry, url), transfer)
            os.replace(part, path)
            fsync_folder(self.folder)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int) -> None:
        """Evict the least recently used shards until ``size`` bytes fit, and reserve them by a sparse file of that length."""
        while True:
            with new_lock(self.folder / "cache.lock"):
                self._remove_abandoned()
                # Only files named by a hash belong to the cache.
                files = [file for file in self.folder.iterdir() if _CACHED.fullmatch(file.name)]
                held = {file: stat for file in files if (stat := _stat(file)) is not None}
                total = sum(stat.st_size for stat in held.values())
                for file in sorted(held, key=lambda file: held[file].st_atime_ns):
                    if file.suffix == ".tar" and total + size > self.max_bytes:
                        file.unlink(missing_ok=True)
                        total -= held[file].st_size
                if total + size <= self.max_bytes:
                    with open(part, "wb") as claim:
                        claim.truncate(size)
                    return
            time.sleep(0.1)  # other processes are filling the cache: their shards can be evicted once they are complete

    def _remove_abandoned(self) -> None:
        """Remove parts whose process is gone: nobody holds their lock."""
        from filelock import Timeout

        for part in self.folder.glob("*.part"):
            try:
                with new_lock(part.with_suffix(".lock"), timeout=0):
                    part.unlink(missing_ok=True)
            except Timeout:
                continue


def fetch(url: str, size: int, take: Callable[[Iterator[bytes]], _T], transfer: Transfer = DEFAULT_TRANSFER) -> _T:
    """``take(chunks)`` of the bytes at ``url``, retried after a pause where the failure may be transient.

    ``take`` is given at most ``size + 1`` bytes: the last one tells that the file is larger. Raises
    :class:`MissingError` where there is no such file, :class:`UsageError` where the transport is not installed and
    :class:`LdmError` where the server refuses or the last attempt failed.
    """
    attempt = 1
    while True:
        try:
            with closing(_read(url, size, transfer)) as chunks:
                return take(chunks)
        except _TransientError as error:
            if attempt >= transfer.attempts:
                raise LdmError(
                    f"{redact(url)} could not be fetched in {attempt} attempts, the last one: {error}; "
                    "check the server or the network and run again: shards fetched so far are kept"
                ) from None
            # Not from the shared generator: seeded training must not depend on the network.
            pause = transfer.base_seconds * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5)
            attempt += 1
            _log.warning("%s: %s; attempt %d of %d in %.1f s", redact(url), error, attempt, transfer.attempts, pause)
        time.sleep(pause)


def transport(url: str) -> Any:
    """The fsspec file system class for a URL; :class:`UsageError` where its package is not installed."""
    import fsspec

    scheme = url.partition(":")[0]
    try:
        return fsspec.get_filesystem_class(scheme)
    except ImportError:
        package = TRANSPORTS[scheme]
        raise UsageError(f"{redact(url)} needs the package {package}; run `pip install {package}`") from None


def redact(url: str) -> str:
    """A URL without user, password and query, for messages; a local path as it is."""
    if "://" not in url:
        return url
    return re.sub(r"//[^/]*@", "//", url, count=1).partition("?")[0]


class _TransientError(Exception):
    """A failure that may not happen again; the message is its reason."""


def _store(chunks: Iterator[bytes], part: Path, entry: ShardEntry, url: str) -> None:
    """Write a shard to ``part`` and verify it."""
    digest, held = hashlib.sha256(), 0
    with open(part, "r+b") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            held += len(chunk)
        if held > entry.bytes:
            raise LdmError(
                f"{redact(url)} has more than the {entry.bytes} bytes that the manifest says; "
                "upload that shard again, or make the manifest again with `ldm shards index`"
            )
        if held < entry.bytes:
            raise _TransientError(f"it ended after {held} of {entry.bytes} bytes")
        if digest.hexdigest() != entry.sha256:
            raise _TransientError("it has other bytes than the manifest's sha256 (was it indexed before its last upload?)")
        file.flush()
        os.fsync(file.fileno())


def _read(url: str, size: int, transfer: Transfer) -> Generator[bytes]:
    left = size + 1
    try:
        with _open(url, transfer) as file:
            while left and (chunk := file.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk
    except LdmError:
        raise
    except Exception as error:  # each transport raises its own exceptions
        while isinstance(error, _DEFECTS) and error.__context__ is not None:
            error = error.__context__  # s3fs fails on a timeout without text: the first exception is the cause
        if isinstance(error, _DEFECTS):
            raise
        raise _classify(url, error) from None  # their text may hold a signed URL


def _open(url: str, transfer: Transfer) -> Any:
    """A binary file at ``url``, from a new file system object: connections must not be shared over a fork."""
    import aiohttp

    system, scheme = transport(url), url.partition(":")[0]
    connect, read = transfer.connect_seconds, transfer.read_seconds
    timeout = aiohttp.ClientTimeout(total=None, connect=connect, sock_connect=connect, sock_read=read)
    if scheme.startswith("http"):
        client = {
            "timeout": timeout,
            "trust_env": True,  # proxies and ~/.netrc, as other tools have it
            # The bytes as they are stored: what a server compressed is not unpacked, however far it would grow.
            "headers": {"Accept-Encoding": "identity"},
            "auto_decompress": False,
        }
        # encoded: a signature holds for the URL as it was written. block_size=0 streams; a size saves the request for it.
        files = system(skip_instance_cache=True, encoded=True, client_kwargs=client)
        return files.open(quote(url, safe=string.punctuation), "rb", block_size=0, size=1)
    options = {
        "s3": {"config_kwargs": {"connect_timeout": connect, "read_timeout": read, "retries": {"total_max_attempts": 1}}},
        "gs": {"session_kwargs": {"timeout": timeout, "trust_env": True}},
    }
    files = system(skip_instance_cache=True, use_listings_cache=False, **options.get(scheme, {}))
    if scheme == "s3":
        files.retries = 1  # its default is five tries within each attempt here, unlogged
    return files.open(url, "rb", block_size=8 * _CHUNK)


def _classify(url: str, error: BaseException) -> Exception:
    """A transient error (503, a reset, a timeout) or a final one (404, 403, a bad URL)."""
    status, kind = _status(error), type(error).__name__
    is_denied = status in (401, 403) or kind in ("NoCredentialsError", "DefaultCredentialsError")
    if status is None:
        text = re.sub(r"\w+://[^\s'\"<>]+", lambda found: redact(found[0]), first_line(error))
        reason = text if text == kind else f"{kind}: {text}"
        # A malformed URL and a certificate that does not hold are ValueErrors.
        is_final = is_denied or isinstance(error, ValueError)
    else:
        reason = f"{status} {http.client.responses.get(status, '')}".strip()
        is_final = status < 500 and status not in (408, 425, 429)
    if not is_final:
        return _TransientError(reason)
    fix = "give credentials that may read it" if is_denied else "check the address"
    stop = MissingError if status == 404 else LdmError
    return stop(f"{redact(url)} cannot be fetched: {reason}; {fix}")


def _status(error: BaseException) -> int | None:
    """The HTTP status behind a failure: each library keeps it elsewhere, or speaks in Python's own errors."""
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, PermissionError):
        return 403
    response = getattr(error, "response", None)
    for value in (getattr(error, "status", None), getattr(error, "code", None), getattr(response, "status_code", None)):
        if isinstance(value, int):
            return value
    return None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _use(path: Path, size: int) -> bool:
    """Whether a shard is completely cached; if so it counts as used now, by its time of access: it has not been written."""
    stat = _stat(path)
    if stat is None or stat.st_size != size:
        return False
    try:
        os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
    except FileNotFoundError:  # evicted this moment
        return False
    return True
