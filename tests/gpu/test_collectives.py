"""Collective operations of a plain training step on two processes: one vector, and what DDP or FSDP need themselves."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.tiny import ROOT, TinyRuns

# of a step without Muon, whose processes exchange what each has orthogonalised
BUDGETS = {
    # the vector, and DDP's gradients
    ("denoiser", "ddp"): {"allreduce_": 2},
    # those, and the discriminator's gradients, and the gradients that the adaptive weight compares
    ("autoencoder", "ddp"): {"allreduce_": 4},
    # the vector; the weights of both blocks and of the rest, in both passes; their gradients
    ("denoiser", "fsdp"): {"allreduce_": 1, "_allgather_base_": 6, "_reduce_scatter_base_": 3},
}


@pytest.mark.parametrize(("stage", "strategy"), BUDGETS)
def test_a_step_exchanges_one_vector(stage: str, strategy: str, tiny_runs: TinyRuns, tmp_path: Path) -> None:
    file = tmp_path / "collectives.json"
    settings = ["--trainer.log_every_n_steps", "50", "--trainer.precision", "32-true"]
    settings += ["--model.optimiser.muon_learning_rate", "null"]
    settings += ["--trainer.callbacks+=tests.gpu.collectives.CountCollectives", f"--trainer.callbacks.file={file}"]
    command = tiny_runs.torchrun(tiny_runs.command(stage, tmp_path / "run", *settings, steps=8))
    done = subprocess.run(
        [*command, "--trainer.strategy", strategy],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    steps = json.loads(file.read_text())
    plain = [steps[number] for number in (5, 6)]  # after the validation of step 4 and before the last
    assert plain == [BUDGETS[stage, strategy]] * 2
