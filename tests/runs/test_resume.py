"""A resumed run has the settings that are asked for, or is refused by name; what ``logs/config.yaml`` records is what ran."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm.cli import main
from ldm.runs.layout import RunFolder
from tests.tiny import write_config

ARTIFACTS = {"autoencoder": "autoencoder", "denoiser": "pipeline"}
STEPS = {"max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1}


def stage_one(file: Path, shards: Path) -> Path:
    losses = "ldm.losses"
    config = {
        "trainer": {"accelerator": "cpu", "precision": "32-true", **STEPS},
        "data": {"train": str(shards), "validation": str(shards), "batch_size": 4, "validation_samples": 4},
        "model": {
            "autoencoder": {
                "block_out_channels": [8, 16],
                "norm_num_groups": 4,
                "layers_per_block": 1,
                "mid_block_add_attention": False,
                "sample_size": 32,
            },
            "adversary": {
                "discriminator": {
                    "class_path": "ldm.models.discriminator.PatchDiscriminator",
                    "init_args": {"width": 8, "num_layers": 2},
                },
                "start": 0,
            },
            "reconstruction": {"class_path": f"{losses}.reconstruction.ReconstructionLoss", "init_args": {"l2": 1.0}},
            "perceptual": {
                "class_path": f"{losses}.perceptual.PerceptualLoss",
                "init_args": {"trunk": "alex", "weights": "random"},
            },
            "optimiser": {"learning_rate": 1e-3, "schedule": "linear"},
            "discriminator_optimiser": {"learning_rate": 1e-3},
        },
    }
    file.write_text(json.dumps(config))
    return file


@pytest.fixture(scope="module")
def trained(image_shards: Path, latents: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of two steps of each stage, in a folder with its config."""
    folder = tmp_path_factory.mktemp("trained")
    optimiser = {"learning_rate": 1e-3, "schedule": "linear"}
    configs = {
        "autoencoder": stage_one(folder / "autoencoder.yaml", image_shards),
        "denoiser": write_config(folder / "denoiser.yaml", latents, STEPS, optimiser=optimiser),
    }
    for stage, config in configs.items():
        main([stage, "fit", "--config", str(config), "--out", str(folder / stage)])
        shutil.rmtree(folder / stage / ARTIFACTS[stage])
    return {stage: folder / stage for stage in configs}


def resume(stage: str, trained: dict[str, Path], out: Path, *options: str) -> RunFolder:
    """Two more steps of a copy of the run."""
    if not out.exists():
        shutil.copytree(trained[stage], out, symlinks=True)
    config = trained[stage].with_suffix(".yaml")
    main([stage, "fit", "--config", str(config), "--out", str(out), "--resume", "latest", "--trainer.max_steps", "4", *options])
    return RunFolder(out)


def checkpoint(run: RunFolder) -> dict[str, Any]:
    return torch.load(run.last_checkpoint, weights_only=True)


@pytest.mark.parametrize("stage", ARTIFACTS)
def test_a_resumed_run_has_the_rates_and_decays_that_are_asked_for(
    stage: str, trained: dict[str, Path], tmp_path: Path
) -> None:
    """The schedule continues at its step from the new rate: linear to 0 over four steps, of which two are done."""
    asked = {"learning_rate": "0.01", "weight_decay": "0.25", "betas": "[0.5, 0.75]"}
    options = [word for name, value in asked.items() for word in (f"--model.optimiser.{name}", value)]
    run = resume(stage, trained, tmp_path / "run", *options, "--model.ema_decay", "0.125")
    after = checkpoint(run)
    group = after["optimizer_states"][0]["param_groups"][0]
    assert (group["weight_decay"], group["betas"], group["initial_lr"]) == (0.25, (0.5, 0.75), 0.01)
    assert after["average"]["decay"] == 0.125 and after["lr_schedulers"][0]["base_lrs"] == [0.01]
    rates = [float(row["train/lr"]) for row in csv.DictReader(run.metrics.open()) if row["train/lr"]]
    assert rates[-2:] == pytest.approx([0.005, 0.0025])
    recorded = yaml.safe_load(run.config.read_text())["model"]
    assert recorded["optimiser"]["learning_rate"] == 0.01 and recorded["ema_decay"] == 0.125


