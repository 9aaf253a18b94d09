"""The logs of a run: metrics, messages, and a record of each start.

``logs/metrics.csv`` and TensorBoard's events continue where a run resumes; ``logs/run.log`` holds the messages and warnings of
the first process (of others: ``run-rank1.log`` …), and ``logs/environment.json`` a record of each start.
"""

from __future__ import annotations

import csv
import logging
import os
import shlex
import subprocess
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from ldm.errors import LdmError, first_line
from ldm.files import atomic_file, read_json, write_json
from ldm.machine import machine_info
from ldm.reporting.metrics_csv import read_rows
from ldm.runs.layout import LOGS, RunFolder

# Of Lightning's loggers rank_zero alone is worth the INFO level; the others report every checkpoint.
LOGGED = ("ldm", "lightning.pytorch", "lightning.fabric")
INFORMATIVE = ("ldm", "lightning.pytorch.utilities.rank_zero")
# time limit for git, in a checkout on a slow disk
GIT_SECONDS = 20

# messages for the log file alone: the command line prints its own
_status = logging.getLogger(f"{__name__}.status")


# -- metrics -------------------------------------------------------------------------------------------------------------


class _Rows(ExperimentWriter):
    """Keeps an existing file and rewrites it atomically; Lightning's writer deletes it, and rewrites it in place."""

    def __init__(self, log_dir: str, resumed_at: int | None):
        self.resumed_at = resumed_at
        super().__init__(log_dir)
        if resumed_at is not None and os.path.exists(self.metrics_file_path):
            self.metrics_keys, rows = read_rows(self.metrics_file_path)
            self._write([row for row in rows if int(row["step"]) < resumed_at])

    def _check_log_dir_exists(self) -> None:
        if self.resumed_at is None:
            Path(self.metrics_file_path).unlink(missing_ok=True)

    def _write(self, rows: Iterable[dict[str, str]]) -> None:
        with atomic_file(self.metrics_file_path, "w") as file:
            writer = csv.DictWriter(file, self.metrics_keys, lineterminator="\r\n")
            writer.writeheader()
            writer.writerows(rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(read_rows(self.metrics_file_path)[1])


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger with one file for a run, however often it is resumed.

    Rows after the checkpoint, which a killed run may have logged, are dropped, since these steps are trained again. A resumed
    run ends with the same rows as one that was never stopped.
    """

    def __init__(self, save_dir: Path, resumed_at: int | None = None):
        """``save_dir``: the folder of the run; ``resumed_at``: step of the checkpoint that it resumes from, if any."""
        super().__init__(save_dir, name="", version=LOGS)
        self.resumed_at = resumed_at

    @property
    @rank_zero_experiment
    def experiment(self):
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir, self.resumed_at)
        return self._experiment


def loggers(out: Path, given: Logger | Iterable[Logger] | bool | None, resumed_at: int | None) -> list[Logger]:
    """The CSV and TensorBoard loggers of every run in ``out``, and those ``given`` as ``trainer.logger``."""
    extra = [given] if isinstance(given, Logger) else [] if given is None or isinstance(given, bool) else list(given)
    return [RunCSVLogger(out, resumed_at), TensorBoardLogger(out, name="", version=LOGS, purge_step=resumed_at or 0), *extra]


# -- records and messages -------------------------------------------------------------------------------------------------


@contextmanager
def recorded(trainer: Trainer, module: LightningModule, command: Sequence[str], resumed_at: int | None) -> Iterator[None]:
    """Log what runs inside, and record how it starts and ends; every process calls it.

    ``command``: words of the command line, without the interpreter; ``resumed_at``: as of :class:`RunCSVLogger`.
    """
    out, first = Path(trainer.default_root_dir), trainer.is_global_zero
    with run_log(out, trainer.global_rank):
        record = start_record(trainer, module, command, resumed_at) if first else {}
        started = "started" if resumed_at is None else f"resumed at step {resumed_at}"
        if first:
            environment = RunFolder(out).environment
            write_json(environment, [*_records(environment), record])
            _status.info("%s: %s", started, record["command"])
        why = f"before max_steps {trainer.max_steps}"
        try:
            yield
        except BaseException as error:
            why = _why(error)
            if isinstance(error, Exception) and not isinstance(error, LdmError):
                _status.error("unexpected error", exc_info=True)
            raise
        else:
            if trainer.max_steps <= trainer.global_step:
                why = ""
        finally:
            step = trainer.global_step
            how = f"stopped at step {step}: {why}" if why else f"finished at step {step}"
            (_status.warning if why else _status.info)(how)
            if first:
                ended = {"time": _now(), "step": step} | ({"why": why} if why else {})
                with suppress(OSError):  # on a full disk the error that led here matters more
                    amend_start(out, **record, ended=ended)


def start_record(trainer: Trainer, module: LightningModule, command: Sequence[str], resumed_at: int | None) -> dict[str, Any]:
    """The environment of a start: plain values that name no folder of the machine but those of ``command``."""
    counts = {name: sum(each.numel() for each in part.parameters()) for name, part in module.named_children()}
    return {
        "started": _now(),
        "resumed_at_step": resumed_at,
        "command": shlex.join(command),
        "processes": trainer.world_size,
        "nodes": trainer.num_nodes,
        "precision": str(trainer.precision),
        "parameters": {name: count for name, count in counts.items() if count},
        "git": git_state(Path(__file__).parents[2]),
        "versions": machine_info(),
    }


def git_state(checkout: Path) -> dict[str, Any] | None:
    """The commit of a checkout and whether tracked files were changed; None where ``checkout`` is not one."""
    if not (checkout / ".git").exists():  # git would search the parent folders
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(checkout, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or a checkout that git does not trust
        return None


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout.strip()


def amend_start(out: Path, **entries: Any) -> None:
    """Add entries to the record of the present start of the run in ``out``."""
    path = RunFolder(out).environment
    *before, last = _records(path) or [{}]
    write_json(path, [*before, last | entries])


def _records(path: Path) -> list[dict[str, Any]]:
    return read_json(path, list[dict[str, Any]]) if path.exists() else []


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _why(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"exit {error.code}"
    if isinstance(error, LdmError) and error.exit_code > 128:  # a signal's
        return "as asked"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)


class _LogFile(logging.FileHandler):
    """Ignores errors of writing: a full disk, or the removed folder of a refused run, is reported elsewhere.

    The logging module would print a traceback for every line.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def _open(self) -> Any:
        # not before the first line: the first process may still have to check that the folder is new
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def run_log(out: Path, rank: int) -> Iterator[None]:
    """Also write the messages of ldm and Lightning, and warnings, to a file of the run.

    Messages of level INFO are those of the first process alone; the file of another process is created with its first warning.
    """
    path = RunFolder(out).log(rank)
    file = _LogFile(path, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    file.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    file.addFilter(lambda record: not record.getMessage().startswith("💡"))  # advertisements
    with ExitStack() as afterwards:
        afterwards.callback(file.close)
        for name in LOGGED:
            logger = logging.getLogger(name)
            if not logger.hasHandlers() and logging.lastResort:  # with the file as its only handler it would print no warnings
                _attach(logger, logging.lastResort, afterwards)
            for console in logger.handlers:
                afterwards.callback(console.setLevel, console.level)
                console.setLevel(max(console.level, logging.WARNING))
            _attach(logger, file, afterwards)
        for name in INFORMATIVE:
            logger = logging.getLogger(name)
            afterwards.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.INFO)
        for logger in (_status, logging.getLogger("py.warnings")):
            afterwards.callback(setattr, logger, "propagate", logger.propagate)
            logger.propagate = False
            _attach(logger, file, afterwards)
        show = warnings.showwarning
        afterwards.callback(setattr, warnings, "showwarning", show)

        def show_and_log(message: Warning | str, category: type[Warning], *place: Any, **where: Any) -> None:
            logging.getLogger("py.warnings").warning("%s: %s", category.__name__, message)
            show(message, category, *place, **where)

        warnings.showwarning = show_and_log
        yield


def _attach(logger: logging.Logger, handler: logging.Handler, afterwards: ExitStack) -> None:
    logger.addHandler(handler)
    afterwards.callback(logger.removeHandler, handler)
