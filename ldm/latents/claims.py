"""An export that is under way: which shards stand, and which process works on which, told by files in its folder alone.

Any number of processes may work on one export, started together (torchrun, SLURM) or one after another, on one machine or on
several that share the folder. A process claims a shard by a file lock, which the kernel takes back from a dead one; a shard is
finished when its record stands. So whatever a dead process held is taken up by the others, or by the next run.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ldm.data.manifest import MANIFEST_NAME
from ldm.errors import LdmError, UsageError
from ldm.files import read_json, require_new_folder, write_json

# what an export that is not finished keeps in its folder; it goes when the manifest stands
WORK_NAME = ".export"
POLL_SECONDS = 0.5


class Claims:
    """The shards of one export, by number, shared out among processes."""

    def __init__(self, out: Path, request: dict[str, Any], shards: int, rank: int = 0, world_size: int = 1):
        """Make ``out`` this export's, or find in it the same one unfinished.

        Args:
            out: the folder.
            request: every choice that shapes the bytes, as JSON values.
            shards: how many there are.
            rank, world_size: a process begins with every ``world_size``-th shard from ``rank`` on, and then helps the others.

        Raises:
            UsageError: ``out`` holds other work.
        """
        self.out, self.work, self.shards = out, out / WORK_NAME, shards
        self._locks: dict[int, FileLock] = {}
        # its own first
        self._order = sorted(range(shards), key=lambda number: ((number - rank) % world_size != 0, number))
        self._begin(request)

    def _begin(self, request: dict[str, Any]) -> None:
        if self.is_done:  # by others, before this process had started; or by an earlier run
            before = self._finished_request()
            if before is None:
                require_new_folder(self.out, "latent shards")  # raises: the folder holds a manifest
            return self._require_same("a finished", before or {}, request)
        try:
            require_new_folder(self.out, "latent shards")
        except UsageError:
            if self.is_done:
                return self._begin(request)
            if not self.work.is_dir():  # there, another process may have begun on it just now
                raise
        asked = self.work / "request.json"
        with FileLock(self.work / "claim.lock"):
            if not asked.is_file() and not self.is_done:
                write_json(asked, request)
        try:
            before = read_json(asked)
        except LdmError:
            if not self.is_done:
                raise
            return self._begin(request)
        return self._require_same("an unfinished", before, request)

    def _finished_request(self) -> dict[str, Any] | None:
        """What the export was asked for that stands in the folder; None where that is something else."""
        try:
            manifest = read_json(self.out / MANIFEST_NAME)
        except LdmError:
            return None
        return manifest.get("request") if isinstance(manifest, dict) else None

    def _require_same(self, which: str, before: dict[str, Any], request: dict[str, Any]) -> None:
        for name, value in request.items():
            if before.get(name) != value:
                raise UsageError(
                    f"{self.out} holds {which} export of other things ({name.replace('_', ' ')}: {before.get(name)}, not "
                    f"{value}); ask for the same to go on, give another --out, or remove {self.out} to start over"
                )

    @property
    def is_done(self) -> bool:
        """Whether the manifest stands, which is written last."""
        return (self.out / MANIFEST_NAME).is_file()

    def _record(self, number: int) -> Path:
        return self.work / f"{number:05d}.json"

    def missing(self) -> list[int]:
        """The shards that nobody has finished, those of this process first."""
        there = {entry.name for entry in os.scandir(self.work)} if self.work.is_dir() else set()
        return [number for number in self._order if self._record(number).name not in there]

    def take(self) -> int | None:
        """A shard that is not finished, from now on this process's; None where others work on all that are left."""
        for number in self.missing():
            if number in self._locks:
                continue
            lock = FileLock(self.work / f"{number:05d}.lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                continue
            # it may have been finished, and even all of them, between the look and the lock
            if self.is_done or self._record(number).is_file():
                lock.release()
                continue
            self._locks[number] = lock
            return number
        return None

    def finish(self, number: int, record: dict[str, Any]) -> None:
        """Shard ``number`` stands; ``record`` is what the manifest will need of it."""
        write_json(self._record(number), record)
        self._locks.pop(number).release()

    def forget(self, number: int) -> None:
        """Shard ``number`` does not stand after all."""
        self._record(number).unlink(missing_ok=True)

    def records(self) -> list[dict[str, Any]]:
        """What is on record of the shards that stand, in their order."""
        numbers = set(range(self.shards)) - set(self.missing())
        return [read_json(self._record(number)) for number in sorted(numbers)]

    def wait(self) -> None:
        """A little, for what other processes do."""
        time.sleep(POLL_SECONDS)

    def alone(self) -> FileLock:
        """A lock for what one process shall do."""
        return FileLock(self.work / "finish.lock")

    def release(self) -> None:
        """Let go of what is not finished; where all is done, of everything that was kept for it."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()
        if self.is_done:
            shutil.rmtree(self.work, ignore_errors=True)
