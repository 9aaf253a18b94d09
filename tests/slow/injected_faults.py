"""More that tests put into runs by class_path: what befalls groups of processes, memory and storage."""

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
    """Leave the file that says when signals were sent; False if it is there from before."""
    file = Path(trainer.default_root_dir, f"signalled-{trainer.global_rank}-{trainer.global_step}")
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class SignalGroup(Callback):
    """On every rank, the process and those of its loader get a signal at the end of a step, once in a run."""

    def __init__(self, step: int, number: int = int(signal.SIGTERM)) -> None:
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and mark(trainer):
            # torchrun gives every process a group of its own
            os.killpg(os.getpgrp(), self.number)


class SignalInValidation(Callback):
    """Sends its own process a signal at a batch of validation, some times one after another."""

    def __init__(self, number: int = int(signal.SIGINT), times: int = 1) -> None:
        self.number, self.times = number, times

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        mark(trainer)
        for _number in range(self.times):
            os.kill(os.getpid(), self.number)
            time.sleep(1.5)  # longer than it takes a launcher to send a signal on


class RunOutOfMemory(Callback):
    """Raises what torch raises, on one rank at the end of a step."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Hang(Callback):
    """On one rank nothing happens any more after a step, and no error either."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            time.sleep(600)


class StallReading(Callback):
    """On one rank the storage does not answer any more when samples of a step are read."""

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
