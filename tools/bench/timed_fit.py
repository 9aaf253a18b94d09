"""``ldm … fit`` with a clock: what tools/bench/scaling.py and tools/bench/training.py time."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import torch
from lightning import Callback, LightningModule, Trainer

from ldm.cli import dispatch
from ldm.data.datamodule import datamodule_of
from ldm.models.autoencoder import AutoencoderConfig
from ldm.runs.fit import FitCLI
from ldm.runs.preemption import Preemption
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.base import TrainingModule
from ldm.training.denoiser import DenoiserTraining

STAGES: dict[str, type[TrainingModule]] = {"autoencoder": AutoencoderTraining, "denoiser": DenoiserTraining}


class Clock(Callback):
    """Seconds of each step, from the end of the previous one to its own, once the device has finished it.

    Attributes:
        seconds: of the steps after the first one.
        images_per_step: of all processes together.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images_per_step = datamodule_of(trainer).batch_size * trainer.world_size
        self._ends: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._ends.append(common.now(trainer.strategy.root_device))

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in pairwise(self._ends)]


class TimedFit(FitCLI):
    """``fit`` with one callback instead of progress, previews and checkpoints; it exports nothing.

    Preemption stays: what it takes is part of every step.
    """

    def __init__(self, stage: str, options: Iterable[object], steps: int, watch: Callback):
        self.watch = watch
        without = ("--trainer.limit_val_batches", 0, "--trainer.val_check_interval", 10**6, "--trainer.max_steps", steps)
        super().__init__(STAGES[stage], [*map(str, ("fit", *options, *without))])

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        kept = [callback for callback in trainer.callbacks if isinstance(callback, Preemption)]  # pyright: ignore[reportAttributeAccessIssue]  set by Lightning's connector
        trainer.callbacks[:] = [*kept, self.watch]  # pyright: ignore[reportAttributeAccessIssue]
        return trainer

    def after_fit(self) -> None:
        pass


def make_data(folder: Path, samples: int, size: int, autoencoder: AutoencoderConfig) -> None:
    """In ``folder``: ``shapes`` of ``size`` pixels, an untrained ``autoencoder`` and its ``latents``."""
    torch.manual_seed(0)
    autoencoder.build().save_pretrained(folder / "autoencoder")
    shards = str(folder / "shapes")
    dispatch(["shards", "shapes", shards, "--count", str(samples), "--size", str(size)])
    export = ["latents", "export", "--autoencoder", str(folder / "autoencoder"), "--shards", shards]
    dispatch([*export, "--out", str(folder / "latents")])


def data_options(stage: str, folder: Path) -> list[str]:
    """Options of ``fit`` for what :func:`make_data` made; in stage one the adversarial loss begins with the second step."""
    data = str(folder / ("shapes" if stage == "autoencoder" else "latents"))
    options = ["--data.train", data, "--data.validation", data]
    if stage == "denoiser":
        return [*options, "--model.autoencoder", str(folder / "autoencoder"), "--model.preview_prompts", "[]"]
    timetable = {"start": "0", "discriminator_warmup": "0", "generator_ramp": "1"}
    return [*options, *(text for name, value in timetable.items() for text in (f"--model.adversary.{name}", value))]
