"""The names in the folder of a run.

Others are named by the code that writes them: ``quarantine.jsonl`` (:mod:`ldm.data.quarantine`), ``skipped.jsonl``
(:mod:`ldm.training.nonfinite`), ``snapshots`` (:mod:`ldm.training.ema`) and the exported model (``TrainingModule.artifact``).
"""

from __future__ import annotations

import re
from pathlib import Path

from ldm.data.quarantine import QUARANTINE_NAME

#: a name of its own: Lightning's loggers take it separately
LOGS = "logs"

#: links in the folder of checkpoints
LAST_CHECKPOINT, BEST_CHECKPOINT = "last.ckpt", "best.ckpt"

_CHECKPOINT = re.compile(r"step=(\d+)\.ckpt")
_PREVIEW = re.compile(r"step-(\d+)\.png")


class RunFolder:
    """Paths in the folder of a run, ``--out`` of ``fit``."""

    def __init__(self, path: Path):
        self.path, self.logs = path, path / LOGS
        self.config = self.logs / "config.yaml"  # resolved
        self.metrics = self.logs / "metrics.csv"
        self.environment = self.logs / "environment.json"  # a record of each start of the run
        self.previews_folder, self.checkpoints_folder = path / "previews", path / "checkpoints"
        self.last_checkpoint = self.checkpoints_folder / LAST_CHECKPOINT  # a link to the newest
        self.best_checkpoint = self.checkpoints_folder / BEST_CHECKPOINT  # a link to the best by ``checkpoints.best``

    def log(self, rank: int = 0) -> Path:
        """Log messages and warnings of a process."""
        return self.logs / ("run.log" if rank == 0 else f"run-rank{rank}.log")

    def other_logs(self) -> list[Path]:
        """Logs of the processes after the first; a process without warnings has none."""
        return sorted(self.logs.glob("run-rank*.log"))

    def preview(self, step: int) -> Path:
        return self.previews_folder / f"step-{step:08d}.png"

    def previews(self) -> list[tuple[int, Path]]:
        """(step, file), the oldest first."""
        return _by_step(self.previews_folder, _PREVIEW)

    def quarantines(self) -> list[Path]:
        """Files of the samples that could not be used, one a process."""
        return sorted(self.path.glob(f"*{QUARANTINE_NAME}"))


def checkpoint_name(step: int) -> str:
    """As ``step=00000123.ckpt``: a file, or a folder where it is sharded."""
    return f"step={step:08d}.ckpt"


def is_checkpoint(path: Path) -> bool:
    """Whether a path has the name of a checkpoint."""
    return _CHECKPOINT.fullmatch(path.name) is not None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint.name} is not the name of a checkpoint")
    return int(match[1])


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, not verified, the oldest first."""
    return [path for _, path in _by_step(folder, _CHECKPOINT)]


def _by_step(folder: Path, name: re.Pattern[str]) -> list[tuple[int, Path]]:
    found = ((name.fullmatch(path.name), path) for path in folder.glob("*"))
    return sorted((int(match[1]), path) for match, path in found if match)
