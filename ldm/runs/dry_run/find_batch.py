"""The largest batch that fits: what ``fit --find-batch`` does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ldm.data.datamodule import datamodule_of
from ldm.errors import LdmError, UsageError, is_out_of_memory
from ldm.runs.dry_run.measure import StepKind, largest_batch, run_step, synchronise
from ldm.runs.dry_run.memory import PeakMemory

# share of the memory to fill
USED = {"cuda": 0.92, "cpu": 0.8}
# batches whose steps are expected to take longer are not tried
LONGEST_SECONDS = 30.0


@dataclass(frozen=True)
class Trial:
    """A batch that fits."""

    size: int
    peak_bytes: int
    seconds: float


def largest_by_line(smaller: Trial, larger: Trial, limit: float) -> float:
    """The batch whose peak is ``limit`` bytes, extrapolated linearly from two batches; infinite where memory did not grow."""
    slope = (larger.peak_bytes - smaller.peak_bytes) / (larger.size - smaller.size)
    return larger.size + (limit - larger.peak_bytes) / slope if slope > 0 else math.inf


def find_largest(attempt: Callable[[int], Trial | None], smallest: int, most: int, limit: float) -> tuple[list[Trial], float]:
    """Double the batch as long as the line through the last two trials says that it fits, then try the size that the line
    predicts; bisect where a size does not fit.

    Args:
        attempt: tries a batch of this size; None means out of memory.
        smallest, most: batch sizes.
        limit: bytes.

    Returns:
        The trials that fit, by size, and the largest batch that the line predicts.
    """
    fits: list[Trial] = []
    size, too_large, predicted = smallest, most + 1, math.inf
    while size < too_large and (not fits or size > fits[-1].size):
        trial = attempt(size)
        if trial is None:
            too_large = size
        else:
            fits.append(trial)
        if not fits:
            break
        if len(fits) > 1:
            predicted = largest_by_line(fits[-2], fits[-1], limit)
        largest = fits[-1]
        if too_large <= most:
            if too_large - largest.size <= max(1, largest.size // 16):
                break
            size = (largest.size + too_large) // 2
        else:
            size = int(min(2 * largest.size, predicted, most))
        if largest.seconds * size / largest.size > LONGEST_SECONDS:
            break
    return fits, min(predicted, most)


def repeated(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """A batch of ``size`` samples, those of ``batch`` repeated."""
    given = len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))
    numbers = [number % given for number in range(size)]
    enlarged = dict(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor | np.ndarray) and len(value) == given:
            enlarged[name] = value[numbers]
        elif isinstance(value, list) and len(value) == given:
            enlarged[name] = [value[number] for number in numbers]
    return enlarged


class FindBatch(Callback):
    """Trains larger and larger batches, made of a few samples of the largest size, and stops."""

    def __init__(self, kind: StepKind):
        self.kind = kind
        self.fits: list[Trial] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.world_size > 1:
            raise UsageError(
                "--find-batch: give --trainer.devices 1; each of many processes needs the same memory, and under DDP a second "
                "copy of the gradients"
            )
        device = trainer.strategy.root_device
        self.memory = PeakMemory(device)
        self.limit = USED[device.type] * self.memory.limit()
        self.kind.begin()
        data = datamodule_of(trainer)
        self.most = len(data.train_set)
        attempt = partial(self._attempt, trainer, largest_batch(trainer) or batch)
        self.fits, self.predicted = find_largest(attempt, data.batch_size, self.most, self.limit)
        trainer.should_stop = True

    def _attempt(self, trainer: Trainer, batch: dict[str, Any], size: int) -> Trial | None:
        """Two steps of a batch by Lightning's loop; the first, which allocates and compiles, is not timed."""
        enlarged, start = repeated(batch, size), 0.0
        self.memory.reset()
        try:
            for _ in range(2):
                start = time.perf_counter()
                run_step(trainer, dict(enlarged))
                synchronise(trainer)
            return Trial(size, self.memory.peak(), time.perf_counter() - start)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # outside of the handler: the error holds references to the tensors
        trainer.lightning_module.zero_grad()
        torch.cuda.empty_cache()
        return None


def show_batches(finder: FindBatch) -> None:
    """Print the trials, and the lines for the YAML. Raises :class:`LdmError` if none fits."""
    if not finder.fits:
        raise LdmError(
            "not even the smallest batch fits; give trainer.precision bf16-mixed, model.gradient_checkpointing true, "
            "smaller images or a smaller network"
        )
    columns = ("batch", "peak memory", "seconds a step", "images/s")
    table = Table(*columns, title="batches that fit", caption=f"memory {finder.memory.what}")
    for trial in finder.fits:
        rate = trial.size / trial.seconds
        table.add_row(f"{trial.size:,}", decimal(trial.peak_bytes), f"{trial.seconds:.3g}", f"{rate:.3g}")
    console = Console()
    console.print(table)
    largest = finder.fits[-1]
    if int(finder.predicted) > largest.size:
        console.print(
            f"Extrapolated from the last two, up to {int(finder.predicted):,} should fit; larger ones were not tried."
        )
    if largest.size == finder.most:
        console.print("The data have no more samples.")
    remark = f"measured: {decimal(largest.peak_bytes)} of {decimal(int(finder.limit))}"
    console.print(f"data:\n  batch_size: {largest.size}  # {remark}", highlight=False)
