"""When a run's checkpoints are written, and which are kept; :mod:`ldm.runs.checkpoints.files` writes them."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ldm.errors import LdmError, UsageError
from ldm.runs.agreement import agreed
from ldm.runs.checkpoints.files import (
    FORMAT_VERSION,
    VERSION_KEY,
    disk_error,
    point,
    raise_together,
    remove_checkpoint,
    remove_leftovers,
)
from ldm.runs.checkpoints.io import VerifiedCheckpointIO
from ldm.runs.layout import BEST_CHECKPOINT, LAST_CHECKPOINT, RunFolder, checkpoint_name, checkpoints_in, step_of
from ldm.runs.lightning_private import accumulates, current_hook, validate_first, validation_is_due, writes_shards
from ldm.training.base import TrainingModule
from ldm.training.evaluation import evaluation_of
from ldm.training.step import Request

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Writes ``checkpoints/step=00000123.ckpt``, each with its sha256 beside it; ``last.ckpt`` links to the newest.

    Where a validation is due at a step, the checkpoint is written after it: it holds what the validation changed, and a resumed
    run does not validate again. A checkpoint that cannot wait (:meth:`save_now`) records that the validation is owed, and a
    resumed run begins with it. Either way a resumed run does the same as one that was never stopped.
    """

    def __init__(
        self,
        every_steps: int | None = None,
        every_minutes: float | None = 60.0,
        keep_last: int = 2,
        best: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        background: bool = False,
    ):
        """
        Args:
            every_steps: steps between checkpoints (default: one at each validation). One is always written at the end.
            every_minutes: minutes of training between further checkpoints, which are never removed. null: none.
            keep_last: how many of the newest to keep, beside the best one and those of every_minutes.
            best: a metric of validation, such as val/psnr: a checkpoint is also written where it improves, and best.ckpt links
                to that.
            best_mode: whether lower (min) or higher (max) is better.
            background: train on while a checkpoint is written from a copy in host memory; an error is raised at the end of
                the step in which it happens.
        """
        for name, value in (("every_steps", every_steps), ("every_minutes", every_minutes), ("keep_last", keep_last)):
            if value is not None and value <= 0:
                raise UsageError(f"checkpoints.{name} is {value}; give more than 0")
        self.every_steps, self.every_minutes, self.keep_last = every_steps, every_minutes, keep_last
        self.best, self.best_mode, self.background = best, best_mode, background
        self._io = VerifiedCheckpointIO(background)
        # state of the run, kept in checkpoints
        self._best_value = math.nan  # none yet
        self._kept: list[str] = []
        self._seconds = 0.0  # of training since the last checkpoint of every_minutes
        self._owes_validation = False
        # state of this process
        self._started = time.monotonic()
        self._saved_step = -1
        self._wanted = self._keep = self._better = False  # requested since the last one
        self._asked = False  # this process has asked for one of every_minutes, or to raise this error
        self._error: LdmError | None = None  # of the background
        self._ours: list[str] = []  # checkpoints that led to this step
        self._written: tuple[Path, bool] | None = None  # but not linked to yet; whether it is the best

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = RunFolder(Path(trainer.default_root_dir)).checkpoints_folder
        trainer.strategy.checkpoint_io = self._io
        if self.background and writes_shards(trainer.strategy):
            raise UsageError("checkpoints.background: all processes write a sharded checkpoint together; set it to false")
        if stage == "fit" and trainer.is_global_zero:
            remove_leftovers(self._folder)

    # -- when ----------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()
        self._ours = [path.name for path in checkpoints_in(self._folder) if step_of(path) <= trainer.global_step]
        if not trainer.strategy.broadcast(checkpoint_name(trainer.global_step) in self._ours):  # resumed from elsewhere
            self._saved_step = -1
        if not (self._folder / BEST_CHECKPOINT).exists():
            self._best_value = math.nan
        if self._owes_validation:
            validate_first(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self._keep |= self._is_time(trainer)
        if accumulates(trainer):  # the optimiser step is still to come
            return
        step = trainer.global_step
        routine = self.every_steps is not None and step % self.every_steps == 0
        self._wanted |= routine or self._keep or 0 <= trainer.max_steps <= step
        if self._wanted and not validation_is_due(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._better |= self.best is not None and trainer.strategy.broadcast(self._is_better(trainer))
        self._wanted |= self._better or self.every_steps is None
        if self._wanted and not accumulates(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_now(trainer)  # of a run that stopped early

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish the write that is under way, without the other processes, which may not come here."""
        error = self._take_error() or self._finish()
        if error is not None:
            log.error("%s", error)

    def _is_time(self, trainer: Trainer) -> bool:
        """Whether a checkpoint of ``every_minutes`` is due, by the first process's clock. Raises an error of the background."""
        if self.every_minutes is None and not self.background:
            return False
        if not self._io.is_writing:
            self._error = self._error or self._finish()
        timed = self.every_minutes is not None and self._seconds_since_kept() >= 60 * self.every_minutes
        asks = trainer.is_global_zero and (timed or self._error is not None) and not self._asked
        self._asked |= asks
        if not agreed(trainer, Request.CHECKPOINT, asks):
            return False
        self._asked = False
        raise_together(self._take_error())
        return True

    def _take_error(self) -> LdmError | None:
        """The error of a write in the background that is not raised yet."""
        error, self._error = self._error, None
        return error

    def _seconds_since_kept(self) -> float:
        return self._seconds + time.monotonic() - self._started

    def _is_better(self, trainer: Trainer) -> bool:
        metrics = trainer.callback_metrics
        if self.best not in metrics:
            if (evaluation := evaluation_of(trainer)) and self.best in evaluation.names:
                return False  # the first one is still to come
            known = ", ".join(sorted(name for name in metrics if not name.startswith("train/")))
            raise UsageError(f"checkpoints.best {self.best} is no metric of validation; give one of {known}")
        value = float(metrics[self.best])
        first = math.isnan(self._best_value) and not math.isnan(value)
        better = first or (value < self._best_value if self.best_mode == "min" else value > self._best_value)
        if better:
            self._best_value = value
        return better

    # -- how -----------------------------------------------------------------------------------------------------------

    def save_now(self, trainer: Trainer) -> Path:
        """Write the checkpoint of this step before returning. Every process calls it, after a complete step.

        Raises :class:`LdmError` on every process, if it could not be written.
        """
        self._save(trainer)
        raise_together(self._finish())
        return self._folder / checkpoint_name(trainer.global_step)

    def _save(self, trainer: Trainer) -> None:
        raise_together(self._take_error() or self._finish())  # one at a time
        if isinstance(module := trainer.lightning_module, TrainingModule):
            module.settle()  # an error of the last step is not one of writing
        step, error = trainer.global_step, None
        path = self._folder / checkpoint_name(step)
        if step != self._saved_step:
            self._owes_validation = _owes_validation(trainer)
            if self._keep:
                self._kept.append(path.name)
                self._seconds, self._started, self._keep = 0.0, time.monotonic(), False
            try:
                trainer.save_checkpoint(path)
            except LdmError as failure:
                error = failure
                trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others wait
            self._saved_step = step
        if trainer.is_global_zero and error is None:
            self._written = path, self._better
        self._wanted = self._better = False
        if not self.background:
            raise_together(error or self._finish())

    def _finish(self) -> LdmError | None:
        """Wait for the last write, update the links and remove old checkpoints; returns an error instead of raising it."""
        if self._written is None:
            return None
        (path, best), self._written = self._written, None
        try:
            self._io.wait()
            point(self._folder / LAST_CHECKPOINT, path)
            if best:
                point(self._folder / BEST_CHECKPOINT, path)
            self._remove_old(path)
        except LdmError as error:
            return error
        except OSError as error:
            return disk_error(path, error)
        return None

    def _remove_old(self, newest: Path) -> None:
        # Checkpoints of steps that the run went back behind do not count among the newest, nor do broken ones, and are removed
        # once this run is past them. Later ones stay.
        self._ours = [name for name in self._ours if name != newest.name] + [newest.name]
        kept = {*self._ours[-self.keep_last :], *self._kept, (self._folder / BEST_CHECKPOINT).resolve().name}
        for path in checkpoints_in(self._folder):
            if step_of(path) < step_of(newest) and path.name not in kept:
                remove_checkpoint(path)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_value": self._best_value,
            "best": [self.best, self.best_mode],
            "kept": list(self._kept),
            "seconds_since_kept": self._seconds_since_kept(),
            "owes_validation": self._owes_validation,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = list(state_dict["kept"])
        ours = [self.best, self.best_mode]
        if state_dict.get("best", ours) == ours:  # the values of another metric do not compare
            self._best_value = state_dict["best_value"]
        self._seconds, self._owes_validation = state_dict["seconds_since_kept"], state_dict["owes_validation"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[VERSION_KEY] = FORMAT_VERSION

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved_step = checkpoint["global_step"]


def checkpoints_of(trainer: Trainer) -> Checkpoints:
    """The run's callback."""
    callback = trainer.checkpoint_callback
    assert isinstance(callback, Checkpoints)
    return callback


def _owes_validation(trainer: Trainer) -> bool:
    """Whether a checkpoint written now comes before the validation of its step is complete."""
    hook = current_hook(trainer)
    if trainer.validating:
        return hook != "on_validation_end"
    return hook == "on_train_batch_end" and validation_is_due(trainer)
