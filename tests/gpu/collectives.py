"""A callback that counts the collective operations of each training step, also those that DDP and FSDP start from C++."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Counts operations of torch.distributed by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function._schema.name:
            self.counts[function._schema.name.partition("::")[2]] += 1
        return function(*args, **kwargs or {})


class CountCollectives(Callback):
    """Writes the counts of every step to a JSON file."""

    def __init__(self, file: str):
        self.file, self.steps = file, []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mode = Collectives()
        self.mode.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self.steps.append(dict(self.mode.counts))
        self.mode.counts.clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mode.__exit__(None, None, None)
        if trainer.is_global_zero:
            Path(self.file).write_text(json.dumps(self.steps))
