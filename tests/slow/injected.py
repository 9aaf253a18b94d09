"""Callbacks that tests give to runs by class_path: signals and faults at a step."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from ldm.data.datamodule import datamodule_of
from ldm.data.plan import PlannedSample
from ldm.data.shard_dataset import ShardDataset
from ldm.runs.checkpoints.callback import checkpoints_of
from ldm.runs.checkpoints.files import latest_checkpoint
from ldm.runs.layout import RunFolder


def mark(trainer: Trainer) -> bool:
    """Write the file whose time is that of the signal; False if it exists."""
    file = Path(trainer.default_root_dir, f"signalled-{trainer.global_rank}-{trainer.global_step}")
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class SignalAt(Callback):
    """Sends its process a signal at the end of each of these steps, once in a run, on one rank or (-1) on all.

    Callbacks of the config run first: a checkpoint that is due at the step is not yet written.
    """

    def __init__(self, steps: list[int], number: int = int(signal.SIGKILL), rank: int = -1) -> None:
        self.steps, self.number, self.rank = steps, number, rank

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step in self.steps and self.rank in (-1, trainer.global_rank) and mark(trainer):
            os.kill(os.getpid(), self.number)


class RecordDraws(Callback):
    """Writes the draws of every step of its process to a file in the run's folder; those of a repeated step replace them."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int) -> None:
        file = Path(trainer.default_root_dir, f"draws-{trainer.global_step}-{trainer.global_rank}.json")
        file.write_text(json.dumps(batch["draws"].tolist()))


class SignalGroup(Callback):
    """Sends the process of every rank and its loader processes a signal at the end of a step, once in a run."""

    def __init__(self, step: int, number: int = int(signal.SIGTERM)) -> None:
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and mark(trainer):
            # Under torchrun every process leads a process group. Another process sends it, as on a cluster: of a signal from
            # the training process its loader processes end.
            group = ["kill", "-s", str(self.number), "--", f"-{os.getpgrp()}"]
            subprocess.run(group, check=True, start_new_session=True)


class SignalInValidation(Callback):
    """Sends its process a signal at a validation batch, ``times`` times."""

    def __init__(self, number: int = int(signal.SIGINT), times: int = 1) -> None:
        self.number, self.times = number, times

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        mark(trainer)
        for _number in range(self.times):
            os.kill(os.getpid(), self.number)
            time.sleep(1.5)  # longer than a launcher takes to forward a signal


class SaveAtStart(Callback):
    """Saves the state that a run resumes with, before it trains a step, and exits with 7."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoints = checkpoints_of(trainer)
        checkpoints._saved_step = -1
        checkpoints.save_now(trainer)
        os._exit(7)


class LimitFileSize(Callback):
    """From the end of step ``step`` limits the size of files to less than a checkpoint's, like ``ulimit -f``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            size = latest_checkpoint(RunFolder(Path(trainer.default_root_dir)).checkpoints_folder).stat().st_size
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 4, hard))


class PoisonAt(Callback):
    """Makes one number of these batches NaN, on one rank."""

    def __init__(self, batches: list[int], rank: int) -> None:
        self.batches, self.rank, self.seen = batches, rank, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int) -> None:
        if self.seen in self.batches and trainer.global_rank == self.rank:
            name = "mean" if "mean" in batch else "image"
            batch[name] = batch[name].float()  # images are bytes, which have no NaN
            batch[name][0, 0, 0, 0] = torch.nan
        self.seen += 1


class Fault(Callback):
    """Something that happens on one rank at the end of a step."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            self.happen()

    def happen(self) -> None:
        raise NotImplementedError


class RunOutOfMemory(Fault):
    """Torch's error."""

    def happen(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Hang(Fault):
    """The process hangs, without an error."""

    def happen(self) -> None:
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
