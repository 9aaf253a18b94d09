"""The largest batch that fits: what ``fit --find-batch`` does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ldm.errors import LdmError, UsageError
from ldm.machine import is_out_of_memory
from ldm.runs.dry_run.cost import PeakMemory
from ldm.runs.dry_run.rehearsal import Kind, synchronise

# of the memory that there is
USED = {"cuda": 0.92, "cpu": 0.8}
# that a step may be expected to take; longer ones are not tried
LONGEST_SECONDS = 30.0


@dataclass(frozen=True)
class Trial:
    """A batch that fits."""

    size: int
    peak_bytes: int
    seconds: float


def largest_by_line(smaller: Trial, larger: Trial, limit: float) -> float:
    """The batch whose peak is ``limit`` bytes, if memory goes on growing as between two batches; infinite if it did not."""
    slope = (larger.peak_bytes - smaller.peak_bytes) / (larger.size - smaller.size)
    return larger.size + (limit - larger.peak_bytes) / slope if slope > 0 else math.inf


def find_largest(attempt: Callable[[int], Trial | None], smallest: int, most: int, limit: float) -> tuple[list[Trial], float]:
    """Doubling, as long as the line through the last two says that it fits; then the batch that the line says, and bisection
    where that does not fit.

    Args:
        attempt: a batch of this size; None: out of memory.
        smallest, most: sizes.
        limit: bytes.

    Returns:
        What fits, by size, and the largest by the line.
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
    """The batch's samples over and over, so many as ``size``."""
    given = len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))
    numbers = [number % given for number in range(size)]
    enlarged = dict(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and len(value) == given:
            enlarged[name] = value[numbers]
        elif isinstance(value, list) and len(value) == given:
            enlarged[name] = [value[number] for number in numbers]
    return enlarged


class FindBatch(Callback):
    """Trains the first batch's samples in ever larger batches, both players, and stops."""

    def __init__(self, kind: Kind):
        self.kind = kind
        self.fits: list[Trial] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.world_size > 1:
            raise UsageError(
                "--find-batch: give --trainer.devices 1; what fits one process fits each of many, but for DDP's copy of the "
                "gradients"
            )
        device = trainer.strategy.root_device
        self.memory = PeakMemory(device)
        self.limit = USED[device.type] * self.memory.limit()
        self.kind.begin()
        self.most = len(trainer.datamodule.train_set)
        attempt = partial(self._attempt, trainer, batch)
        self.fits, self.predicted = find_largest(attempt, trainer.datamodule.batch_size, self.most, self.limit)
        trainer.should_stop = True

    def _attempt(self, trainer: Trainer, batch: dict[str, Any], size: int) -> Trial | None:
        """Two steps of a batch, by Lightning's own loop."""
        loop, enlarged = trainer.fit_loop.epoch_loop, repeated(batch, size)
        self.memory.reset()
        try:
            for _ in range(2):  # the first allocates, and compiles
                start = time.perf_counter()
                loop.manual_optimization.run({"batch": dict(enlarged), "batch_idx": 0})
                synchronise(trainer)
            return Trial(size, self.memory.peak(), time.perf_counter() - start)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # past the handler, where the error still holds what did not fit
        trainer.lightning_module.zero_grad()
        torch.cuda.empty_cache()
        return None


def show_batches(finder: FindBatch) -> None:
    """The sizes tried, and the lines for the YAML.

    Raises:
        LdmError: none fits.
    """
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
            f"Up to {int(finder.predicted):,} should fit, by the line through the last two; larger ones were not tried."
        )
    if largest.size == finder.most:
        console.print("There are no more samples to make a larger one of.")
    remark = f"measured: {decimal(largest.peak_bytes)} of {decimal(int(finder.limit))}"
    console.print(f"data:\n  batch_size: {largest.size}  # {remark}", highlight=False)
