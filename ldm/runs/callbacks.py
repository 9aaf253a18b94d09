"""Callbacks of a run: model FLOPs, the progress line and its metrics, previews, snapshots of averages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from ldm.data.datamodule import datamodule_of
from ldm.files import write_json
from ldm.progress import Lap, Pace, Progress
from ldm.reporting.grids import captioned_grid, paired_grid, save_grid
from ldm.runs.dry_run.flops import ImageFlops, peak_flops
from ldm.runs.layout import RunFolder
from ldm.runs.lightning_private import log_interval, wrap_batches
from ldm.training.base import TrainingModule
from ldm.training.ema import SNAPSHOTS
from ldm.training.fsdp import is_sharded

SHOWN = ("loss", "rec", "lpips", "g", "d", "lr")


class Stopwatch(Iterator):
    """An iterator that sums the seconds spent in the ``next()`` of another."""

    def __init__(self, iterator: Iterator):
        self.iterator = iterator
        self.seconds = self.entered = 0.0  # total; time.perf_counter at the last call

    def __next__(self) -> Any:
        self.entered = time.perf_counter()
        try:
            return next(self.iterator)
        finally:
            self.seconds += time.perf_counter() - self.entered


class ModelFlops(Callback):
    """What model FLOPs utilisation (MFU) is computed from. Both are None where the peak is unknown, as for CPUs."""

    peak_flops: float | None = None  # FLOP/s of a device for dense products in the run's precision
    flops_per_image: float | None = None  # of training on one image, forward and backward

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.peak_flops = peak_flops(trainer.strategy.root_device, str(trainer.precision))
        if self.peak_flops is not None:
            self._counter = ImageFlops(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.peak_flops is not None:
            self.flops_per_image = self._counter.count(datamodule_of(trainer))


class ProgressLine(Callback):
    """Steps, images per second, losses and the time left; Lightning's own bar counts the batches of an endless epoch.

    Logs, each over the last half minute of training and without validations, previews and checkpoints:
    ``time/images_per_second`` of all processes together, ``time/step_seconds``, ``time/data_wait_share`` (0 to 1: the share of
    time spent in the loader's ``next()``, on the process that waits most) and, where the FLOPs are known, ``time/mfu`` (0 to
    1, Chowdhery et al. 2022, arXiv 2204.02311, appendix B). ``time/elapsed_seconds`` is the time of the whole run, kept in
    checkpoints. The GPU is synchronised only when metrics are logged.
    """

    def __init__(self, stage: str, model_flops: ModelFlops | None = None):
        """``stage``: title of the line; ``model_flops``: a callback of the same trainer (default: no ``time/mfu``)."""
        self.stage, self._model_flops = stage, model_flops or ModelFlops()
        self._before = 0.0  # seconds before this start

    def state_dict(self) -> dict[str, float]:
        return {"elapsed_seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._before = state_dict["elapsed_seconds"]

    def _elapsed(self) -> float:
        return self._before + (time.perf_counter() - self._began if hasattr(self, "_began") else 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()
        wrap_batches(trainer, self._measure_waiting)
        self._pace, self._figures = Pace(), {}
        self._ended: float | None = None  # the last batch, by time.perf_counter
        self._step, self._waited, self._interrupted = trainer.global_step, 0.0, False
        self._steps = trainer.max_steps if trainer.max_steps > 0 else None  # none where a time ends the run
        self.progress = Progress(self.stage, self._steps, quiet=not trainer.is_global_zero)
        self.progress.__enter__()

    def _measure_waiting(self, batches: Iterator[Any]) -> Stopwatch:
        self._fetching = Stopwatch(batches)
        return self._fetching

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._interrupted = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._interrupted = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.perf_counter(), trainer.global_step
        if self._ended is not None:  # the first batch includes compilation and the start of the workers
            pause = self._fetching.entered - self._ended if self._interrupted else 0.0
            images = len(batch["draws"]) * trainer.world_size
            self._pace.add(
                Lap(now - self._ended - pause, step - self._step, images, self._fetching.seconds - self._waited), pause
            )
        self._ended, self._waited, self._interrupted = now, self._fetching.seconds, False
        if step != self._step and (every := log_interval(trainer)) and step % every == 0:
            self._log(trainer, pl_module)
        self._step = step
        left = self._pace.left(self._steps - step) if self._steps else None
        self.progress.update(step, metrics=self._figures, left=left)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the metrics of time, and show them with the latest losses on the line."""
        rate, wait = self._pace.images_per_second, self._pace.wait_share
        metrics: dict[str, float] = {"time/elapsed_seconds": self._elapsed()}
        shown: dict[str, float | str] = {}
        if rate is not None and wait is not None:
            # in every step all processes wait for the slowest
            module.log("time/data_wait_share", wait, sync_dist=trainer.world_size > 1, reduce_fx="max")
            metrics["time/images_per_second"] = rate
            wait = float(trainer.callback_metrics["time/data_wait_share"])
            shown = {"images/s": rate, "waiting": f"{wait:.0%}"}
            if self._pace.step_seconds is not None:
                metrics["time/step_seconds"] = self._pace.step_seconds
            if (flops := self._model_flops).flops_per_image and flops.peak_flops:
                metrics["time/mfu"] = rate * flops.flops_per_image / (flops.peak_flops * trainer.world_size)
                shown["MFU"] = f"{metrics['time/mfu']:.1%}"
        module.log_dict(metrics)
        logged = trainer.callback_metrics
        shown |= {name: float(logged[f"train/{name}"]) for name in SHOWN if f"train/{name}" in logged}
        shown |= {name.replace("/", " "): float(logged[name]) for name in ("val/psnr", "val/loss") if name in logged}
        self._figures = shown

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress.__exit__(None, None, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "progress"):
            self.progress.__exit__(None, None, None)


