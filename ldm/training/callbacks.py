"""What happens beside training: the line of progress, the preview pictures."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ldm.files import write_json
from ldm.progress import Progress
from ldm.report import captioned_grid, paired_grid
from ldm.training.base import Stage

SHOWN = ("loss", "rec", "lpips", "g", "d")


class ProgressLine(Callback):
    """The stage, the step, the losses and the time left. Lightning's own bar counts batches of an endless epoch."""

    def __init__(self, stage: str):
        self.stage = stage

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.progress = Progress(self.stage, trainer.max_steps, quiet=not trainer.is_global_zero)
        self.progress.__enter__()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        logged = trainer.callback_metrics
        figures = {name: float(logged[f"train/{name}"]) for name in SHOWN if f"train/{name}" in logged}
        figures |= {name.removeprefix("val/"): float(value) for name, value in logged.items() if name == "val/psnr"}
        self.progress.update(trainer.global_step, figures=figures)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.progress.__exit__(None, None, None)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "progress"):
            self.progress.__exit__(None, None, None)


class PreviewGrid(Callback):
    """Before the first step and at each validation, the stage's preview: ``previews/step-00000123.png``, and TensorBoard."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_start(self, trainer: Trainer, module: Stage) -> None:
        if trainer.global_step == 0:
            with module.average_applied():
                self._draw(trainer, module)

    def on_validation_end(self, trainer: Trainer, module: Stage) -> None:
        if trainer.state.fn == "fit":
            self._draw(trainer, module)

    def _draw(self, trainer: Trainer, module: Stage) -> None:
        if not trainer.is_global_zero:
            return
        rows = module.preview()
        if not rows:
            return
        if all(len(pictures) == 1 for _, pictures in rows):
            grid = captioned_grid([pictures[0] for _, pictures in rows], [label for label, _ in rows])
        else:
            grid = paired_grid(rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        grid.save(self.folder / f"step-{trainer.global_step:08d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("preview", np.asarray(grid), trainer.global_step, dataformats="HWC")


class StepTimes(Callback):
    """Write the median seconds per batch, the first ones left out, to a JSON file."""

    def __init__(self, file: str):
        self.file = file
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.append(time.monotonic())

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        seconds = [after - before for before, after in pairwise(self.times)]
        write_json(self.file, {"seconds_per_step": median(seconds[1:] or seconds)})
