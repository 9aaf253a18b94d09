"""A run that is asked to stop: its checkpoint and its message."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from ldm.runs import preemption
from ldm.runs.checkpoints.callback import Checkpoints
from ldm.runs.checkpoints.files import load_checkpoint
from ldm.runs.preemption import Interrupted, Preempted, Preemption, ended_by_sigterm, requeue
from tests.tiny import make_trainer


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return repeat(torch.ones(2))


class Counter(LightningModule):
    """A weight that counts the steps, and has another value in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.validated = 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log("weight", self.weight)
        return -self.weight

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated += 1

    def on_validation_model_eval(self) -> None:
        self.trained = self.weight.detach().clone()
        self.weight.data.fill_(-1)

    def on_validation_model_train(self) -> None:
        self.weight.data.copy_(self.trained)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1.0)


class At(Callback):
    """Does something at the end of a training batch or of a validation batch, counted from 1."""

    def __init__(self, what: Callable[[], Any], batch: int = 0, validation_batch: int = 0) -> None:
        self.what, self.batch, self.validation_batch = what, batch, validation_batch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any, **__: Any) -> None:
        if arguments[-1] + 1 == self.batch:
            self.what()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        assert isinstance(pl_module, Counter)
        if pl_module.validated == self.validation_batch:
            self.what()


def send(*numbers: int) -> Callable[[], None]:
    def kill() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return kill


def fit(out: Path, *callbacks: Callback, steps: int = 6, **options: Any) -> Trainer:
    options |= {"callbacks": [*callbacks, Preemption(), Checkpoints()], "enable_checkpointing": True}
    validate_every = 3 * options.get("accumulate_grad_batches", 1)
    trainer = make_trainer(out, steps, val_check_interval=validate_every, limit_val_batches=4, log_every_n_steps=1, **options)
    trainer.fit(Counter(), DataLoader(Endless(), batch_size=None), DataLoader(Endless(), batch_size=None))
    return trainer


def saved(out: Path) -> dict[str, Any]:
    """The only checkpoint there is."""
    (file,) = (path for path in (out / "checkpoints").glob("step=*") if path.suffix == ".ckpt")
    return load_checkpoint(file)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """After training the signal handlers are the previous ones; in a process that was asked to stop they ignore signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it may be ignored
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    ignored = [number for number, handler in after.items() if handler == signal.SIG_IGN]
    assert ignored in ([], [signal.SIGTERM, signal.SIGUSR1])
    assert after == before | dict.fromkeys(ignored, signal.SIG_IGN)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_it_saves_at_that_step_and_stops_with_143(tmp_path: Path, number: int) -> None:
    with pytest.raises(Preempted, match=r"^stopped at step 2 .*step=00000002\.ckpt.*--resume latest$") as raised:
        fit(tmp_path, At(send(number), batch=2))
    assert raised.value.exit_code == 143
    signal.raise_signal(signal.SIGTERM)  # a launcher's, once another process has left
    checkpoint = saved(tmp_path)
    assert checkpoint["global_step"] == 2 and checkpoint["state_dict"]["weight"] == 2


def test_the_launchers_signal_is_ignored_up_to_the_end_of_the_process(tmp_path: Path) -> None:
    with pytest.raises(Preempted), ended_by_sigterm():
        fit(tmp_path, At(send(signal.SIGTERM), batch=2))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_the_metrics_of_that_step_are_logged(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        fit(tmp_path, At(send(signal.SIGTERM), batch=2), logger=CSVLogger(tmp_path, name="", version="logs"))
    _, *rows = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 2


def test_a_step_of_several_batches_is_finished_first(tmp_path: Path) -> None:
    with pytest.raises(Preempted, match="stopped at step 2 "):
        fit(tmp_path, At(send(signal.SIGTERM), batch=4), accumulate_grad_batches=3)
    checkpoint = saved(tmp_path)
    assert checkpoint["global_step"] == 2 and checkpoint["state_dict"]["weight"] == 2


def test_within_a_validation_it_saves_the_trained_weights_and_owes_the_validation(tmp_path: Path) -> None:
    class Last(At):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            assert isinstance(pl_module, Counter)
            self.validated = pl_module.validated

    last = Last(send(signal.SIGTERM), validation_batch=2)
    with pytest.raises(Preempted, match="stopped at step 3 "):
        fit(tmp_path, last)
    assert last.validated == 2
    checkpoint = saved(tmp_path)
    assert checkpoint["global_step"] == 3 and checkpoint["state_dict"]["weight"] == 3
    assert checkpoint["callbacks"]["Checkpoints"]["owes_validation"]


def test_after_the_last_step_the_run_finishes(tmp_path: Path) -> None:
    trainer = fit(tmp_path, At(send(signal.SIGTERM), batch=2), steps=2)
    assert trainer.global_step == saved(tmp_path)["global_step"] == 2


def test_ctrl_c_once_saves_and_stops_with_130(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # the same keypress twice, as torchrun sends it on
    with pytest.raises(Interrupted, match="stopped at step 2 ") as raised:
        fit(tmp_path, At(send(signal.SIGINT, signal.SIGINT), batch=2))
    assert raised.value.exit_code == 130 and saved(tmp_path)["global_step"] == 2
    assert capfd.readouterr().err.count("ldm: saving; press Ctrl-C again to stop now\n") == 1


def test_ctrl_c_twice_stops_at_once_and_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "SAME_KEYPRESS_SECONDS", 0.0)
    # Lightning's answer to a KeyboardInterrupt
    with pytest.raises(SystemExit) as raised:
        fit(tmp_path, At(send(signal.SIGINT, signal.SIGINT), batch=2))
    assert raised.value.code == 1 and not (tmp_path / "checkpoints").exists()


def test_without_a_signal_it_trains_to_the_end(tmp_path: Path) -> None:
    assert fit(tmp_path).global_step == 6
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_failure_of_one_process_alone_puts_all_handlers_back(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        fit(tmp_path, At(fail, batch=2))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A fake ``scontrol`` with this last line, which records its arguments."""

    def make(last: str = "") -> Path:
        asked, command = tmp_path / "asked", tmp_path / "scontrol"
        command.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n{last}\n')
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        return asked

    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return make


def test_the_job_is_requeued(scontrol: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scontrol()
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    assert requeue() == "; SLURM job 123 is requeued" and asked.read_text() == "requeue 123\n"


def test_of_an_array_of_jobs_this_one_alone(scontrol: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scontrol()
    for name, value in (("JOB_ID", "125"), ("ARRAY_JOB_ID", "123"), ("ARRAY_TASK_ID", "2")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert "123_2" in requeue() and asked.read_text() == "requeue 123_2\n"


def test_a_failed_requeue_is_reported(scontrol: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "scontrol requeue 123 failed" in requeue() and "submit the job again" in requeue()
    scontrol("echo Job has no batch script >&2; exit 1")
    assert requeue() == "; scontrol requeue 123 failed (Job has no batch script): submit the job again"


def test_elsewhere_and_in_interactive_jobs_nothing_is_requeued(scontrol: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scontrol()
    assert requeue() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert requeue() == "" and not asked.exists()
