"""Two processes under DDP train as one process does, and skip the same steps. FSDP: test_checkpoint_kinds.py."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.runs.layout import checkpoints_in, step_of
from tests.tiny import TinyRuns

from .warm import DDP, run

ARTIFACT = {"autoencoder": "autoencoder", "denoiser": "pipeline", "matcher": "matcher"}
NETWORK = {"autoencoder": "", "denoiser": "transformer", "matcher": "matcher"}


def weights(export: Path, stage: str) -> dict[str, torch.Tensor]:
    """The trained weights of an exported model."""
    return load_file(export / NETWORK[stage] / "diffusion_pytorch_model.safetensors")


def metrics(out: Path) -> list[dict[str, float]]:
    """The logged metrics, except for times."""
    with open(out / "logs" / "metrics.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return [{name: float(row[name]) for name in row if row[name] and not name.startswith("time/")} for row in found]


def assert_close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=tolerance, atol=tolerance)


def assert_same_metrics(out: Path, other: Path, tolerance: float, evaluation: float = 0.0) -> None:
    """``evaluation``: the tolerance of metrics of generated images, whose pixels are rounded."""
    for row, expected in zip(metrics(out), metrics(other), strict=True):
        for name, value in expected.items():
            allowed = evaluation if name.endswith("_alex_random") else tolerance
            assert row[name] == pytest.approx(value, rel=allowed, abs=allowed), name
        assert row.keys() == expected.keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser", "matcher"])
def test_two_processes_with_half_the_batch_are_one_with_the_whole(tiny_runs: TinyRuns, tmp_path: Path, stage: str) -> None:
    """Weights, losses, the adaptive weight, the guard's level, every metric of validation."""
    options = ["--trainer.precision", "32-true"]  # in bf16, sums on two processes would be rounded differently
    if stage == "autoencoder":
        options += ["--model.adversary.lecam.weight", "0.1"]
    elif stage == "denoiser":
        options += tiny_runs.evaluation()
    status, said = run(tiny_runs.command(stage, tmp_path / "one", *options), tmp_path)
    assert status == 0, said
    two = tiny_runs.command(stage, tmp_path / "two", *options, "--data.batch_size", "2", *DDP)
    status, said = run(two, tmp_path, 2)  # a command that starts its processes itself: test_preemption.py
    assert status == 0, said
    two_model, one_model = (tmp_path / name / ARTIFACT[stage] for name in ("two", "one"))
    assert_close(weights(two_model, stage), weights(one_model, stage), 1e-5)
    assert_same_metrics(tmp_path / "two", tmp_path / "one", 1e-5, evaluation=1e-3)
    if stage == "autoencoder":
        assert any(row.get("train/g_weight", 0) > 0 for row in metrics(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_what_is_not_finite_on_one_process_is_skipped_on_both(tiny_runs: TinyRuns, tmp_path: Path, stage: str) -> None:
    """Two batches of the second process only; then more in a row than are allowed."""
    poison = ["--trainer.callbacks+=tests.slow.injected.PoisonAt", "--trainer.callbacks.init_args.rank=1"]
    few = tiny_runs.command(stage, tmp_path / "few", *poison, "--trainer.callbacks.init_args.batches=[3, 4]", *DDP)
    status, said = run(few, tmp_path, 2)
    assert status == 0, said
    assert max(row.get("train/skipped", 0) for row in metrics(tmp_path / "few")) == 2
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "few" / ARTIFACT[stage], stage).values())
    recorded = [json.loads(line) for line in (tmp_path / "few" / "1-skipped.jsonl").read_text().splitlines()]
    assert [record["step"] for record in recorded] == [3, 4] and all(len(record["samples"]) == 4 for record in recorded)

    many = tiny_runs.command(stage, tmp_path / "many", *poison, "--trainer.callbacks.init_args.batches=[2, 3, 4]")
    status, said = run([*many, "--model.max_skipped", "2", *DDP], tmp_path, 2)
    assert status == 1 and said.count("not finite 3 times in a row, at step 4") == 2, said  # each names its own samples
    assert said.count("(3 in a row)") == 1


@pytest.mark.slow
def test_processes_agree_on_timed_checkpoints_and_on_the_end_of_the_time(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    """The vector of a step carries them, and is read in the next one.

    A checkpoint is due at once: asked for at the end of step 1, sent in step 2, read in step 3. After that it is due again.
    """
    options = ["--trainer.log_every_n_steps", "50", "--trainer.val_check_interval", "100"]
    timed = tiny_runs.command("denoiser", tmp_path / "timed", *options, "--checkpoints.every_minutes", "1e-6", *DDP)
    status, said = run(timed, tmp_path, 2)
    assert status == 0, said
    assert [step_of(path) for path in checkpoints_in(tmp_path / "timed" / "checkpoints")] == [3, 6, 8]

    limited = tiny_runs.command("denoiser", tmp_path / "limited", *options, "--trainer.max_time", "00:00:00:02", *DDP)
    status, said = run(
        [*limited, "--trainer.max_steps", "-1", "--model.optimiser.schedule", "constant_with_warmup"], tmp_path, 2
    )
    assert status == 0 and (tmp_path / "limited" / "pipeline").is_dir(), said
    (stopped,) = checkpoints_in(tmp_path / "limited" / "checkpoints")
    assert step_of(stopped) >= 2
