"""``ldm … fit`` with a clock in it: what tools/bench/scaling.py and tools/bench/training.py time."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer

from ldm.cli import dispatch
from ldm.models.autoencoder import AutoencoderConfig
from ldm.runs.fit import FitCLI
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.base import TrainingModule
from ldm.training.denoiser import DenoiserTraining

STAGES: dict[str, type[TrainingModule]] = {"autoencoder": AutoencoderTraining, "denoiser": DenoiserTraining}


class Clock(Callback):
    """Seconds of each step, from the end of the one before to its own, all included, when the device has done it.

    Attributes:
        seconds: of the steps after the first one.
        images_per_step: of all processes together.
    """

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.images_per_step = trainer.datamodule.batch_size * trainer.world_size
        self._ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        self._ends.append(now(trainer.strategy.root_device))

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in pairwise(self._ends)]


def now(device: torch.device | str) -> float:
    """Seconds, when the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TimedFit(FitCLI):
    """``fit`` with one callback in the place of progress, previews and checkpoints; it leaves no product behind."""

    def __init__(self, stage: str, options: Iterable[object], steps: int, watch: Callback):
        self.watch = watch
        without = ("--trainer.limit_val_batches", 0, "--trainer.val_check_interval", 10**6, "--trainer.max_steps", steps)
        super().__init__(STAGES[stage], [*map(str, ("fit", *options, *without))])

    def instantiate_trainer(self, **settings: object) -> Trainer:
        trainer = super().instantiate_trainer(**settings)
        trainer.callbacks[:] = [self.watch]
        return trainer

    def after_fit(self) -> None:
        pass


def make_data(folder: Path, samples: int, size: int, autoencoder: AutoencoderConfig) -> None:
    """In ``folder``: ``shapes`` of ``size`` pixels, ``autoencoder``, untrained, and its ``latents``."""
    torch.manual_seed(0)
    autoencoder.build().save_pretrained(folder / "autoencoder")
    shards = str(folder / "shapes")
    dispatch(["shards", "shapes", shards, "--count", str(samples), "--size", str(size)])
    export = ["latents", "export", "--autoencoder", str(folder / "autoencoder"), "--shards", shards]
    dispatch([*export, "--out", str(folder / "latents")])


def data_options(stage: str, folder: Path) -> list[str]:
    """Of ``fit``, for what :func:`make_data` made: stage one has both players from its first step on."""
    data = str(folder / ("shapes" if stage == "autoencoder" else "latents"))
    options = ["--data.train", data, "--data.validation", data]
    if stage == "denoiser":
        return [*options, "--model.autoencoder", str(folder / "autoencoder"), "--model.preview_prompts", "[]"]
    # heard from the second one on
    return [
        *options,
        "--model.adversary.start",
        "0",
        "--model.adversary.discriminator_warmup",
        "0",
        "--model.adversary.generator_ramp",
        "1",
    ]
