"""Kill a training that saves at every step, again and again, and check what it leaves each time.

    python checkpoint_saver.py FOLDER ROUNDS SEED

Each training is a fork of this process, which imports everything once. Every other one saves in the background. Prints how
many kills fell into a write.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ldm.runs.checkpoints.callback import Checkpoints
from ldm.runs.checkpoints.files import latest_checkpoint, load_checkpoint
from ldm.runs.layout import RunFolder, checkpoints_in, step_of


class Numbers:
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 1


class Heavy(LightningModule):
    """Takes a millisecond to train and many to save; writes each step whose save has returned to ``pipe``."""

    def __init__(self, pipe: int):
        super().__init__()
        self.network, self.pipe = nn.Linear(700, 700), pipe

    def train_dataloader(self) -> Numbers:
        return Numbers()

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        return self.network(torch.ones(1, 700)).square().mean()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        os.write(self.pipe, f"{self.global_step}\n".encode())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def train(folder: Path, pipe: int, background: bool, processes: int = 1, *callbacks: Callback) -> None:
    checkpoints = RunFolder(folder).checkpoints_folder
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy="auto" if processes == 1 else "ddp", max_epochs=-1, max_steps=10**9,
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[*callbacks, Checkpoints(every_steps=1, background=background)],
    )  # fmt: skip
    trainer.fit(Heavy(pipe), ckpt_path=latest_checkpoint(checkpoints) if checkpoints_in(checkpoints) else None)


def killed(folder: Path, background: bool, seconds: float) -> int:
    """Kill a training ``seconds`` after its first save; returns the last step whose save had returned."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        try:
            train(folder, writes, background)
        finally:
            os._exit(1)
    os.close(writes)
    assert select.select([reads], [], [], 30)[0], "nothing is saved within 30 seconds"
    time.sleep(seconds)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the training ended by itself"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(reads) as pipe:
        steps = [int(line) for line in pipe]
    # in the background a write is known to be complete when the next begins
    return steps[-1] - background


def main(folder: Path, rounds: int, seed: int) -> None:
    chance, newest, in_a_write = random.Random(seed), 0, 0
    checkpoints = RunFolder(folder).checkpoints_folder
    for number in range(rounds):
        returned = killed(folder, bool(number % 2), chance.uniform(0, 0.3))
        assert returned >= newest, f"round {number}: after step {newest} it only came to {returned}"
        latest = latest_checkpoint(checkpoints)
        content = load_checkpoint(latest)
        assert content["global_step"] == step_of(latest) >= returned, f"round {number}: {latest} after {returned} was saved"
        assert (checkpoints / "last.ckpt").resolve() == latest.resolve()
        left = [*checkpoints.glob(".*")]
        in_a_write += bool(left)
        assert len(left) <= 3 and len(checkpoints_in(checkpoints)) <= 4, f"round {number}: {[*checkpoints.iterdir()]}"
        newest = step_of(latest)
    print(in_a_write)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # collecting would copy all that the forks share
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    gc.unfreeze()
