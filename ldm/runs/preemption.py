"""Stop on SIGTERM or SIGUSR1, as clusters send them, or on Ctrl-C, after saving a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment

from ldm.data.datamodule import ShardDataModule, datamodule_of
from ldm.errors import LdmError, first_line
from ldm.runs.agreement import agreed
from ldm.runs.checkpoints.callback import checkpoints_of
from ldm.runs.lightning_private import accumulates, ignore_after_training, log_step_metrics, without_sigterm_exchange
from ldm.training.base import TrainingModule
from ldm.training.step import Request

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# torchrun forwards Ctrl-C to processes that have received it already.
SAME_KEYPRESS_SECONDS = 1.0
# A batch that comes within them is trained on before the run stops.
WAIT_SECONDS = 5.0
# After it has asked a job to end, SLURM waits 30 s by default.
REQUEUE_SECONDS = 15.0


class Preempted(LdmError):
    """The run was asked to stop and has saved. Exit code 143, that of a process ended by SIGTERM."""

    exit_code = 128 + signal.SIGTERM


class Interrupted(Preempted):
    """:class:`Preempted` by Ctrl-C. Exit code 130."""

    exit_code = 128 + signal.SIGINT


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise :class:`Preempted` where no step is under way: before training, and while the model is exported."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Preempted("ended by SIGTERM; the same command with --resume latest resumes from the last checkpoint")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:  # not where Preemption.on_exception had it ignored up to the end
            signal.signal(signal.SIGTERM, before)


class Preemption(Callback):
    """Saves and stops all processes when one of them receives a signal, at the end of a step or within a validation.

    Several processes agree on it by the vector that every step exchanges, and stop a step or two later.

    After SIGTERM or SIGUSR1 the first process raises :class:`Preempted` and the others exit silently; under SLURM the job is
    requeued. After Ctrl-C (SIGINT) it raises :class:`Interrupted`, without requeueing; a second one raises KeyboardInterrupt
    at once.

    The handlers only record the signal. Lightning's own, which communicate with other processes from any point of the
    program, are in force before and after training.
    """

    def __init__(self) -> None:
        self._received: dict[int, float] = {}  # signals, and when they first came

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prints = trainer.is_global_zero
        without_sigterm_exchange(trainer)
        if isinstance(pl_module, TrainingModule):
            pl_module.pause = lambda: self._stop_if_asked(trainer)
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # Lightning restores the previous ones
                signal.signal(number, self._record)
            if isinstance(data := datamodule_of(trainer), ShardDataModule):
                data.on_wait = lambda: self._stop_waiting(trainer)

    def _record(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._received.setdefault(number, now)
        if number != signal.SIGINT:
            return
        if now - first > SAME_KEYPRESS_SECONDS:
            raise KeyboardInterrupt
        if now == first and self._prints:
            # print is not reentrant
            os.write(2, b"\nldm: saving; press Ctrl-C again to stop now\n")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.state.fn == "fit":
            self._stop_if_asked(trainer)

    def _stop_waiting(self, trainer: Trainer) -> None:
        """While a batch does not come, nothing else would answer a signal: this process saves if it can, and ends."""
        received = dict(self._received)
        if not received or time.monotonic() - min(received.values()) < WAIT_SECONDS:
            return
        reason, step = Preempted if received.keys() - {signal.SIGINT} else Interrupted, trainer.global_step
        saved = "the last checkpoint is kept"
        alone = trainer.world_size == 1 and threading.current_thread() is threading.main_thread()
        if alone and step and not trainer.validating and not accumulates(trainer):
            saved = f"{checkpoints_of(trainer).save_now(trainer)} is saved"
        raise reason(f"stopped at step {step} as asked, while it waited for data; {saved}: resume with --resume latest")

    def _stop_if_asked(self, trainer: Trainer) -> None:
        """Save and exit, all processes together, if any of them was asked to.

        Not while gradients accumulate, which would be lost; nor after the last step, where the run finishes instead.
        """
        received = self._received.keys()
        if accumulates(trainer) or 0 <= trainer.max_steps <= trainer.global_step:
            return
        if not agreed(trainer, Request.STOP, bool(received)):
            return
        if trainer.validating:
            trainer.lightning_module.on_validation_model_train()  # back to the trained weights, which are to be saved
        preempted = trainer.strategy.reduce_boolean_decision(bool(received - {signal.SIGINT}), all=False)
        checkpoint = checkpoints_of(trainer).save_now(trainer)
        if not trainer.validating:
            log_step_metrics(trainer)
        reason = Preempted if preempted else Interrupted
        message = f"stopped at step {trainer.global_step} as asked; {checkpoint} is saved: resume with --resume latest"
        if trainer.is_global_zero and preempted:
            message += requeue()
        trainer.strategy.barrier("stop")  # a launcher that sees one process exit may end the others
        if trainer.is_global_zero:
            raise reason(message)
        raise SystemExit(reason.exit_code)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Preempted) or trainer.world_size > 1:
            # A launcher sends these to the other processes as soon as one has exited, which may still have to print their
            # error. Set among the handlers that Lightning restores, the ignoring begins without a gap.
            ignore_after_training(trainer, signal.SIGTERM, signal.SIGUSR1)


def requeue() -> str:
    """Requeue this job of SLURM; returns the end of the message, empty outside of SLURM and in interactive jobs."""
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
        return f"; SLURM job {job} is requeued"
    return f"; {' '.join(command)} failed ({why}): submit the job again"
