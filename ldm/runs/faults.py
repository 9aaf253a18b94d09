"""What torch says when a run fails, as one line that names the fix."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import Trainer

from ldm.errors import LdmError, first_line
from ldm.machine import is_out_of_memory

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
            "data.batch_size; resume with --resume latest"
        )
    return None


def _lost(where: str) -> str:
    return (
        f"a process of this run has gone or does not answer, as seen {where}: see what it said last, and resume "
        "with --resume latest"
    )


def _memory_knobs(trainer: Trainer) -> Iterator[str]:
    settings = inspect.signature(type(trainer.lightning_module).__init__).parameters
    yield "lower data.batch_size"
    yield "raise model.accumulate, which splits the same batch into more micro-batches"
    if "gradient_checkpointing" in settings:
        yield "set model.gradient_checkpointing to true"
    if "bf16" not in str(trainer.precision):
        yield "set trainer.precision to bf16-mixed"


@contextmanager
def explained(trainer: Trainer) -> Iterator[None]:
    """Around ``trainer.fit``: raise its failures as :func:`explain` has them."""
    try:
        yield
    except BaseException as error:
        failure = explain(error, trainer)
        if failure is None:
            raise
        raise failure from error
