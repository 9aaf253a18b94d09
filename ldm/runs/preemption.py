"""A run that is asked to stop saves first: by SIGTERM or SIGUSR1, as clusters send them, or by Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment

from ldm.errors import LdmError, first_line
from ldm.runs.checkpoints.callback import checkpoints_of
from ldm.runs.lightning_private import accumulates, ignore_after_training, log_step_metrics

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One Ctrl-C reaches a process twice where torchrun sends it on.
SAME_KEYPRESS_SECONDS = 1.0
# SLURM's own patience after it has asked a job to end is 30 s by default.
REQUEUE_SECONDS = 15.0


class Preempted(LdmError):
    """The run was asked to stop, and has saved. Exit code 143, as of a process that SIGTERM has ended."""

    exit_code = 128 + signal.SIGTERM


class Interrupted(Preempted):
    """The same by Ctrl-C. Exit code 130."""

    exit_code = 128 + signal.SIGINT


class Preemption(Callback):
    """Saves and stops all processes together where one of them is asked to: at the end of a step, or amidst a validation.

    SIGTERM and SIGUSR1, to any process: the first one raises :class:`Preempted`, the others leave without a word. Under SLURM
    the job is put back in the queue. Ctrl-C (SIGINT): :class:`Interrupted`, and no queue; a second one raises
    KeyboardInterrupt at once.

    A signal itself does no more than leave a mark. Lightning's own handlers, which speak to the other processes from
    wherever this one happens to be, are in force until training starts, and put back when it ends.
    """

    def __init__(self) -> None:
        self._asked: dict[int, float] = {}  # signals that came, and when

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self._asked)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._speaks = trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # Lightning puts back what was there, whichever way training ends
                signal.signal(number, self._mark)

    def _mark(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._asked.setdefault(number, now)
        if number != signal.SIGINT:
            return
        if now - first > SAME_KEYPRESS_SECONDS:
            raise KeyboardInterrupt
        if now == first and self._speaks:
            # not by print: a handler may have interrupted one
            os.write(2, b"\nldm: saving; once more to stop now\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_where_asked(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit":
            self._stop_where_asked(trainer)

    def _stop_where_asked(self, trainer: Trainer) -> None:
        """Not in the midst of a step, of which half the gradients would be lost; nor after the last one: a run whose steps are
        all done would not be taken up for what it owes, so it is brought to its end."""
        if accumulates(trainer) or 0 <= trainer.max_steps <= trainer.global_step or not self._agreed(trainer):
            return
        if trainer.validating:
            trainer.lightning_module.on_validation_model_train()  # to what is trained, and is to be saved
        self._stop(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Preempted) or trainer.world_size > 1:
            # A launcher sends these to the rest as soon as one process has left, and there may be something to say yet.
            # Among the handlers that Lightning puts back they are ignored from the very moment in which ours are gone.
            ignore_after_training(trainer, signal.SIGTERM, signal.SIGUSR1)

    def _agreed(self, trainer: Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self.asked, all=False)

    def _stop(self, trainer: Trainer) -> None:
        """Save and leave. All processes come here together."""
        preempted = trainer.strategy.reduce_boolean_decision(bool(self._asked.keys() - {signal.SIGINT}), all=False)
        checkpoint = checkpoints_of(trainer).save_now(trainer)
        if not trainer.validating:
            log_step_metrics(trainer)
        reason = Preempted if preempted else Interrupted
        said = f"stopped at step {trainer.global_step} as asked; {checkpoint} is saved: go on with --resume latest"
        if trainer.is_global_zero and preempted:
            said += requeue()
        trainer.strategy.barrier("stop")  # a launcher that sees one process leave may end the others
        if trainer.is_global_zero:
            raise reason(said)
        raise SystemExit(reason.exit_code)


def requeue() -> str:
    """Put this job back in SLURM's queue, if it is one of SLURM's; returns what is to be said of it.

    Nothing is done, nor said, elsewhere and in interactive jobs.
    """
    if SLURMEnvironment.job_id() is None:
        return ""
    array, task = (os.environ.get(f"SLURM_ARRAY_{what}_ID") for what in ("JOB", "TASK"))
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=REQUEUE_SECONDS)
    except subprocess.CalledProcessError as error:
        why = " ".join((error.stderr or error.stdout).split()) or f"status {error.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        why = first_line(error)
    else:
        return f"; job {job} is in SLURM's queue again"
    return f"; {' '.join(command)} failed ({why}): submit the job again"