class PreviewGrid(Callback):
    """Previews before the first step and at each validation, as ``previews/step-00000123.png`` and in TensorBoard and W&B."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if trainer.global_step == 0:
            with pl_module.average_applied():
                self._write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if trainer.state.fn == "fit":
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: TrainingModule) -> None:
        if not (trainer.is_global_zero or is_sharded(module.averaged())):
            return
        # FSDP gathers weights in the precision of the run, and leaves it to autocast to cast what they are multiplied with
        with trainer.precision_plugin.forward_context() if is_sharded(module.averaged()) else nullcontext():
            rows = module.preview()
        if not rows or not trainer.is_global_zero:
            return
        if all(len(images) == 1 for _, images in rows):
            grid = captioned_grid([images[0] for _, images in rows], [label for label, _ in rows])
        else:
            grid = paired_grid(rows)
        save_grid(grid, rows, RunFolder(Path(trainer.default_root_dir)).preview(trainer.global_step))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("preview", np.asarray(grid), trainer.global_step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("preview", [grid], trainer.global_step)


class AverageSnapshots(Callback):
    """Writes the module's power-function averages every ``snapshot_every`` steps and at the end, into ``snapshots``."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._average, self._written = pl_module.average, pl_module.average.step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        every = self._average.snapshot_every
        if every and (self._average.step + 1) % every == 0:  # the next update may be that of this step
            assert isinstance(pl_module, TrainingModule)
            pl_module.settle()
        if every and self._average.step % every == 0 and self._average.step != self._written:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average.snapshot_every:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        self._written = self._average.step
        self._average.write_snapshots(Path(trainer.default_root_dir) / SNAPSHOTS, trainer.is_global_zero)


class StepTimes(Callback):
    """Writes the median seconds per batch, without the first one, to a JSON file."""

    def __init__(self, file: str):
        self.file = file
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self.times.append(time.monotonic())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = [after - before for before, after in pairwise(self.times)]
        write_json(self.file, {"seconds_per_step": median(seconds[1:] or seconds)})
