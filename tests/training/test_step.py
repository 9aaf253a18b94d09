"""The end of a step: void updates, and values that the host reads in the next step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.data.datamodule import ShardDataModule
from ldm.training import base
from ldm.training.base import TrainingModule
from ldm.training.denoiser import DenoiserTraining
from ldm.training.optimiser import Muon
from ldm.training.step import Readback, Request, Update
from tests.tiny import make_trainer

from .test_denoiser import make

OPTIMISERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "fused": lambda given: AdamW(given, fused=True),
    "not fused": lambda given: AdamW(given, fused=False),  # torch's other kernels cannot void a step: the host decides
    "Muon": lambda given: Muon([each for each in given if each.dim() < 2], [each for each in given if each.dim() > 1], 0.01),
}


def state_of(network: nn.Module, optimiser: Optimizer) -> list[Tensor]:
    """Copies of the weights and of all tensors of the optimiser's state."""
    moments = [value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in [*network.parameters(), *moments]]


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_a_void_update_changes_nothing_and_another_is_a_plain_step(kind: str) -> None:
    torch.manual_seed(0)
    network, plain = nn.Linear(6, 4), nn.Linear(6, 4)
    plain.load_state_dict(network.state_dict())
    optimisers = [OPTIMISERS[kind]([*each.parameters()]) for each in (network, plain)]
    schedules = [LambdaLR(optimiser, lambda step: 1 / (1 + step)) for optimiser in optimisers]

    def update(poison: float) -> Update:
        loss = network(torch.ones(2, 6)).square().sum() * poison
        optimisers[0].zero_grad()
        loss.backward()
        return Update("network", optimisers[0], schedules[0], network.parameters(), 0.5, "loss")

    def plain_step() -> None:
        optimisers[1].zero_grad()
        plain(torch.ones(2, 6)).square().sum().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimisers[1].step()
        schedules[1].step()

    def apply(made: Update, void: float) -> None:
        made.apply(made.norm(made.summand()), torch.tensor(void))

    apply(update(1.0), 0.0)
    plain_step()
    before = state_of(network, optimisers[0])
    apply(update(torch.nan), 1.0)
    schedules[1].step()  # the schedule counts it
    assert all(map(torch.equal, before, state_of(network, optimisers[0])))
    apply(update(1.0), 0.0)
    plain_step()
    assert all(map(torch.equal, state_of(network, optimisers[0]), state_of(plain, optimisers[1])))
    assert not torch.equal(before[0], network.weight)


class Watch(Callback):
    """Notes at the end of each step how often the host has read values, and what is averaged and logged."""

    def __init__(self, stop_after: int = 0) -> None:
        self.stop_after, self.reads, self.averaged, self.logged, self.read = stop_after, [], [], [], 0

    def count(self, values: Readback) -> Tensor:
        self.read += 1
        return _read(values)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        assert isinstance(pl_module, TrainingModule)
        self.reads.append(self.read)
        self.averaged.append(pl_module.average.step)
        self.logged.append(trainer.callback_metrics.get("num_images_seen"))
        trainer.should_stop = trainer.global_step == self.stop_after


_read = Readback.read


def watched(module: DenoiserTraining, latents: Path, folder: Path, watch: Watch, steps: int, **settings: Any) -> Trainer:
    trainer = make_trainer(folder, steps, callbacks=[watch], limit_val_batches=0, **settings)
    trainer.fit(module, ShardDataModule(str(latents), str(latents), batch_size=4))
    return trainer


def test_the_host_reads_a_step_in_the_next_one_and_waits_only_where_it_is_logged(
    latents: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, watch = make(latents[0]), Watch()
    monkeypatch.setattr(Readback, "read", lambda values: watch.count(values))  # a function becomes a method
    watched(module, latents[1], tmp_path, watch, 7, log_every_n_steps=3)
    assert watch.reads == watch.averaged == [0, 1, 3, 3, 4, 6, 6]
    assert watch.read == module.average.step == 7  # the last one at the end of training
    assert watch.logged == [None, None, 12, 12, 12, 24, 24]


def test_the_step_at_which_a_run_is_stopped_is_logged(latents: tuple[Path, Path], tmp_path: Path) -> None:
    module = make(latents[0])
    trainer = watched(module, latents[1], tmp_path, Watch(stop_after=5), 9, log_every_n_steps=3)
    assert trainer.global_step == 5 and trainer.callback_metrics["num_images_seen"] == 20


def test_a_checkpoint_holds_the_averages_of_its_step(latents: tuple[Path, Path], tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    averages = []
    for name, callbacks in (("saved at each step", [Save()]), ("not saved", [])):
        module = make(latents[0])
        torch.manual_seed(1)
        trainer = make_trainer(tmp_path / name, 3, callbacks=callbacks, limit_val_batches=0)
        trainer.fit(module, ShardDataModule(str(latents[1]), str(latents[1]), batch_size=4))
        averages.append(parameters_to_vector(module.average.exponential.shadow_params))
    assert torch.equal(*averages)
    for step in (1, 2, 3):
        saved = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        assert saved["average"]["optimization_step"] == saved["global_step"] == step
    assert torch.equal(parameters_to_vector(saved["average"]["shadow_params"]), averages[0])


def test_one_process_answers_itself_at_once_and_several_by_the_vector(
    latents: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes, this one asks at the end of the first step; the other one's share of the mean is as large."""
    answers: list[bool] = []

    class Ask(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
            assert isinstance(pl_module, TrainingModule)
            if trainer.global_step == 1:
                pl_module.ask(Request.STOP)
            answers.append(pl_module.asked(Request.STOP))

    for several, expected in ((False, [True, False, False, False]), (True, [False, False, True, False])):
        answers.clear()
        if several:
            monkeypatch.setattr(Trainer, "world_size", 2)
            monkeypatch.setattr(base, "mean_over_processes", lambda vector: vector)
        module = make(latents[0])
        trainer = make_trainer(tmp_path / str(several), 4, callbacks=[Ask()], limit_val_batches=0)
        trainer.fit(module, ShardDataModule(str(latents[1]), str(latents[1]), batch_size=2))
        assert answers == expected
