"""Muon on two processes updates weights as on one, with few exchanges, whether the weights are sharded or not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from .warm import run


@pytest.mark.slow
def test_two_processes_share_the_work_and_get_the_weights_of_one(tmp_path: Path) -> None:
    script, results = Path(__file__).with_name("muon_ranks.py"), tmp_path / "results.pt"
    status, said = run([sys.executable, str(script), str(results)], tmp_path, processes=2)
    assert status == 0, said
    made = torch.load(results, weights_only=False)
    weights, _ = made["one process"]
    for several in ("several", "sharded"):
        assert all(torch.equal(*pair) for pair in zip(made[several][0], weights, strict=True)), several
    # of three shapes; sharded, the momentum is sent there and its direction back
    assert made["several"][1] == {"all_gather_into_tensor": 3}
    assert made["sharded"][1] == {"all_to_all_single": 6}
