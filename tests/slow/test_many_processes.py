"""The same mathematics on two processes as on one, plainly (DDP) and with the weights spread over them (FSDP2)."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import TinyRuns
from .warm import DDP, run

WEIGHTS = {"autoencoder": "autoencoder", "denoiser": "pipeline/transformer"}


def weights(out: Path, stage: str) -> dict[str, torch.Tensor]:
    """Of the plain directory."""
    return load_file(out / WEIGHTS[stage] / "diffusion_pytorch_model.safetensors")


def figures(out: Path) -> list[dict[str, float]]:
    """All that was logged but for what tells the time."""
    with open(out / "logs" / "metrics.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return [{name: float(row[name]) for name in row if row[name] and not name.startswith("time/")} for row in found]


def assert_same(out: Path, other: Path, stage: str, tolerance: float) -> None:
    mine, theirs = weights(out, stage), weights(other, stage)
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=tolerance, atol=tolerance)
    assert len(figures(out)) == len(figures(other))
    for row, expected in zip(figures(out), figures(other), strict=True):
        assert row == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_two_processes_with_half_the_batch_are_one_with_the_whole(tiny_runs: TinyRuns, tmp_path: Path, stage: str) -> None:
    """Weights, losses, the adaptive weight of the GAN, the guard's level, every figure of validation."""
    options = ["--trainer.precision", "32-true"]  # bf16 would round the sums of the two otherwise than those of the one
    if stage == "autoencoder":
        options += ["--model.adversary.lecam.weight", "0.1"]
    status, said = run(tiny_runs.command(stage, tmp_path / "one", *options), tmp_path)
    assert status == 0, said
    two = tiny_runs.command(stage, tmp_path / "two", *options, "--data.batch_size", "2", *DDP)
    status, said = run(two, tmp_path, 2)
    assert status == 0, said
    assert_same(tmp_path / "two", tmp_path / "one", stage, 1e-5)
    if stage == "autoencoder":
        assert any(row.get("train/g_weight", 0) > 0 for row in figures(tmp_path / "two"))
    else:  # and FSDP; a checkpoint of it goes on, and one process exports it
        fsdp = ["--trainer.devices", "2", "--trainer.strategy", "fsdp", "--checkpoints.every_steps", "1", "--resume", "latest"]
        sharded = tiny_runs.command(stage, tmp_path / "sharded", *options, "--data.batch_size", "2", *fsdp)
        killer = ["--trainer.callbacks+=tests.slow.injected.SignalAt", "--trainer.callbacks.init_args.steps=[6]"]
        status, said = run([*sharded, *killer], tmp_path, 2)
        assert status != 0 and (tmp_path / "sharded" / "checkpoints" / "last.ckpt" / ".metadata").exists(), said
        status, said = run(sharded, tmp_path, 2)
        assert status == 0, said
        assert_same(tmp_path / "sharded", tmp_path / "two", stage, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_what_is_not_finite_on_one_process_is_skipped_on_both(tiny_runs: TinyRuns, tmp_path: Path, stage: str) -> None:
    """Two batches, the second process's alone; then more in a row than is borne."""
    poison = ["--trainer.callbacks+=tests.slow.injected.PoisonAt", "--trainer.callbacks.init_args.rank=1"]
    few = tiny_runs.command(stage, tmp_path / "few", *poison, "--trainer.callbacks.init_args.batches=[3, 4]", *DDP)
    status, said = run(few, tmp_path, 2)
    assert status == 0, said
    assert max(row.get("train/skipped", 0) for row in figures(tmp_path / "few")) == 2
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "few", stage).values())
    recorded = [json.loads(line) for line in (tmp_path / "few" / "1-skipped.jsonl").read_text().splitlines()]
    assert [record["step"] for record in recorded] == [3, 4] and all(len(record["samples"]) == 4 for record in recorded)

    many = tiny_runs.command(stage, tmp_path / "many", *poison, "--trainer.callbacks.init_args.batches=[2, 3, 4]")
    status, said = run([*many, "--model.max_skipped", "2", *DDP], tmp_path, 2)
    assert status == 1 and said.count("not finite 3 times in a row, at step 4") == 2, said  # each names its own samples
    assert said.count("(3 in a row)") == 1
