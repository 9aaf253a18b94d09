"""A few of a run's own steps, of every kind it will have, timed and measured: what ``fit --dry-run`` does."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities import rank_zero_only

from ldm.runs.checkpoints.callback import Checkpoints
from ldm.runs.dry_run.cost import PeakMemory, StepFlops
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.base import TrainingModule

# Batches of each kind that are not timed: the first is slow, in the second FLOPs are counted, the third is the first again.
WARM_UP = 3
# Steps of each kind that are: at least so many, and on until so many or so many seconds are reached.
FEWEST, MOST, ENOUGH_SECONDS = 5, 10, 15.0


@dataclass
class Kind:
    """One kind of step of a run: how many there will be, how to have them now, and what was measured of them."""

    name: str
    steps: int
    begin: Callable[[], None]
    seconds: float = 0.0  # a step
    waiting: float = 0.0  # share of it, for data
    peak_bytes: int = 0
    flops: float = 0.0  # of a batch on one process, forward and backward
    flops_forward: float = 0.0


def kinds_of(stage: TrainingModule, max_steps: int) -> list[Kind]:
    """In stage one the autoencoder alone and both players, whatever the timetable says; else one."""
    if not isinstance(stage, AutoencoderTraining):
        return [Kind("step", max_steps, lambda: None)]
    adversary, start = stage.adversary, stage.adversary.start

    def leave_out() -> None:
        adversary.start = sys.maxsize

    def hear() -> None:
        # heard from one batch after it has been alone for so many
        adversary.start, adversary.discriminator_warmup = 0, -1

    both = Kind("step of both players", max_steps - start, hear)
    return [Kind("step of the autoencoder alone", start, leave_out), both] if start else [both]


@dataclass
class Measured:
    """What is measured beside the steps."""

    kinds: list[Kind]
    validation_seconds: float = 0.0
    preview_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    reading_seconds: float = 0.0
    checkpoint_bytes: int = 0
    later_peak_bytes: int = 0  # in validation and preview


class Measure(Callback):
    """Has every kind of step in turn, then a checkpoint written and read, and stops; Lightning then validates."""

    def __init__(self, kinds: list[Kind]):
        self.measured = Measured(kinds)
        self._kinds = iter(kinds)
        self._counting: StepFlops | None = None

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.profiler = self._profiler = SimpleProfiler()
        draw = module.preview

        def timed() -> list:
            start = time.perf_counter()
            try:
                return draw()
            finally:
                self.measured.preview_seconds = time.perf_counter() - start

        module.preview = timed

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._memory = PeakMemory(trainer.strategy.root_device)
        self._starts: list[float] = []
        self._asked = trainer.max_steps, trainer.val_check_batch
        self._next_kind()

    def _next_kind(self) -> None:
        self._kind = next(self._kinds, None)
        self._starts = self._starts[-1:]  # of its batches
        if self._kind is not None:
            _say(self._kind.name)
            self._kind.begin()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        synchronise(trainer)
        # a short run would be over before all was seen, and a validation in between would count as a step's time
        trainer.fit_loop.epoch_loop.max_steps, trainer.val_check_batch = -1, math.inf
        self._starts.append(time.perf_counter())
        if self._has_enough(trainer):
            self._conclude(trainer)
            self._next_kind()
        if self._kind is None:
            return
        if len(self._starts) == 1:
            self._memory.reset()
        elif len(self._starts) == 2:
            self._kind.peak_bytes = self._memory.peak()
            self._counting = StepFlops().__enter__()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._counting is not None:
            self._kind.flops, self._kind.flops_forward = self._counting.total, self._counting.forward
            self._stop_counting()
            self._memory.reset()  # what is not compiled takes more
        if self._kind is None:
            self._try_checkpoint(trainer)
            self._memory.reset()
            trainer.should_stop = True

    def _has_enough(self, trainer: Trainer) -> bool:
        """All processes say the same."""
        timed = self._starts[WARM_UP:]
        steps = len(timed) - 1
        if self._kind is None or steps < FEWEST:
            return False
        enough = steps >= MOST or timed[-1] - timed[0] > ENOUGH_SECONDS
        return trainer.strategy.reduce_boolean_decision(enough)

    def _conclude(self, trainer: Trainer) -> None:
        kind, timed = self._kind, self._starts[WARM_UP:]
        kind.seconds = median(after - before for before, after in pairwise(timed))
        waited = self._profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"][1 - len(timed) :]
        kind.waiting = sum(waited) / (timed[-1] - timed[0])
        kind.peak_bytes = max(kind.peak_bytes, self._memory.peak())

    def _try_checkpoint(self, trainer: Trainer) -> None:
        _say("a checkpoint")
        callback = next(each for each in trainer.callbacks if isinstance(each, Checkpoints))
        start = time.perf_counter()
        path = callback.save_now(trainer)
        written = time.perf_counter()
        trainer.strategy.load_checkpoint(path, weights_only=True)
        self.measured.checkpoint_seconds, self.measured.reading_seconds = written - start, time.perf_counter() - written
        self.measured.checkpoint_bytes = _size(path)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        _say("a validation and a preview")
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        synchronise(trainer)
        self.measured.validation_seconds = time.perf_counter() - self._validation_start

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps, trainer.val_check_batch = self._asked
        self.measured.later_peak_bytes = self._memory.peak()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None


@rank_zero_only
def _say(what: str) -> None:
    print(f"dry run: {what}", file=sys.stderr, flush=True)


def synchronise(trainer: Trainer) -> None:
    """Wait for what the device is at, so that a clock tells of it."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
