"""Failures of a run that the user can fix, as one line instead of torch's traceback."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import Trainer

from ldm.errors import LdmError, UsageError, first_line, is_out_of_memory
from ldm.runs.lightning_private import is_restoring

# gloo raises RuntimeError with the path of its source file in the message
GLOO = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")


def explain(error: BaseException, trainer: Trainer) -> LdmError | None:
    """The error of one line for a failure that the user can fix; None for any other, whose traceback is needed."""
    if isinstance(error, LdmError) or not isinstance(error, Exception):
        return None
    if is_restoring(error):
        return UsageError(
            f"{trainer.ckpt_path} does not fit this run ({type(error).__name__}: {first_line(error)}); give the config that it "
            "was trained with, or another checkpoint"
        )
    where = f"at step {trainer.global_step}" + (f" on rank {trainer.global_rank}" if trainer.world_size > 1 else "")
    if is_out_of_memory(error):
        return LdmError(f"out of memory {where}: {'; '.join(_memory_settings(trainer))}")
    said = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, torch.distributed.DistError) or any(sign in said for sign in GLOO):
        return LdmError(
            f"a process of this run has gone or does not answer, as seen {where}: see its last message, and resume with "
            f"--resume latest ({first_line(error)})"
        )
    if "DataLoader worker" in said:
        return LdmError(
            f"a loader process was lost {where}: {first_line(error)} If memory ran out, lower data.workers or "
            "data.batch_size; resume with --resume latest"
        )
    if module := _module_of_lightning(error):
        return UsageError(f"{first_line(error)} ({type(error).__name__} in {module}, {where})")
    return None


def _module_of_lightning(error: BaseException) -> str | None:
    """The module of Lightning that raised it, or of a callback that did, for settings that do not fit; else None."""
    modules = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    if modules and modules[-1].startswith("lightning."):
        return modules[-1]
    return next((name for name in modules if name.startswith("lightning.pytorch.callbacks.")), None)


def _memory_settings(trainer: Trainer) -> Iterator[str]:
    settings = inspect.signature(type(trainer.lightning_module).__init__).parameters
    yield "lower data.batch_size"
    yield "raise model.accumulate, which splits the same batch into more micro-batches"
    if "gradient_checkpointing" in settings:
        yield "set model.gradient_checkpointing to true"
    if "bf16" not in str(trainer.precision):
        yield "set trainer.precision to bf16-mixed"


@contextmanager
def explained(trainer: Trainer) -> Iterator[None]:
    """Replace the failures of ``trainer.fit`` inside by those of :func:`explain`."""
    try:
        yield
    except BaseException as error:
        failure = explain(error, trainer)
        if failure is None:
            raise
        raise failure from error
