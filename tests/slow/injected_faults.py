"""Callbacks that tests give to runs by class_path: faults of process groups, memory and storage."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from ldm.data.datamodule import datamodule_of
from ldm.data.plan import PlannedSample
from ldm.data.shard_dataset import ShardDataset


def mark(trainer: Trainer) -> bool:
    """Write the file whose time is that of the signal; False if it exists."""
    file = Path(trainer.default_root_dir, f"signalled-{trainer.global_rank}-{trainer.global_step}")
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class SignalGroup(Callback):
    """Sends the process of every rank and its loader processes a signal at the end of a step, once in a run."""

    def __init__(self, step: int, number: int = int(signal.SIGTERM)) -> None:
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and mark(trainer):
            # under torchrun every process leads a process group
            os.killpg(os.getpgrp(), self.number)


class SignalInValidation(Callback):
    """Sends its process a signal at a validation batch, ``times`` times."""

    def __init__(self, number: int = int(signal.SIGINT), times: int = 1) -> None:
        self.number, self.times = number, times

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        mark(trainer)
        for _number in range(self.times):
            os.kill(os.getpid(), self.number)
            time.sleep(1.5)  # longer than a launcher takes to forward a signal


class RunOutOfMemory(Callback):
    """Raises torch's error on one rank at the end of a step."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Hang(Callback):
    """Hangs on one rank after a step, without an error."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            time.sleep(600)


class StallReading(Callback):
    """Storage stops to answer on one rank when samples of a step are read."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.global_rank != self.rank:
            return
        data = datamodule_of(trainer)
        dataset: Any = type(data.train_set)
        first, read = self.step * data.batch_size * trainer.world_size, dataset.batch

        def batch(samples: ShardDataset, draws: list[Any], *given: Any) -> Any:
            if isinstance(draws[0], PlannedSample) and draws[0].number >= first:
                time.sleep(600)
            return read(samples, draws, *given)

        dataset.batch = batch
