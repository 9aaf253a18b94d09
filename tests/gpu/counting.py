"""A callback that takes the pretended GPU's counts at the end of every training step."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from tests.gpu.pretend import COUNTS, Counts

#: of the last run, by the step after which they were taken
marks: dict[int, Counts] = {}


class CountSteps(Callback):
    """``--trainer.callbacks+=tests.gpu.counting.CountSteps``."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        marks.clear()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        marks[trainer.global_step] = COUNTS.copy()


def between(first: int, last: int) -> Counts:
    """What the steps after ``first`` up to ``last`` asked for, with what comes between steps."""
    return marks[last].since(marks[first])
