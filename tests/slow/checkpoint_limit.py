"""A callback that tests give by class_path: it limits the size of files to less than a checkpoint's."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from ldm.runs.checkpoints.files import latest_checkpoint
from ldm.runs.layout import RunFolder


class LimitFileSize(Callback):
    """From the end of step ``step``, like ``ulimit -f``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            size = latest_checkpoint(RunFolder(Path(trainer.default_root_dir)).checkpoints_folder).stat().st_size
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 4, hard))
