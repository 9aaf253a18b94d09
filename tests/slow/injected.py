"""Callbacks that tests give to runs by class_path: signals and faults at a step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from ldm.runs.checkpoints.callback import Checkpoints


class SignalAt(Callback):
    """Sends its process a signal at the end of each of these steps, once in a run, on one rank or (-1) on all.

    Callbacks of the config run first: a checkpoint that is due at the step is not yet written.
    """

    def __init__(self, steps: list[int], number: int = int(signal.SIGKILL), rank: int = -1) -> None:
        self.steps, self.number, self.rank = steps, number, rank

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        step, rank = trainer.global_step, trainer.global_rank
        sent = Path(trainer.default_root_dir, f"signalled-{rank}-{step}")
        if step in self.steps and self.rank in (-1, rank) and not sent.exists():
            sent.touch()
            os.kill(os.getpid(), self.number)


class SaveAtStart(Callback):
    """Saves the state that a run resumes with, before it trains a step, and exits with 7."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoints = trainer.checkpoint_callback
        assert isinstance(checkpoints, Checkpoints)
        checkpoints._saved_step = -1
        checkpoints.save_now(trainer)
        os._exit(7)


class PoisonAt(Callback):
    """Makes one number of these batches NaN, on one rank."""

    def __init__(self, batches: list[int], rank: int) -> None:
        self.batches, self.rank, self.seen = batches, rank, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int) -> None:
        if self.seen in self.batches and trainer.global_rank == self.rank:
            if "mean" in batch:
                batch["mean"][0, 0, 0, 0] = torch.nan
            else:  # images are bytes, which have no NaN
                batch["image"] = batch["image"].float()
                batch["image"][0, 0, 0, 0] = torch.nan
        self.seen += 1
