"""The private attributes of Lightning that ldm uses, in the installed version; no other file uses any."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loops import training_epoch_loop
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ldm
from ldm.runs import lightning_private as private
from tests.tiny import make_trainer

# attributes of Lightning's objects, as the code names them, that begin with an underscore
PRIVATE = re.compile(r"\b(trainer|strategy|fit_loop|epoch_loop|val_loop|loop|launcher|fetcher|lightning_module)\._[a-z]\w*")
PRIVATE_IMPORT = re.compile(r"from lightning\S* import .*\b_\w+")


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network, self.validated = nn.Linear(1, 1), 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.network(batch).sum()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Watch(Callback):
    """Records the private attributes at the end of each batch and around validations."""

    def __init__(self, skip: bool = False) -> None:
        self.accumulates: list[bool] = []
        self.due: list[bool] = []
        self.hooks: list[str | None] = []
        self.taken: list[Any] = []
        self.skip = skip

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def watched(batches: Iterator[Any]) -> Iterator[Any]:
            for batch in batches:
                self.taken.append(batch)
                yield batch

        private.wrap_batches(trainer, watched)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self.accumulates.append(private.accumulates(trainer))
        self.due.append(private.validation_is_due(trainer))
        self.hooks.append(private.current_hook(trainer))
        if self.skip:
            private.skip_next_validation(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hooks.append(private.current_hook(trainer))


def trained(watch: Watch, folder: Path) -> Line:
    module = Line()
    trainer = make_trainer(folder, 2, accumulate_grad_batches=2, val_check_interval=4, callbacks=[watch])
    numbers: Any = torch.ones(8, 1)
    trainer.fit(module, DataLoader(numbers), DataLoader(numbers[:1]))
    return module


def test_no_other_file_uses_private_parts_of_lightning() -> None:
    own, root = Path(private.__file__), Path(ldm.__file__).parent
    found = [
        f"{path.relative_to(root.parent)}:{number}: {line.strip()}"
        for folder in (root, root.parent / "tools")
        for path in sorted(folder.rglob("*.py"))
        if path != own
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PRIVATE.search(line) or PRIVATE_IMPORT.search(line)
    ]
    assert found == []


def test_accumulation_due_validations_and_the_current_hook(tmp_path: Path) -> None:
    watch = Watch()
    module = trained(watch, tmp_path)
    assert watch.accumulates == [True, False, True, False] and watch.due == [False, False, False, True]
    assert watch.hooks == ["on_train_batch_end"] * 4 + ["on_validation_end"] and module.validated == 1
    assert len(watch.taken) >= 4


def test_a_due_validation_can_be_skipped(tmp_path: Path) -> None:
    assert trained(Watch(skip=True), tmp_path).validated == 0


def test_the_broadcast_for_sigterm_can_be_left_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1)
    assert training_epoch_loop._TrainingEpochLoop._broadcast_sigterm_tensor.__code__.co_argcount == 1
    private.without_sigterm_exchange(trainer)
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None  # else it would make a tensor on the device


def test_the_handlers_that_lightning_restores_can_be_set() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    private.ignore_after_training(trainer, signal.SIGUSR2)
    connector = trainer._signal_connector
    before = signal.getsignal(signal.SIGUSR2)
    try:
        connector.teardown()
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_options_of_ddp_and_who_writes_shards() -> None:
    strategy = DDPStrategy(find_unused_parameters=True)
    private.set_ddp_options(strategy, find_unused_parameters=False, forward_sync_buffers=False)
    assert strategy._ddp_kwargs == {"find_unused_parameters": False, "forward_sync_buffers": False}
    assert [private.writes_shards(each) for each in (strategy, SingleDeviceStrategy(), ModelParallelStrategy())] == [
        False, False, True,
    ]  # fmt: skip
