"""A few steps of a run, of each kind that it will have, timed and measured: what ``fit --dry-run`` runs."""

from __future__ import annotations

import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from ldm.data.datamodule import datamodule_of
from ldm.runs.checkpoints.callback import checkpoints_of
from ldm.runs.checkpoints.files import files_of
from ldm.runs.dry_run.flops import StepFlops
from ldm.runs.dry_run.memory import PeakMemory
from ldm.terminal import say
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.base import TrainingModule
from ldm.training.denoiser import DenoiserTraining
from ldm.training.evaluation import evaluation_of

# Untimed batches of each kind of step: the first is slow, FLOPs are counted in the second, the third is again like a first.
WARM_UP = 3
# Timed steps of each kind: at least FEWEST, then until MOST steps or ENOUGH_SECONDS.
FEWEST, MOST, ENOUGH_SECONDS = 5, 10, 15.0


@dataclass
class StepKind:
    """One kind of step of a run, and its measurements."""

    name: str  # for the table
    steps: int  # how many of them the run has
    begin: Callable[[], None]  # makes the next steps steps of this kind
    seconds: float = 0.0  # a step
    waiting: float = 0.0  # share of the time spent waiting for data, 0 to 1
    peak_bytes: int = 0
    flops: float = 0.0  # of a batch on one process
    flops_forward: float = 0.0


def step_kinds(module: LightningModule, max_steps: int) -> list[StepKind]:
    """In stage one, steps before and after the adversarial loss starts, whatever the schedule says; else one kind."""
    if not isinstance(module, AutoencoderTraining):
        return [StepKind("step", max_steps, lambda: None)]
    adversary, start = module.adversary, module.adversary.start

    def without() -> None:
        adversary.start = sys.maxsize

    def adversarial() -> None:
        adversary.start, adversary.discriminator_warmup = 0, -1

    kinds = [StepKind("adversarial step", max_steps - start, adversarial)]
    return [StepKind("step of the autoencoder alone", start, without), *kinds] if start else kinds


@dataclass
class Measured:
    """All measurements: of the steps, and of what comes between them."""

    kinds: list[StepKind]
    validation_seconds: float = 0.0
    preview_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    reading_seconds: float = 0.0
    checkpoint_bytes: int = 0
    later_peak_bytes: int = 0  # of validation, preview and evaluation


class Measure(Callback):
    """Runs steps of each kind in turn, writes and reads a checkpoint, and stops; Lightning then validates."""

    def __init__(self, kinds: list[StepKind]):
        self.measured = Measured(kinds)
        self._kinds = iter(kinds)
        self._counting: StepFlops | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._profiler = SimpleProfiler()
        trainer.profiler = self._profiler  # pyright: ignore[reportAttributeAccessIssue]  set outside of the class
        assert isinstance(pl_module, TrainingModule)
        preview = pl_module.preview

        def timed() -> list[tuple[str, list[Image.Image]]]:
            start = time.perf_counter()
            try:
                return preview()
            finally:
                self.measured.preview_seconds = time.perf_counter() - start

        pl_module.preview = timed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._memory = PeakMemory(trainer.strategy.root_device)
        self._starts: list[float] = []
        self._asked = trainer.max_steps, trainer.val_check_batch
        self._next_kind()

    def _next_kind(self) -> None:
        self._kind = next(self._kinds, None)
        self._starts = self._starts[-1:]  # of its batches
        if self._kind is not None:
            _print(self._kind.name)
            self._kind.begin()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        synchronise(trainer)
        # a short run must not end before all is measured, and a validation must not count as a step's time
        trainer.fit_loop.epoch_loop.max_steps, trainer.val_check_batch = -1, math.inf
        self._starts.append(time.perf_counter())
        if self._kind is not None and self._has_enough(trainer):
            self._conclude(self._kind, trainer)
            self._next_kind()
        if self._kind is None:
            return
        if len(self._starts) == 1:
            self._memory.reset()
        elif len(self._starts) == 2:
            self._kind.peak_bytes = self._memory.peak()
            self._counting = StepFlops().__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if self._kind is None:
            self._measure_checkpoint(trainer)
            self._memory.reset()
            trainer.should_stop = True
        elif self._counting is not None:
            self._kind.flops, self._kind.flops_forward = self._counting.total, self._counting.forward
            self._stop_counting()
            self._memory.reset()  # uncompiled blocks take more

    def _has_enough(self, trainer: Trainer) -> bool:
        """The same on all processes."""
        timed = self._starts[WARM_UP:]
        steps = len(timed) - 1
        if steps < FEWEST:
            return False
        return trainer.strategy.reduce_boolean_decision(steps >= MOST or timed[-1] - timed[0] > ENOUGH_SECONDS)

    def _conclude(self, kind: StepKind, trainer: Trainer) -> None:
        timed = self._starts[WARM_UP:]
        kind.seconds = median(after - before for before, after in pairwise(timed))
        waited = self._profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"][1 - len(timed) :]
        kind.waiting = sum(waited) / (timed[-1] - timed[0])
        if (largest := largest_batch(trainer)) is not None:  # the steps so far may have been of smaller sizes
            run_step(trainer, largest)
        kind.peak_bytes = max(kind.peak_bytes, self._memory.peak())

    def _measure_checkpoint(self, trainer: Trainer) -> None:
        _print("a checkpoint")
        start = time.perf_counter()
        path = checkpoints_of(trainer).save_now(trainer)
        written = time.perf_counter()
        trainer.strategy.load_checkpoint(path, weights_only=True)
        self.measured.checkpoint_seconds, self.measured.reading_seconds = written - start, time.perf_counter() - written
        self.measured.checkpoint_bytes = sum(file.stat().st_size for file in files_of(path).values())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _print("a validation and a preview")
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        synchronise(trainer)
        self.measured.validation_seconds = time.perf_counter() - self._validation_start
        if evaluation := evaluation_of(trainer):
            _print("images of an evaluation")
            assert isinstance(pl_module, DenoiserTraining)
            start, total = time.perf_counter(), len(evaluation.reference.images)
            count = min(evaluation.asked.batch_size * trainer.world_size, total)
            evaluation.generate(trainer, pl_module, count)
            synchronise(trainer)
            self.measured.evaluation_seconds = (time.perf_counter() - start) * math.ceil(total / count)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps, trainer.val_check_batch = self._asked
        self.measured.later_peak_bytes = self._memory.peak()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None


@rank_zero_only
def _print(what: str) -> None:
    say(f"dry run: {what}", sys.stderr)


def largest_batch(trainer: Trainer) -> dict[str, Any] | None:
    """The batch of the size that needs the most memory, on the device; None where there is one size alone."""
    batch = datamodule_of(trainer).largest_batch()
    return None if batch is None else trainer.strategy.batch_to_device(batch)


def run_step(trainer: Trainer, batch: dict[str, Any]) -> None:
    """A step of the optimiser by Lightning's loop, beside those that it counts."""
    trainer.fit_loop.epoch_loop.manual_optimization.run(OrderedDict(batch=batch, batch_idx=0))


def synchronise(trainer: Trainer) -> None:
    """Wait until the device is done, so that a clock measures its work."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
