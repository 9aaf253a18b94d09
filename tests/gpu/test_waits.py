"""Both stages on a pretended GPU: nothing fails there, and how often a plain training step makes the host wait for it.

A plain step is one without a validation, a checkpoint or logging.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.launch import needs_pretended_gpu, on_pretended_gpu
from tests.tiny import TinyRuns

pytestmark = needs_pretended_gpu

# most waits of a plain step
BUDGET = {"denoiser": 0, "variance preserving": 0, "online": 0, "autoencoder": 0, "all losses": 0}

VARIANCE_PRESERVING = [
    "--model.path",
    "ldm.diffusion.path.VariancePreserving",
    "--model.prediction",
    "ldm.diffusion.prediction.V",
]
ALL_LOSSES = [
    *("--model.equivariance.probability", "1", "--model.adversary.lecam.weight", "0.1", "--model.learn_variance", "true"),
    *("--model.adversary.gradient_penalty.gamma", "1", "--model.adversary.gradient_penalty.every", "2"),
    *("--model.accumulate", "2", "--model.channels_last", "true", "--model.gradient_checkpointing", "true"),
    *("--model.fid_trunk", "alex-random"),
]


def waits_of_runs(counts: Any, folder: str, stage: str, out: str, runs: dict[str, list[str]]) -> dict[str, list[Any]]:
    """The waits of each plain step of runs with these options, one after the other."""
    from ldm.cli import main
    from tests.gpu.counting import between

    found = {}
    for name, options in runs.items():
        on_gpu = ["--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed", "--trainer.log_every_n_steps", "50"]
        command = TinyRuns(Path(folder)).command(stage, f"{out}/{name}", *on_gpu, *options, steps=8, validate_every=4)
        main([*command[3:], "--trainer.callbacks+=tests.gpu.counting.CountSteps"])
        found[name] = [between(step - 1, step).waits for step in (4, 6, 7, 8)]
    return found


def require(budgets: dict[str, int], found: dict[str, list[dict[str, int]]]) -> None:
    """Fail, naming the lines, for a step that waits more often than its run may."""
    over = {name: steps for name, steps in found.items() if max(sum(waits.values()) for waits in steps) > budgets[name]}
    assert over == {}


def test_stage_two(tiny_runs: TinyRuns, tiny_text_encoder: str, tmp_path: Path) -> None:
    shards = f"{tiny_runs.folder}/shards"
    online = ["--data.train", shards, "--data.validation", shards, "--model.text_encoder", tiny_text_encoder]
    runs = {"denoiser": [], "variance preserving": VARIANCE_PRESERVING, "online": [*online, "--model.online", "true"]}
    require(BUDGET, on_pretended_gpu(waits_of_runs, str(tiny_runs.folder), "denoiser", str(tmp_path), runs))


def test_stage_one(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    runs = {"autoencoder": [], "all losses": ALL_LOSSES}
    require(BUDGET, on_pretended_gpu(waits_of_runs, str(tiny_runs.folder), "autoencoder", str(tmp_path), runs))


def test_a_budget_is_exceeded_by_one() -> None:
    require({"run": 2}, {"run": [{"a": 1, "b": 1}]})
    with pytest.raises(AssertionError):
        require({"run": 2}, {"run": [{"a": 1}, {"a": 2, "b": 1}]})
