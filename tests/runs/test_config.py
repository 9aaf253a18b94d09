"""What ``fit`` refuses before it makes anything: values out of range, Lightning's options, YAML that grows, older names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import Trainer

from ldm.cli import main
from ldm.data.datamodule import ShardDataModule
from ldm.runs.config import RANGES, TRAINER_OPTIONS, limit_yaml
from ldm.runs.report import RunRecord
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.denoiser import DenoiserTraining
from tests.samples import yaml_bomb
from tests.tiny import write_config

STEPS = {"max_steps": 2, "val_check_interval": 2}


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line with which ``fit`` refuses its arguments."""
    with pytest.raises(SystemExit) as leave:
        main(list(arguments))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldm: ")]
    assert leave.value.code == 2 and len(said) == 1
    return said[0]


@pytest.fixture
def fit(latents: tuple[Path, Path], tmp_path: Path) -> list[str]:
    """The arguments of a training that works."""
    config = write_config(tmp_path / "config.yaml", latents, STEPS)
    return ["denoiser", "fit", "--config", str(config), "--out", str(tmp_path / "run")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.workers", "-1"], "data.workers is -1; give 0 to 1024"),
        (["--data.workers", "100000"], "data.workers is 100000; give 0 to 1024"),
        (["--data.image_size", "0"], "data.image_size is 0; give 1 to 65536"),
        (["--data.seed", "-1"], "data.seed is -1; give 0 or more"),
        (["--data.train", '[{"path": "x", "weight": 1e30}]'], "data.train.weight is 1e+30; give 0 to 1000000"),
        (["--model.optimiser.learning_rate", "-1"], "model.optimiser.learning_rate is -1; give 0 or more"),
        (["--model.optimiser.learning_rate=.nan"], "model.optimiser.learning_rate is nan; give a finite number"),
        (["--model.preview_guidance=.inf"], "model.preview_guidance is inf; give a finite number"),
        (["--model.optimiser.betas", "[0.9, 1.0]"], "model.optimiser.betas is 1; give 0 or more and less than 1"),
        (["--model.preview_steps", "1000000000"], "model.preview_steps is 1e+09; give 1 to 10000"),
        (["--model.denoiser.init_args.mlp_ratio=.nan"], "model.denoiser.mlp_ratio is nan; give a finite number"),
        (["--seed_everything", "-1"], "seed_everything is -1; give 0 to 4294967295"),
        (["--trainer.max_steps", "9" * 400], "give a finite number, a whole one of at most 64 bits"),
        (["--trainer.max_steps", "0"], "trainer.max_steps is 0; give 1 to "),
        (["--trainer.max_steps", "-1"], "the run would never end; give trainer.max_time"),
        (["--trainer.val_check_interval", "0"], "trainer.val_check_interval is 0; give 1 or more"),
        (["--trainer.val_check_interval", "0.5"], "trainer.val_check_interval is 0.5: the loader never ends"),
        (["--trainer.accumulate_grad_batches", "2"], "model.accumulate"),
        (["--trainer.gradient_clip_val", "1"], "give model.optimiser.max_grad_norm"),
        (["--trainer.limit_train_batches", "0.5"], "trainer.max_steps"),
        (["--trainer.devices", "0"], "trainer.devices is 0; give 1 to "),
        (["--trainer.accelerator", "cpu", "--trainer.devices", "1,1"], "trainer.devices is 1,1; give 1 to "),
        (["--trainer.strategy", "ddp_spawn"], "trainer.strategy ddp_spawn starts processes"),
        (["--trainer.devices", "all"], "trainer.devices is all; give a number"),
        (["--trainer.devices", "100000"], "trainer.devices is 100000; give 1 to "),
        (["--trainer.accelerator", "abacus"], "the config cannot be built: You selected an invalid accelerator name"),
        (["--trainer.limit_val_batches", "2.5"], "limit_val_batches"),
        (["--trainer.max_time", "soon"], "is not a valid duration"),
        (["--trainer.profiler", "guess"], "profiler"),
        (["--trainer", "5"], "trainer"),
        (["--checkpoints", "[1]"], "checkpoints"),
        (["--model.denoiser.init_args.width", "0"], "width is 0; give "),
        (["--model.denoiser.init_args.num_layers", "100000000"], "num_layers is 100000000; give "),
        (["--model.denoiser", "subprocess.Popen"], "model.denoiser"),
        (["--model.denoiser", "no.such.Thing"], "no.such.Thing"),
        (["--model.direction_weight", "1"], "direction_weight is now auxiliary_losses with ldm.losses.auxiliary.DirectionLoss"),
        (["--model.power_averages", "{product: 0.1}"], "product is now selected"),
        (["--model.denoiser.init_args.num_heads", "2"], "num_heads is now num_attention_heads"),
        (["--config", "/dev/zero"], "/dev/zero is a device; give --config a YAML file"),
        (["--model=/dev/zero"], "/dev/zero is a pipe, a socket or a device; give a regular file"),
        (["--config", "."], ". is a folder; give --config a YAML file"),
    ],
)
def test_a_value_that_cannot_be_meant_is_one_line_and_nothing_is_made(
    capsys: pytest.CaptureFixture, fit: list[str], tmp_path: Path, options: list[str], said: str
) -> None:
    assert said in refused(capsys, *fit, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_a_class_that_has_moved_is_named_with_its_present_place(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "configs/shapes/autoencoder.yaml"
    options = ["--out", str(tmp_path / "run"), "--model.adversary.loss", "ldm.losses.Hinge"]
    said = refused(capsys, "autoencoder", "fit", "--config", str(recipe), *options)
    assert "ldm.losses.Hinge is now ldm.losses.adversarial.Hinge" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_named(capsys: pytest.CaptureFixture, fit: list[str]) -> None:
    assert "trainer.accelerator is gpu, but torch finds no GPU" in refused(capsys, *fit, "--trainer.accelerator", "gpu")


# -- YAML ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        yaml_bomb(9, 9),
        "model: &m {denoiser: *m}",
        "a" * 10 + ": " + "9" * 5000,
        "model: {a: 1",
        "[1, 2]",
        "5",
        "? [a]\n: 1",
        "title: a\0b",
        "model: !!python/object/apply:os.system [false]",
        "trainer: null",
        "model: 2020-01-01",
        "config: {a: 1}",
    ],
)
def test_a_config_of_anything_is_refused_in_one_line(
    capsys: pytest.CaptureFixture, fit: list[str], tmp_path: Path, text: str
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert len(refused(capsys, *fit, "--config", str(tmp_path / "bad.yaml"))) < 1000
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", "title: é".encode("latin1")])
def test_a_config_of_another_encoding_is_named(
    capsys: pytest.CaptureFixture, fit: list[str], tmp_path: Path, text: bytes
) -> None:
    (tmp_path / "bad.yaml").write_bytes(text)
    assert "bad.yaml is not UTF-8" in refused(capsys, *fit, "--config", str(tmp_path / "bad.yaml"))


def test_a_config_is_never_a_pipe(capsys: pytest.CaptureFixture, fit: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for option in ("--config", "--model", "--data", "--model.denoiser"):
        assert " pipe" in refused(capsys, *fit, option, str(tmp_path / "pipe"))


def test_texts_inside_a_config_are_limited_too() -> None:
    """jsonargparse reads a text as YAML where a number is due, and quotes the value in its message."""
    limit_yaml()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--number", type=int)
    began = time.monotonic()
    with pytest.raises(Exception, match="number"):
        parser.parse_object({"number": "{" + yaml_bomb(12, 9).replace("\n", ", ") + "}"})
    assert time.monotonic() - began < 5


# -- the tables ----------------------------------------------------------------------------------------------------------


def test_every_key_of_the_tables_is_an_option() -> None:
    """A renamed option must not lose its check."""
    options = {"seed_everything", "data.train.weight"}
    sections = {"model": [AutoencoderTraining, DenoiserTraining], "data": [ShardDataModule], "trainer": [Trainer]}
    for section, classes in sections.items():
        for each in classes:
            parser = ArgumentParser()
            parser.add_class_arguments(each, section, fail_untyped=False)
            options |= {action.dest for action in parser._actions}
    assert {key for *_, keys in RANGES for key in keys} <= options
    assert {f"trainer.{name}" for name in TRAINER_OPTIONS} <= options


# -- what never began ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.callbacks+=lightning.pytorch.callbacks.StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.1"],
        [
            "--trainer.callbacks+=lightning.pytorch.callbacks.GradientAccumulationScheduler",
            "--trainer.callbacks.scheduling",
            "{0: 2}",
        ],
        ["--trainer.max_time", "00:00:00:00"],
        ["--model.optimiser.schedule", "cosine", "--trainer.max_steps", "-1", "--trainer.max_time", "00:00:01:00"],
    ],
)
def test_a_run_that_never_trained_a_step_leaves_nothing(
    capsys: pytest.CaptureFixture, fit: list[str], tmp_path: Path, options: list[str]
) -> None:
    refused(capsys, *fit, *options)
    assert not (tmp_path / "run").exists()


def test_a_bug_before_the_first_step_leaves_nothing_and_keeps_its_traceback(
    fit: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DenoiserTraining, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(fit)
    assert not (tmp_path / "run").exists()


def test_sigterm_before_the_first_step_is_answered_with_143(fit: list[str], tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
from ldm.cli import main
from ldm.training.denoiser import DenoiserTraining
def prepare(self, data):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
DenoiserTraining.prepare = prepare
main(sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", program, *fit], capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "ldm: ended by SIGTERM" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_by_time_alone_trains_at_a_constant_rate(fit: list[str], tmp_path: Path) -> None:
    main([*fit, "--trainer.max_steps", "-1", "--trainer.max_time", "00:00:00:01", "--trainer.val_check_interval", "1000000"])
    assert (tmp_path / "run/pipeline/model_index.json").is_file()
    assert RunRecord.read(tmp_path / "run").state(time.time()) == "finished"
