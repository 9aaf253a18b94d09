"""Samples that cannot be used: recorded and counted; too many of them stop the run."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ldm.data.buckets import TOO_LONG, TOO_SMALL, UNFIT_SHARE
from ldm.errors import LdmError
from ldm.files import open_regular, parse_json

QUARANTINE_NAME = "quarantine.jsonl"
MAX_IN_A_ROW = 100
_SHOWN = 5
_MAX_LINE = 2**20  # bytes

log = logging.getLogger(__name__)


class BadSample(NamedTuple):
    """A sample that cannot be used: its shard (as the user would find it), its key, and a short reason."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key} {self.reason}"

    @property
    def unfit(self) -> bool:
        """Whether it is an image that fits no bucket, and not broken."""
        return TOO_SMALL in self.reason or TOO_LONG in self.reason


def too_many_in_a_row(number: int, last: BadSample, adjustable: bool = True) -> LdmError:
    """The error that stops a run; ``adjustable`` as for :class:`Quarantine`."""
    return LdmError(
        f"{number} samples in a row cannot be used, the last one {last}; repair or remove the shard (`ldm shards check` names "
        f"what is wrong){', or raise max_bad_in_a_row' if adjustable else ''}"
    )


class Quarantine:
    """The bad samples that one process met, each once.

    Each is a line of ``file`` (JSON: shard, key, reason); the first few are logged. :meth:`add` raises :class:`LdmError` for
    too many in a row or in total.
    """

    def __init__(
        self,
        samples: int,
        max_share: float = 0.01,
        max_in_a_row: int = MAX_IN_A_ROW,
        file: str | Path | None = None,
        adjustable: bool = True,
        quiet: bool = False,
    ):
        """
        Args:
            samples: how many this process may meet over all epochs; ``max_share`` is a share of these.
            max_share: bad samples tolerated, 0 to 1; of images that fit no bucket at least :data:`UNFIT_SHARE`.
            max_in_a_row: consecutive bad samples tolerated.
            file: record of them; appended to.
            adjustable: whether the user can raise these limits, for messages.
            quiet: log nothing.
        """
        self.adjustable, self.quiet = adjustable, quiet
        self.samples, self.max_share, self.max_in_a_row = samples, max_share, max_in_a_row
        self.file = None if file is None else Path(file)
        self.known: set[BadSample] = set()
        self._in_a_row = 0
        self._counts: Counter[bool] = Counter()  # of those that are unfit, and of the others

    def __len__(self) -> int:
        return len(self.known)

    def add(self, tried: Iterable[list[BadSample]]) -> None:
        """Count the bad samples that each position of a batch met before a good one: mostly none."""
        for bad in tried:
            if not bad:
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            new = [sample for sample in dict.fromkeys(bad) if sample not in self.known]
            self.known.update(new)
            self._counts.update(sample.unfit for sample in new)
            self._record(new)
            last = bad[-1]
            # in consecutive positions, or at one position in search of a good sample
            if (in_a_row := max(self._in_a_row, len(bad))) > self.max_in_a_row:
                raise too_many_in_a_row(in_a_row, last, self.adjustable)
            share = max(self.max_share, UNFIT_SHARE) if last.unfit else self.max_share
            if (count := self._counts[last.unfit]) > share * self.samples:
                raise LdmError(
                    f"{count} of {self.samples} samples {'fit no bucket' if last.unfit else 'cannot be used'}, more than "
                    f"{share:.2%}, the last one {last}; repair or remove them (`ldm shards check --deep` names them all)"
                    f"{', or raise max_bad_share' if self.adjustable else ''}"
                )

    def _record(self, new: list[BadSample]) -> None:
        for number, sample in enumerate(() if self.quiet else new, start=len(self.known) - len(new)):
            if number < _SHOWN:
                log.warning("skipped %s", sample)
            elif number == _SHOWN:
                log.warning("more samples are skipped; %s", f"{self.file} lists them" if self.file else "no more are named")
        if new and self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(sample._asdict(), ensure_ascii=False) + "\n" for sample in new)
            with open(self.file, "ab+") as file:
                if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                    file.write(b"\n")  # after the half line of a killed process
                file.writelines(line.encode("utf-8", "replace") for line in lines)


def read_quarantine(path: str | Path) -> tuple[list[BadSample], int]:
    """The samples that a :class:`Quarantine` recorded, each once, and the number of lines that cannot be read.

    The last line of a process that was killed may be half written. Raises :class:`LdmError` if the file is no regular one.
    """
    found: dict[BadSample, None] = {}
    unreadable = 0
    with open_regular(path) as file:
        while line := file.readline(_MAX_LINE):
            try:
                found[parse_json(line, f"{path}", BadSample)] = None
            except LdmError:
                unreadable += 1
    return [*found], unreadable
