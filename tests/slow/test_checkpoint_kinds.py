"""A run changes between DDP and FSDP, and its number of processes, as it resumes: the same state, and the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.runs.checkpoints.files import load_checkpoint
from ldm.runs.checkpoints.sharded import read_sharded
from ldm.runs.layout import RunFolder, checkpoint_name

from .conftest import TinyRuns
from .test_exact_resume import leaves
from .warm import DDP, run

WEIGHTS = {"autoencoder": "autoencoder", "denoiser": "pipeline/transformer"}
FSDP = ["--trainer.devices", "2", "--trainer.strategy", "fsdp"]
STATE = ("state_dict", "optimizer_states", "average", "lr_schedulers", "skipped", "seed", "global_step")


def state(path: Path) -> dict[str, Any]:
    """What is trained, of a checkpoint of either kind."""
    checkpoint = read_sharded(path) if path.is_dir() else load_checkpoint(path)
    return dict(leaves({name: checkpoint[name] for name in STATE}))


def assert_equal(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value) if isinstance(value, torch.Tensor) else mine[name] == value, name


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_ddp_then_fsdp_then_one_process(tiny_runs: TinyRuns, tmp_path: Path, stage: str) -> None:
    options = ["--trainer.precision", "32-true", "--checkpoints.every_steps", "1", "--checkpoints.keep_last", "9"]
    if stage == "denoiser":
        options += ["--model.power_averages.sigma_rel", "[0.1]"]

    def go(out: Path, how: list[str], steps: int, *more: str, status: int = 0) -> Path:
        """The checkpoint of the last step."""
        processes = 2 if how else 1
        batch = ["--data.batch_size", str(4 // processes)]
        command = tiny_runs.command(
            stage, out, *options, *batch, *how, "--resume", "latest", *more, steps=steps, validate_every=7
        )
        # what a run of so few steps exports is in the way of the next
        ended, said = run([*command, "--export", f"{tmp_path}/{out.name}-{steps}-{len(more)}"], tmp_path, processes)
        assert ended == status, said
        return RunFolder(out).checkpoints_folder / checkpoint_name(steps)

    out, save = tmp_path / "run", ["--trainer.callbacks+=tests.slow.injected.SaveAtStart"]
    before = state(go(out, DDP, 3))
    again = RunFolder(out).checkpoints_folder / checkpoint_name(3)
    go(out, FSDP, 5, *save, status=7)
    assert again.is_dir()
    assert_equal(state(again), before)
    sharded = go(out, FSDP, 5)
    assert sharded.is_dir()
    before, random = state(sharded), load_checkpoint(sharded)["random"]
    go(out, [], 7, *save, status=7)
    assert sharded.is_file()
    assert_equal(state(sharded), before)
    go(out, [], 7)

    whole = go(tmp_path / "whole", DDP, 7)
    at_five = load_checkpoint(whole.with_name(checkpoint_name(5)))["random"]
    assert_equal(dict(leaves(random)), dict(leaves(at_five)))
    name = f"{WEIGHTS[stage]}/diffusion_pytorch_model.safetensors".partition("/")[2]
    mine, theirs = (load_file(tmp_path / f"{run}-7-0" / name) for run in ("run", "whole"))
    for key, weight in theirs.items():
        torch.testing.assert_close(mine[key], weight, rtol=1e-4, atol=1e-4)
