"""The logs of a run: rows of metrics over kills and resumes, messages, a record of each start."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.errors import LdmError
from ldm.runs.logging import INFORMATIVE, LOGGED, RunCSVLogger, git_state, loggers, recorded, run_log
from ldm.runs.preemption import Preempted
from tests.tiny import Do, make_trainer

VALIDATE_EVERY, STEPS = 5, 12


class Tiny(LightningModule):
    """Its loss is the step; another metric comes late, so that the header of the log grows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("train/loss", float(self.global_step))
        if self.global_step >= 6:
            self.log("train/late", 1.0)
        return self.layer(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", float(self.global_step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Killed(BaseException):
    """Ends training without any clean-up."""


def kill_at(step: int) -> Callback:
    def kill(trainer: Trainer) -> None:
        raise Killed

    return Do("on_train_batch_end", step, kill)


def save_at(step: int) -> Callback:
    return Do("on_train_batch_end", step, lambda run: run.save_checkpoint(Path(run.default_root_dir, "saved.ckpt")))


def trainer_of(folder: Path, resumed_at: int | None = None, *callbacks: Callback, steps: int = STEPS) -> Trainer:
    settings = {"logger": loggers(folder, None, resumed_at), "callbacks": [*callbacks], "log_every_n_steps": 2}
    return make_trainer(folder, steps, val_check_interval=VALIDATE_EVERY, **settings)


def fit(folder: Path, resumed_at: int | None = None, *callbacks: Callback) -> None:
    numbers: Any = torch.ones(100, 1)
    train, validation = DataLoader(numbers), DataLoader(numbers[:1])
    checkpoint = None if resumed_at is None else folder / "saved.ckpt"
    trainer_of(folder, resumed_at, *callbacks).fit(Tiny(), train, validation, ckpt_path=checkpoint)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "logs" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    fit(folder)
    return folder


# a run is killed soon after it saved; after it logged, too; after the header grew; before it came to log again
@pytest.mark.parametrize(("save", "kill"), [(3, 4), (4, 8), (7, 10), (8, 9)])
def test_a_run_killed_and_resumed_ends_with_the_same_rows(unbroken: Path, tmp_path: Path, save: int, kill: int) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, None, save_at(save), kill_at(kill))
    with open(tmp_path / "logs" / "metrics.csv", "a") as file:
        file.write("0,9,0.1")  # what was being written when it was killed
    fit(tmp_path, save)
    assert rows(tmp_path) == rows(unbroken)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "3", "4", "5", "7", "9", "9", "11"]


def test_tensorboard_forgets_what_is_trained_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, None, save_at(4), kill_at(10))
    time.sleep(1)  # the files are named, and read in the order of, their seconds
    fit(tmp_path, 4)
    events = EventAccumulator(str(tmp_path / "logs")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [1, 3, 5, 7, 9, 11]


def test_a_run_that_starts_again_from_nothing_has_no_rows_of_before(unbroken: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, None, kill_at(10))
    fit(tmp_path)
    assert rows(tmp_path) == rows(unbroken)


def test_a_log_without_a_file_goes_on_too(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path, resumed_at=4)
    logger.log_metrics({"train/loss": 0.5}, step=5)
    logger.save()
    assert rows(tmp_path) == [{"step": "5", "train/loss": "0.5"}]


def test_loggers_of_the_config_stand_beside_ours(tmp_path: Path) -> None:
    other = CSVLogger(tmp_path / "other")
    for given in (other, [other]):
        assert [type(each) for each in loggers(tmp_path, given, None)] == [RunCSVLogger, TensorBoardLogger, CSVLogger]
    for given in (None, True, False):
        assert [type(each) for each in loggers(tmp_path, given, None)] == [RunCSVLogger, TensorBoardLogger]


# -- the log -------------------------------------------------------------------------------------------------------------


def test_the_log_has_what_loggers_and_warnings_say(tmp_path: Path) -> None:
    names = (*LOGGED, *INFORMATIVE, "py.warnings")
    before = [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in names]
    with run_log(tmp_path, rank=0):
        logging.getLogger("ldm.data.loader").info("for information")
        logging.getLogger("lightning.pytorch.utilities.rank_zero").warning("of Lightning's")
        logging.getLogger("somebody.else").warning("not ours")
    logging.getLogger("ldm.data.loader").warning("after the run")
    said = (tmp_path / "logs" / "run.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in said[:2]] == [
        "rank 0 INFO ldm.data.loader: for information",
        "rank 0 WARNING lightning.pytorch.utilities.rank_zero: of Lightning's",
    ]
    assert "not ours" not in "".join(said) and "after the run" not in "".join(said)
    assert [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in names] == before


def test_warnings_reach_the_terminal_as_they_would_without_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's own
    console = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [console])
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", False)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.WARNING)
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: print(message, file=sys.stderr))
    for rank in (0, 1):
        with run_log(tmp_path, rank):
            logging.getLogger("ldm.data").warning("of ours")
            logging.getLogger("ldm.data").info("for the log")
            logging.getLogger("lightning.pytorch.trainer").warning("of Lightning's")
            logging.getLogger("lightning.pytorch.trainer").info("for nobody")
            logging.getLogger("lightning.pytorch.utilities.rank_zero").info("for the log, too")
            warnings.showwarning("by warn", UserWarning, "file.py", 1)  # as warnings.warn does
        assert console.level == logging.NOTSET
    assert capsys.readouterr().err.splitlines() == ["of ours", "of Lightning's", "by warn"] * 2
    first, second = ((tmp_path / "logs" / name).read_text() for name in ("run.log", "run-rank1.log"))
    assert [line.split(" ", 1)[1] for line in first.splitlines()] == [
        "rank 0 WARNING ldm.data: of ours",
        "rank 0 INFO ldm.data: for the log",
        "rank 0 WARNING lightning.pytorch.trainer: of Lightning's",
        "rank 0 INFO lightning.pytorch.utilities.rank_zero: for the log, too",
        "rank 0 WARNING py.warnings: UserWarning: by warn",
    ]
    assert len(second.splitlines()) == 3 and "rank 1 WARNING py.warnings: UserWarning: by warn" in second


