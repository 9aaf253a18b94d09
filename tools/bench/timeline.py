"""Where a training step's time goes, by the device's own clock, and how often the host waits for the device."""

from __future__ import annotations

import statistics
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import torch
from lightning import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import ldm
from ldm.data.datamodule import datamodule_of
from ldm.data.plan import PlannedSample
from ldm.training.base import TrainingModule

# in the order of a step; ``other``: clipping, metrics and their exchange, Lightning
PARTS = ("data", "forward", "backward", "optimiser", "averages", "other")
WARM_UP = 6  # steps: compilation, the allocator, the start of the loader; an even number, see StepParts
WAITING_STEPS = 4  # in which waits are counted; they are not timed, since telling of a wait takes time
SYNCHRONISES = "synchronizing CUDA operation"  # of torch's warning
PACKAGE = str(Path(ldm.__file__).parent)


class Timeline:
    """Moments in the device's queue: CUDA events, for which the host does not wait; on a CPU the time of day."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.moments: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """What was queued since the last mark belongs to ``part``."""
        if self.on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.moments.append((part, moment))

    def seconds(self) -> list[tuple[str, float]]:
        """Each mark's part and its seconds, except for the first; the device must have finished its queue."""
        return [
            (part, before.elapsed_time(after) / 1000 if self.on_gpu else after - before)
            for (_, before), (part, after) in pairwise(self.moments)
        ]


class StepParts(Callback):
    """Times the parts of each step by :class:`Timeline`, and counts the host's waits in a few steps after them.

    The parts add up to the step. Where the host is late, the part in which the device idles is longer: ``data`` is what a step
    waits for the loader and the copy of the batch, not the work of the loader's processes. Under DDP every other step
    exchanges no gradients, which tells what an exchange costs.

    Attributes:
        waits: places in the code that made the host wait for the GPU, with the number of times in :data:`WAITING_STEPS` steps.
    """

    def __init__(self, steps: int):
        """``steps``: timed ones; :data:`WARM_UP` come before, :data:`WAITING_STEPS` after them."""
        self.timed, self.total = steps, WARM_UP + steps + WAITING_STEPS
        self.waits: Counter[str] = Counter()
        self._instruments, self._counting = ExitStack(), ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        self.images_per_step = datamodule_of(trainer).batch_size * trainer.world_size
        self._ends: list[int] = []  # numbers of the marks that end a step
        self._timeline, self._in_optimiser = Timeline(trainer.strategy.root_device), 0
        for differentiates in ("backward", "grad"):  # the first is what `Tensor.backward` calls
            self._time(torch.autograd, differentiates, before="forward", part="backward")
        self._time(module.average, "update", before="other", part="averages")
        self._instruments.callback(register_optimizer_step_pre_hook(self._enter_optimiser).remove)
        self._instruments.callback(register_optimizer_step_post_hook(self._leave_optimiser).remove)

    def _time(self, owner: Any, name: str, before: str, part: str) -> None:
        """Mark where each call of a function begins, which ends the part ``before``, and where it ends."""
        called: Callable[..., Any] = getattr(owner, name)

        @wraps(called)
        def timed(*arguments: Any, **options: Any) -> Any:
            self._timeline.mark(before)
            try:
                return called(*arguments, **options)
            finally:
                self._timeline.mark(part)

        setattr(owner, name, timed)
        self._instruments.callback(setattr, owner, name, called)

    def _enter_optimiser(self, *_: Any) -> None:
        if not self._in_optimiser:  # Muon's step calls AdamW's
            self._timeline.mark("other")
        self._in_optimiser += 1

    def _leave_optimiser(self, *_: Any) -> None:
        self._in_optimiser -= 1
        if not self._in_optimiser:
            self._timeline.mark("optimiser")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._timeline.mark("data")
        if isinstance(model := trainer.strategy.model, DistributedDataParallel):
            model.require_backward_grad_sync = len(self._ends) % 2 == 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._timeline.mark("other")
        self._ends.append(len(self._timeline.moments) - 1)
        if len(self._ends) == WARM_UP + self.timed and self._timeline.on_gpu:
            self._count_waits()

    def _count_waits(self) -> None:
        """From here on to the end of training."""
        self._counting.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("always", message=f".*{SYNCHRONISES}")
        warnings.showwarning = self._wait
        torch.cuda.set_sync_debug_mode("warn")
        self._counting.callback(torch.cuda.set_sync_debug_mode, "default")

    def _wait(self, message: Warning | str, *_: Any) -> None:
        if SYNCHRONISES in str(message):
            frames = [each for each in traceback.extract_stack() if each.filename not in (__file__, warnings.__file__)]
            frame = next((frame for frame in reversed(frames) if frame.filename.startswith(PACKAGE)), frames[-1])
            self.waits[f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"] += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        self._counting.close()
        self._instruments.close()
        if self._timeline.on_gpu:
            torch.cuda.synchronize()
        seconds = self._timeline.seconds()
        self._steps: list[dict[str, float]] = []
        for before, end in pairwise(self._ends[WARM_UP - 1 : WARM_UP + self.timed]):
            step: dict[str, float] = defaultdict(float)
            for part, spent in seconds[before:end]:  # number n is the time from mark n to mark n + 1
                step[part] += spent
            self._steps.append(step)
        self._exchanges = isinstance(trainer.strategy.model, DistributedDataParallel)
        self._noise = noise_seconds(trainer, module)

    @property
    def steps(self) -> list[float]:
        """Seconds of each timed step; under DDP of those that exchange gradients."""
        return [sum(step.values()) for step in self._steps[:: 2 if self._exchanges else 1]]

    def parts(self) -> dict[str, float]:
        """Median seconds of each part, and two that are no parts of these steps.

        ``communication``: what a step with an exchange of gradients takes longer; the rest overlaps with the backward pass.
        ``noise``: of the loader's processes, for a batch.
        """
        alone = self._steps[1::2] if self._exchanges else self._steps
        medians = {part: statistics.median(step.get(part, 0.0) for step in alone) for part in PARTS}
        without = statistics.median(sum(step.values()) for step in alone)
        return medians | {"communication": statistics.median(self.steps) - without, "noise": self._noise}


def noise_seconds(trainer: Trainer, module: TrainingModule) -> float:
    """What drawing the noise of a batch takes the loader's process that makes it."""
    data = datamodule_of(trainer)
    draws = [PlannedSample(number % len(data.train_set), number) for number in range(data.batch_size)]
    batch, noise = data.train_set.batch([draw.sample for draw in draws]), module.batch_noise()
    assert noise is not None
    return common.seconds_of(lambda: noise(batch, draws), "cpu", times=3)
