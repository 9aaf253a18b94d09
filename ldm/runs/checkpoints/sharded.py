"""Sharded checkpoints: folders of torch.distributed.checkpoint, complete or absent.

A run resumes from one on any number of processes, with FSDP or without (:func:`read_sharded`), and under FSDP from a
checkpoint in one file (:func:`shard_optimiser_state`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from ldm.errors import LdmError, first_line
from ldm.files import fsync_folder, sha256_file
from ldm.runs.checkpoints.files import disk_error, files_of, raise_together, read_checkpoint, remove_checkpoint, write_sidecar
from ldm.runs.lightning_private import load_sharded_checkpoint
from ldm.training.fsdp import shard_like

#: prefix of the averages' shards among the weights of a checkpoint
AVERAGES = "average."
#: prefix of an optimiser's state, as Lightning names it
OPTIMISER = "optimizer_"


@contextmanager
def sharded_checkpoint(path: Path) -> Iterator[Path]:
    """Yield a folder that all processes write to; at the end it is hashed and renamed to ``path``.

    Every process calls it with the same ``path``, on a file system that they share.

    Raises :class:`LdmError` on every process, if any of them could not write; nothing half-written is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0
    error: LdmError | None = None
    try:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise_together(None)  # a barrier
        try:
            yield temporary
        except (CheckpointException, OSError, RuntimeError) as failure:
            error = _explain(path, failure)
        raise_together(error)
        if is_first:
            try:
                _seal(temporary, path)
            except OSError as failure:
                error = disk_error(path, failure)
        raise_together(error)
    finally:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)


def _explain(path: Path, failure: BaseException) -> LdmError:
    """The first process's error of the disk, else the first error."""
    failures = [cause for cause, _ in failure.failures.values()] if isinstance(failure, CheckpointException) else [failure]
    cause = next((cause for cause in failures if isinstance(cause, OSError)), failures[0])
    if isinstance(cause, OSError):
        return disk_error(path, cause)
    return LdmError(
        f"{path} could not be written ({first_line(cause)}); check that there is room, then resume: --resume latest"
    )


def _seal(temporary: Path, path: Path) -> None:
    """Write the hashes of a folder's files beside it, and rename it to ``path``."""
    files = files_of(temporary)
    for file in files.values():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    fsync_folder(temporary)
    hashes = {name.replace(temporary.name, path.name, 1): sha256_file(file) for name, file in files.items()}
    if path.exists():
        remove_checkpoint(path)
    write_sidecar(path, hashes)
    os.rename(temporary, path)
    fsync_folder(path.parent)


def read_sharded(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint as that of one process, its shards put together on the host; not verified here."""
    read_checkpoint(folder)  # refuses a newer format
    checkpoint = load_sharded_checkpoint(folder)
    weights = checkpoint["state_dict"]
    for number, average in enumerate(each_average(checkpoint["average"])):
        start = f"{AVERAGES}{number}."
        shadows = {int(name.removeprefix(start)): weights.pop(name) for name in [*weights] if name.startswith(start)}
        average["shadow_params"] = [shadows[index] for index in sorted(shadows)]
    count = sum(name.startswith(OPTIMISER) for name in checkpoint)
    checkpoint["optimizer_states"] = [_by_number(checkpoint.pop(f"{OPTIMISER}{number}")) for number in range(count)]
    return checkpoint


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state with parameters numbered through all groups, as torch has it, instead of named."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [group | {"params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {numbers[name]: values for name, values in state["state"].items()}, "param_groups": groups}


def shard_optimiser_state(state: dict[str, Any], optimiser: Optimizer) -> dict[str, Any]:
    """The state of an unsharded optimiser with its moments sharded like the parameters of ``optimiser``."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]

    def sharded(value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameter.shape:  # the number of steps
            return value
        return shard_like(value, parameter).clone()

    return state | {
        "state": {
            number: {name: sharded(value, parameters[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
    }


def each_average(averages: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all averages in the order of :meth:`ldm.training.ema.Average.all`."""
    return [averages, *averages.get("power_function", {}).values()]
