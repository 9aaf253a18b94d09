"""What torch says when a run fails, in a line that names the mend; and no process that outlives a failed run."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ldm.errors import LdmError, first_line
from ldm.machine import is_out_of_memory
from ldm.runs.preemption import Preempted

# seconds that a process has to end by itself, and one that is to be killed for its own error
PATIENCE, LAST_WORDS = 15.0, 3.0
# gloo has no exception of its own: its errors carry the path of its source
GLOO = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")


def explain(error: BaseException, trainer: Trainer) -> LdmError | None:
    """A failure that the user can see to, as one line; None for any other, whose traceback is wanted."""
    if isinstance(error, LdmError):
        return None
    where = f"at step {trainer.global_step}" + (f" on rank {trainer.global_rank}" if trainer.world_size > 1 else "")
    if is_out_of_memory(error):
        return LdmError(f"out of memory {where}: {'; '.join(_memory_knobs(trainer))}")
    if not isinstance(error, RuntimeError):
        return None
    if isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in GLOO):
        return LdmError(f"{_lost(where)} ({first_line(error)})")
    if "DataLoader worker" in str(error):
        return LdmError(
            f"a loader process was lost {where}: {first_line(error)} Where memory ran out, lower data.workers or "
            "data.batch_size; go on with --resume latest"
        )
    return None


def _lost(where: str) -> str:
    return (
        f"a process of this run has gone or does not answer, as seen {where}: look what it said last, and go on with "
        "--resume latest"
    )


def _memory_knobs(trainer: Trainer) -> Iterator[str]:
    settings = inspect.signature(type(trainer.lightning_module).__init__).parameters
    yield "lower data.batch_size"
    if "accumulate" in settings:
        yield "raise model.accumulate, which trains the same batch in pieces"
    else:
        yield "raise trainer.accumulate_grad_batches by as much, for the same training"
    if "gradient_checkpointing" in settings:
        yield "set model.gradient_checkpointing to true"
    if "bf16" not in str(trainer.precision):
        yield "set trainer.precision to bf16-mixed"


@contextmanager
def orderly(trainer: Trainer) -> Iterator[None]:
    """Around ``trainer.fit``: :func:`explain` its failures, and leave no process behind."""
    children = _Children(trainer)
    children.start()
    try:
        yield
    except BaseException as error:
        children.end(PATIENCE if isinstance(error, Preempted) else LAST_WORDS)
        explained = explain(error, trainer)
        if explained is None:
            raise
        raise explained from error
    finally:
        children.leave()


class _Children(threading.Thread):
    """Watches the processes that Lightning started from this one: ``--trainer.devices N`` without torchrun.

    It takes them over from Lightning's observer, which kills this process when one of them has failed, whatever it has to say.
    """

    def __init__(self, trainer: Trainer):
        super().__init__(name="ldm-children", daemon=True)
        self._trainer, self._launcher = trainer, trainer.strategy.launcher
        starts = isinstance(self._launcher, _SubprocessScriptLauncher)
        self._starts_some = starts and not self._launcher.cluster_environment.creates_processes_externally
        self._children: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()

    def _take_over(self) -> None:
        if self._starts_some and len(self._launcher.procs) == self._launcher.num_processes - 1:  # all have been started
            self._children += self._launcher.procs
            self._launcher.procs.clear()

    def run(self) -> None:
        if not self._starts_some:
            return
        while not self._over.wait(0.2):
            self._take_over()
            if any(child.poll() for child in self._children) and not self._over.wait(PATIENCE):
                # it waits where no error reaches it
                for child in self._children:
                    child.kill()
                print(f"ldm: {_lost(f'at step {self._trainer.global_step}')}", file=sys.stderr, flush=True)
                os._exit(LdmError.exit_code)

    def leave(self) -> None:
        self._over.set()

    def end(self, patience: float) -> None:
        """Give them so many seconds to end by themselves."""
        self.leave()
        self.join()
        self._take_over()
        end = time.monotonic() + patience
        for child in self._children:
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