def test_both_optimisers_of_stage_one_have_what_is_asked_for(trained: dict[str, Path], tmp_path: Path) -> None:
    after = checkpoint(
        resume("autoencoder", trained, tmp_path / "run", "--model.discriminator_optimiser.learning_rate", "0.125")
    )
    rates = [state["param_groups"][0]["initial_lr"] for state in after["optimizer_states"]]
    assert rates == [1e-3, 0.125]


NETWORKS = [
    ("autoencoder", ["--model.autoencoder.block_out_channels", "[8, 32]"], "autoencoder.encoder.down_blocks.1"),
    ("autoencoder", ["--model.adversary.discriminator.init_args.width", "16"], "adversary.discriminator.layers.0.weight"),
    ("autoencoder", ["--model.learn_variance", "true"], "variance.log_variance: none there, () here"),
    ("denoiser", ["--model.denoiser.init_args.num_layers", "3"], "denoiser.blocks.2"),
    # the weights have the same shapes
    ("denoiser", ["--model.denoiser.init_args.positions", "sincos_rope"], "positions: sincos there, sincos_rope here"),
]
SEEDS = [
    (stage, [f"--{key}", "7"], f"{key} is 7, but the run began with 0")
    for stage in ARTIFACTS
    for key in ("seed_everything", "data.seed")
]
MOMENTS = [
    (stage, [f"--model.{name}.eight_bit", "true"], f"without moments in 8 bits: give --model.{name}.eight_bit false")
    for stage, name in (("denoiser", "optimiser"), ("autoencoder", "discriminator_optimiser"))
]


@pytest.mark.parametrize(("stage", "options", "said"), [*NETWORKS, *SEEDS, *MOMENTS])
def test_what_cannot_be_resumed_is_refused_by_name_and_nothing_changes(
    capsys: pytest.CaptureFixture, trained: dict[str, Path], tmp_path: Path, stage: str, options: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as leave:
        resume(stage, trained, tmp_path / "run", *options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldm: ")]
    assert leave.value.code == 2 and len(lines) == 1 and said in lines[0]
    run, before = RunFolder(tmp_path / "run"), RunFolder(trained[stage])
    assert run.config.read_text() == before.config.read_text() and run.metrics.read_text() == before.metrics.read_text()
    resume(stage, trained, tmp_path / "run")


def test_any_seed_is_the_first_one(trained: dict[str, Path], tmp_path: Path) -> None:
    run = resume("denoiser", trained, tmp_path / "run", "--seed_everything", "true")
    assert checkpoint(run)["seed"] == yaml.safe_load(run.config.read_text())["seed_everything"] == 0


def test_the_best_value_of_another_metric_does_not_count(trained: dict[str, Path], tmp_path: Path) -> None:
    """An LPIPS of 0.1 is no bound for a PSNR: the first value of another metric is its best."""
    run = resume("autoencoder", trained, tmp_path / "run", "--checkpoints.best", "val/lpips", "--trainer.max_steps", "4")
    shutil.rmtree(tmp_path / "run/autoencoder")
    metric = ["--checkpoints.best", "val/psnr", "--checkpoints.best_mode", "max", "--trainer.max_steps", "6"]
    run = resume("autoencoder", trained, tmp_path / "run", *metric)
    assert run.best_checkpoint.resolve() == run.last_checkpoint.resolve()


def test_a_run_without_a_number_of_steps_has_no_decaying_schedule(
    capsys: pytest.CaptureFixture, trained: dict[str, Path], tmp_path: Path
) -> None:
    options = ["--trainer.max_steps", "-1", "--trainer.max_time", "00:00:01:00"]
    with pytest.raises(SystemExit):
        resume("autoencoder", trained, tmp_path / "run", *options)
    assert "the schedule linear needs the number of steps" in capsys.readouterr().err
