"""The journal of an unfinished pack: killed at any moment and started again, it resumes.

While a folder is being packed it holds complete shards, ``quarantine.jsonl`` so far, and the journal: one line with the request
and the hash of the listing, then one line for each complete shard, synced after it. Work since the last such line is repeated.
The manifest is written last; then the journal is removed. Shards of a validation set are in a folder inside, packed after the
others.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from ldm.data.manifest import PACK_JOURNAL_NAME as JOURNAL_NAME
from ldm.data.manifest import Manifest, ShardEntry
from ldm.data.quarantine import QUARANTINE_NAME
from ldm.errors import LdmError, UsageError
from ldm.files import LOCK_NAME, fsync_folder, parse_json, require_new_folder
from ldm.locks import hold_folder

_VERSION = 3

T = TypeVar("T")


@dataclass(frozen=True)
class _Header:
    """The first line of the journal: what is packed, and how."""

    version: int
    request: dict[str, Any]
    listing: str


@dataclass(frozen=True)
class _Done:
    """A line for a complete shard, with heights and widths of its images in turn, and the counts so far."""

    folder: str
    shard: ShardEntry
    sizes: list[int]
    consumed: int
    enlarged: int
    quarantine_bytes: int
    named: dict[str, int] = field(default_factory=dict)


class Journal:
    """A context manager that claims ``out``, new or with the same pack unfinished in it, for this process alone.

    On an exception everything is kept for the next run; an OSError becomes an :class:`LdmError` that says so.

    Attributes:
        entries: the complete shards of each folder ("" is ``out`` itself); the writers share the lists.
        sizes: heights and widths in turn of the images in each folder; the caller appends them.
        consumed: items done, packed or quarantined; the caller increments it.
        enlarged: images in each folder that were scaled up; the caller increments it.
        named: images in each folder that have a caption of each name; the caller increments it.
    """

    def __init__(self, out: Path, request: dict[str, Any], listing: str) -> None:
        """``request``: every option that changes the bytes, as JSON values; ``listing``: hash of the source's listing."""
        self.out = out
        self.entries: defaultdict[str, list[ShardEntry]] = defaultdict(list)
        self.sizes: defaultdict[str, array[int]] = defaultdict(lambda: array("i"))  # 8 bytes an image
        self.enlarged: defaultdict[str, int] = defaultdict(int)
        self.named: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.consumed = 0
        self._header = {"version": _VERSION, "request": request, "listing": listing}
        self._quarantine_bytes = 0

    def __enter__(self) -> Journal:
        """
        Raises:
            UsageError: ``out`` holds other work, an unfinished pack with other options, or one that is running.
            LdmError: its journal or its shards are damaged.
        """
        with ExitStack() as stack:
            stack.enter_context(hold_folder(self.out, f"packing into {self.out}"))
            require_claimable(self.out)  # the process that held the lock may have finished meanwhile
            self._file = stack.enter_context(open(self.out / JOURNAL_NAME, "a+b"))
            self._read()
            self._check_files()
            self._quarantine = stack.enter_context(open(self.out / QUARANTINE_NAME, "ab"))
            self._quarantine.truncate(self._quarantine_bytes)
            self._quarantine.seek(0, os.SEEK_END)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        try:
            self._open.close()
        except OSError as failed:  # buffered bytes did not fit on a full disk
            error = failed
        if isinstance(error, OSError):
            fix = "fix that and run the same command again to resume"
            raise LdmError(f"{self.out} cannot be written ({error.strerror}); {fix}") from error

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        self._file.truncate(whole)  # drop a line cut short by a kill
        if not whole:
            if any(path.name not in (JOURNAL_NAME, LOCK_NAME) for path in self.out.iterdir()):
                (self.out / JOURNAL_NAME).unlink()
                require_claimable(self.out)
            self._append(self._header)
            return fsync_folder(self.out)
        header, *lines = data[:whole].splitlines()
        self._require_same(self._parsed(header, _Header))
        for line in lines:
            done = self._parsed(line, _Done)
            self.entries[done.folder].append(done.shard)
            self.sizes[done.folder].extend(done.sizes)
            self.enlarged[done.folder], self.named[done.folder] = done.enlarged, Counter(done.named)
            self.consumed, self._quarantine_bytes = done.consumed, done.quarantine_bytes

    def _parsed(self, line: bytes, kind: type[T]) -> T:
        try:
            return parse_json(line, JOURNAL_NAME, kind)
        except LdmError:
            raise LdmError(f"{self.out / JOURNAL_NAME} is damaged; remove {self.out} and pack again") from None

    def _require_same(self, header: _Header) -> None:
        unfinished = f"{self.out} holds an unfinished pack"
        fix = f"give another folder, or remove {self.out} to start over"
        if header.version != _VERSION:
            raise UsageError(f"{unfinished} of another version of ldm; {fix}")
        for name, asked in self._header["request"].items():
            before = header.request.get(name)
            if before != asked:
                raise UsageError(f"{unfinished} with {name} {before}, not {asked}; use the same to resume, {fix}")
        if header.listing != self._header["listing"]:
            raise UsageError(f"{unfinished}, and the source has changed since; {fix}")

    def _check_files(self) -> None:
        sizes = {os.path.join(folder, entry.name): entry.bytes for folder in self.entries for entry in self.entries[folder]}
        sizes[QUARANTINE_NAME] = self._quarantine_bytes
        for name, size in sizes.items():
            path = self.out / name
            there = path.stat().st_size if path.is_file() else 0
            # the quarantine may have grown after the last shard
            other = os.path.lexists(path) and not path.is_file()
            if other or there < size or (there != size and name != QUARANTINE_NAME):
                raise LdmError(f"{path} is missing or was changed; restore it, or remove {self.out} and pack again")
        for left in self.out.rglob(".*.tmp"):  # left by a killed run
            left.unlink()

    def quarantine(self, file: str, reason: str) -> None:
        """Record an item that cannot be used."""
        self._quarantine.write(json.dumps({"file": file, "reason": reason}, ensure_ascii=False).encode() + b"\n")

    def record(self, folder: str, entry: ShardEntry) -> None:
        """A shard is complete. It, those before it and the quarantine hold all items consumed so far."""
        _sync(self._quarantine)
        counts = {"consumed": self.consumed, "enlarged": self.enlarged[folder], "named": self.named[folder]}
        counts |= {"quarantine_bytes": self._quarantine.tell()}
        sizes = self.sizes[folder][-2 * entry.samples :].tolist()
        self._append({"folder": folder, "shard": asdict(entry), "sizes": sizes} | counts)

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        _sync(self._file)

    def finish(self, manifests: dict[str, Manifest]) -> None:
        """Write the folders' manifests, that of ``out`` last, and remove the journal."""
        for folder in sorted(manifests, reverse=True):
            manifests[folder].save(self.out / folder)
        (self.out / JOURNAL_NAME).unlink()
        fsync_folder(self.out)

    def abandon(self) -> None:
        """Nothing to pack: restore ``out`` as it was."""
        (self.out / QUARANTINE_NAME).unlink()
        (self.out / JOURNAL_NAME).unlink()


def require_claimable(out: str | os.PathLike) -> Path:
    """``out``, or what it links to. Raises :class:`UsageError` where it holds other work than an unfinished pack, or cannot be
    made."""
    if os.path.isfile(os.path.join(out, JOURNAL_NAME)):
        return Path(out)
    return require_new_folder(out, "image shards", in_place=True)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