def test_other_processes_have_a_log_with_their_first_warning(tmp_path: Path) -> None:
    with run_log(tmp_path, rank=1):
        logging.getLogger("ldm.data").info("quietly")
        assert not (tmp_path / "logs").exists()
        logging.getLogger("ldm.data").warning("aloud")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["run-rank1.log"]


# -- the record ----------------------------------------------------------------------------------------------------------


def test_every_start_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-secret-of-the-environment")
    command = ["ldm", "denoiser", "fit", "--out", "a folder"]
    with pytest.raises(LdmError), recorded(trainer_of(tmp_path), Tiny(), command, None):
        raise LdmError("the disk is full\nand so on")
    with pytest.raises(ZeroDivisionError), recorded(trainer_of(tmp_path), Tiny(), command, 4):
        raise ZeroDivisionError("division by zero")
    with pytest.raises(Preempted), recorded(trainer_of(tmp_path), Tiny(), command, 4):
        raise Preempted("saved")
    with recorded(trainer_of(tmp_path, steps=0), Tiny(), command, 8):
        pass
    text = (tmp_path / "logs" / "environment.json").read_text()
    starts = json.loads(text)
    assert [start["resumed_at_step"] for start in starts] == [None, 4, 4, 8]
    assert [start["ended"].get("why") for start in starts] == ["the disk is full", "division by zero", "as asked", None]
    assert starts[0]["command"] == "ldm denoiser fit --out 'a folder'" and starts[0]["parameters"] == {"layer": 2}
    assert starts[0]["processes"] == 1 and torch.__version__.startswith(starts[0]["versions"]["torch"])
    assert "a-secret" not in text and str(Path.home()) not in text and str(Path(__file__).parents[2]) not in text
    log = (tmp_path / "logs" / "run.log").read_text()
    assert "stopped at step 0: the disk is full" in log and "resumed at step 4: ldm denoiser fit" in log
    assert "ZeroDivisionError" in log and "finished at step 0" in log


def test_a_start_that_is_killed_has_no_end(tmp_path: Path) -> None:
    with recorded(trainer_of(tmp_path), Tiny(), ["ldm"], None):
        assert "ended" not in json.loads((tmp_path / "logs" / "environment.json").read_text())[0]


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


def test_the_commit_of_a_checkout_and_whether_it_was_changed(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "notes").write_text("of no account")
    assert git_state(tmp_path) == state
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == state | {"dirty": True}
    # a package installed into a folder of somebody's checkout is none of it
    (tmp_path / "environment").mkdir()
    assert git_state(tmp_path / "environment") is None
