"""Processes that share the shards of one export, coordinated by files in the output folder alone.

Any number of processes may work on one export, started together (torchrun, SLURM) or one after another, on one machine or on
several that share the folder. A process claims a shard by a file lock, which the kernel releases when the process dies; a shard
is finished when its record is written. So the others, or the next run, take over the shards of a dead process.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ldm.data.manifest import MANIFEST_NAME
from ldm.errors import LdmError, UsageError
from ldm.files import read_json, require_new_folder, write_json
from ldm.locks import new_lock

# the records and locks of an unfinished export; removed once the manifest is written
WORK_NAME = ".export"
POLL_SECONDS = 0.5


def require_place(out: Path) -> None:
    """Raise :class:`UsageError` where no export can begin, and none has begun."""
    try:
        require_new_folder(out, "latent shards", in_place=True)
    except UsageError:
        if not any(os.path.exists(out / name) for name in (MANIFEST_NAME, WORK_NAME)):
            raise


class Claims:
    """The shards of one export, by number, and those that this process has claimed."""

    def __init__(self, out: Path, request: dict[str, Any], shards: int, rank: int = 0, world_size: int = 1):
        """Start an export in ``out``, or join the same one that is unfinished there.

        Args:
            out: the folder.
            request: every setting that changes the bytes, as JSON values.
            shards: how many there are.
            rank, world_size: a process begins with every ``world_size``-th shard from ``rank`` on, then helps the others.

        Raises:
            UsageError: ``out`` holds other work.
        """
        self.out, self.work, self.shards = out, out / WORK_NAME, shards
        self._locks: dict[int, FileLock] = {}
        # its own first
        self._order = sorted(range(shards), key=lambda number: ((number - rank) % world_size != 0, number))
        self._begin(request)

    def _begin(self, request: dict[str, Any]) -> None:
        if self.is_done:  # by other processes before this one started, or by an earlier run
            if (before := self._finished_request()) is None:  # the manifest is of something else
                raise UsageError(f"{self.out} already holds other work; give a new folder for latent shards")
            return self._require_same("a finished", before, request)
        require_place(self.out)  # another process may have started this moment
        if self.is_done:
            return self._begin(request)
        asked = self.work / "request.json"
        self.work.mkdir(parents=True, exist_ok=True)
        with new_lock(self.work / "claim.lock"):
            if not asked.is_file() and not self.is_done:
                write_json(asked, request)
        try:
            before = read_json(asked, dict[str, Any])
        except LdmError as error:
            if not self.is_done:
                raise LdmError(f"{error}, or remove {self.out} to start over") from None
            return self._begin(request)
        return self._require_same("an unfinished", before, request)

    def _finished_request(self) -> dict[str, Any] | None:
        """The request of the finished export in the folder; None where the manifest is of something else."""
        try:
            request = read_json(self.out / MANIFEST_NAME, dict[str, Any]).get("request")
        except LdmError:
            return None
        return request if isinstance(request, dict) else None

    def _require_same(self, which: str, before: dict[str, Any], request: dict[str, Any]) -> None:
        for name in {**request, **before}:
            if before.get(name) != (value := request.get(name)):
                raise UsageError(
                    f"{self.out} holds {which} export with other settings ({name.replace('_', ' ')}: {before.get(name)}, not "
                    f"{value}); use the same settings to resume, give another folder, or remove {self.out} to start over"
                )

    @property
    def is_done(self) -> bool:
        """Whether the manifest exists, which is written last."""
        return (self.out / MANIFEST_NAME).is_file()

    def _record(self, number: int) -> Path:
        return self.work / f"{number:05d}.json"

    def missing(self) -> list[int]:
        """The unfinished shards, those of this process first."""
        there = {entry.name for entry in os.scandir(self.work)} if self.work.is_dir() else set()
        return [number for number in self._order if self._record(number).name not in there]

    def take(self) -> int | None:
        """Claim an unfinished shard; None where other processes have claimed all that are left."""
        for number in self.missing():
            if number in self._locks:
                continue
            lock = new_lock(self.work / f"{number:05d}.lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                continue
            # another process may have finished it, or the whole export, since it was listed as missing
            if self.is_done or self._record(number).is_file():
                lock.release()
                continue
            self._locks[number] = lock
            return number
        return None

    def finish(self, number: int, record: dict[str, Any]) -> None:
        """Shard ``number`` is written; ``record`` is what the manifest needs of it."""
        write_json(self._record(number), record)
        self._locks.pop(number).release()

    def forget(self, number: int) -> None:
        """Shard ``number`` was lost: it counts as unfinished again."""
        self._record(number).unlink(missing_ok=True)

    def records(self, schema: Any = Any) -> list[Any]:
        """The records of the finished shards, in order; ``schema`` as :func:`ldm.files.read_json` takes it."""
        numbers = set(range(self.shards)) - set(self.missing())
        try:
            return [read_json(self._record(number), schema) for number in sorted(numbers)]
        except LdmError as error:
            raise LdmError(f"{error}, or remove that file and run the same command again") from None

    def exclusive(self) -> FileLock:
        """A lock for what only one process may do at a time."""
        return new_lock(self.work / "finish.lock")

    def release(self) -> None:
        """Release all claims; once the export is finished, remove the work folder too."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()
        if self.is_done:
            shutil.rmtree(self.work, ignore_errors=True)
