"""The names in the folder of a run.

Others are named by the code that writes them: ``quarantine.jsonl`` (:mod:`ldm.data.quarantine`), ``skipped.jsonl``
(:mod:`ldm.training.nonfinite`), ``snapshots`` (:mod:`ldm.training.ema`) and the exported model (``TrainingModule.artifact``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from ldm.data.plan import LoaderRecord
from ldm.data.quarantine import QUARANTINE_NAME
from ldm.errors import UsageError
from ldm.files import read_json, read_yaml
from ldm.reporting.metrics_csv import MAX_STEPS

#: a name of its own: Lightning's loggers take it separately
LOGS = "logs"

#: links in the folder of checkpoints
LAST_CHECKPOINT, BEST_CHECKPOINT = "last.ckpt", "best.ckpt"

_CHECKPOINT = re.compile(r"step=(\d+)\.ckpt")
_PREVIEW = re.compile(r"step-(\d+)\.png")


#: steps, samples, parameters of a run; a larger number is an error
Count = Annotated[int, Field(ge=0, le=MAX_STEPS)]


class TrainerConfig(TypedDict):
    """What is read of the ``trainer`` section of a config."""

    max_steps: Annotated[int, Field(ge=-1, le=MAX_STEPS)]
    log_every_n_steps: NotRequired[Count | None]


class SourceConfig(TypedDict):
    """A source among several in the ``data`` section."""

    path: str


class DataConfig(TypedDict):
    """What is read of the ``data`` section."""

    train: NotRequired[str | list[SourceConfig]]
    validation: NotRequired[str]
    default_caption: NotRequired[str | None]


class RunConfig(TypedDict):
    """What is read of a run's config."""

    model: dict[str, Any]
    trainer: TrainerConfig
    data: NotRequired[DataConfig]
    export: NotRequired[str | None]


class Git(TypedDict):
    """The checkout that a run was started from."""

    commit: str
    dirty: bool


class End(TypedDict):
    """How a start of a run ended; ``why``: if before its last step."""

    time: str
    step: Count
    why: NotRequired[str]


class InitialRecord(TypedDict):
    """What a run began with: the name that its config gives it, and :func:`ldm.runs.lineage.weights_hash` of its folder, or the
    sha256 of the checkpoint."""

    name: str
    weights: str


class ExportRecord(TypedDict):
    """The model that a run exported: after how many steps, and :func:`ldm.runs.lineage.weights_hash` of it."""

    step: Count
    weights: str


class Start(TypedDict):
    """A record of a start, see :func:`ldm.runs.logging.start_record`; the last three entries are added when they are known."""

    started: str
    resumed_at_step: Count | None
    command: str
    processes: Count
    precision: str
    parameters: NotRequired[dict[str, Count]]
    git: Git | None
    versions: dict[str, str]
    ended: NotRequired[End]
    data: NotRequired[LoaderRecord]
    initial: NotRequired[InitialRecord]
    exported: NotRequired[ExportRecord]


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

    def read_config(self) -> RunConfig:
        """The resolved config. Raises :class:`UsageError` if there is none, :class:`LdmError` for a broken one."""
        if not self.config.exists():
            raise UsageError(
                f"{self.path} is not the folder of a run: {self.config} is not there; give the folder that --out of fit named"
            )
        return read_yaml(self.config, RunConfig)

    def read_starts(self) -> list[Start]:
        """A record of each start; runs of older versions have none. Raises :class:`LdmError` for a broken file."""
        return read_json(self.environment, list[Start]) if self.environment.exists() else []

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
