"""Adapters out of weights: what is cut off is the least there is, and what is kept gives the same network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.errors import UsageError
from ldm.models.adapter_file import AdapterFile, merge_into, write_adapter
from ldm.models.low_rank import LowRank, difference, resized
from ldm.training.adapters import Adapter, AdapterConfig

LAYERS = ["to_q", "blocks.*.feed_forward.0", "patch_embed"]


def outputs(network: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    inputs = [torch.randn(*shape, generator=random) for shape in ((2, 4, 8, 8), (2, 5, 16))]
    with torch.no_grad():
        return network(*inputs, torch.tensor([0.2, 0.7])).sample


def trained(network: Any, folder: Path, **config: Any) -> AdapterFile:
    """The file of a random adapter of ``network``, which keeps its own weights."""
    adapted = copy.deepcopy(network)
    layers = LAYERS if "init" not in config else LAYERS[:2]  # which is of linear layers alone
    adapter = Adapter(AdapterConfig(target_modules=layers, **config), adapted, "tiny")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    write_adapter(folder, *adapter.exported(), adapter.record({}))
    return AdapterFile.read(folder)


def written(found: LowRank, folder: Path) -> AdapterFile:
    write_adapter(folder, found.tensors, found.config, None)
    return AdapterFile.read(folder)


def merged(network: Any, *adapters: tuple[AdapterFile, float]) -> Any:
    network = copy.deepcopy(network)
    merge_into(network, adapters)
    return network


@pytest.mark.parametrize("config", [{"rank": 4, "alpha": 2.0}, {"rank": 2, "rank_stabilised": True, "init": "pissa"}])
def test_what_was_merged_can_be_extracted(config: dict[str, Any], tiny_dit: Any, tmp_path: Path) -> None:
    adapter = trained(tiny_dit, tmp_path / "own", **config)
    tuned = merged(tiny_dit, (adapter, 0.7))
    assert (outputs(tuned) - outputs(tiny_dit)).abs().max() > 0.01
    found = difference(tuned, tiny_dit, 4)
    assert found.rank == 4 and found.kept == pytest.approx(1) and not found.left_out
    again = merged(tiny_dit, (written(found, tmp_path / "again"), 1.0))
    torch.testing.assert_close(outputs(again), outputs(tuned), rtol=1e-5, atol=1e-5)


def test_what_an_adapter_cannot_hold_is_named(tiny_dit: Any) -> None:
    tuned = copy.deepcopy(tiny_dit)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1)
    found = difference(tuned, tiny_dit, 1)
    assert "proj_out.bias" in found.left_out and "proj_out.weight" not in found.left_out
    assert 0.9 < found.kept < 1  # a constant change has rank 1
    with pytest.raises(UsageError, match="the same weights in every layer"):
        difference(tiny_dit, tiny_dit, 1)
    other = type(tiny_dit)(**{**{k: v for k, v in tiny_dit.config.items() if not k.startswith("_")}, "num_layers": 1})
    with pytest.raises(UsageError, match=r"different architectures \(blocks\.1\..*none in the tuned one"):
        difference(other, tiny_dit, 1)


def test_a_lower_rank_is_the_best_of_that_rank(tiny_dit: Any, tmp_path: Path) -> None:
    adapter = trained(tiny_dit, tmp_path / "own", rank=4, alpha=2.0)
    smaller = resized(adapter, 2)
    a, b = (adapter.tensors[f"blocks.0.attention.to_q.lora_{which}.weight"] for which in "AB")
    u, sizes, v = torch.linalg.svd(0.5 * b @ a)
    a2, b2 = (smaller.tensors[f"blocks.0.attention.to_q.lora_{which}.weight"] for which in "AB")
    torch.testing.assert_close(b2 @ a2, (u[:, :2] * sizes[:2]) @ v[:2], rtol=1e-5, atol=1e-6)
    assert smaller.rank == 2 and 0.3 < smaller.kept < 1
    assert resized(trained(tiny_dit, tmp_path / "pissa", rank=2, init="pissa"), 3).rank == 3  # its file has twice the rank
    with pytest.raises(UsageError, match="has rank 4; give a rank below it"):
        resized(adapter, 4)
    dora = trained(tiny_dit, tmp_path / "dora", rank=4, method="dora")
    with pytest.raises(UsageError, match="only LoRA can be resized"):
        resized(dora, 2)
    with pytest.raises(UsageError, match="merge it alone"):
        merged(tiny_dit, (dora, 1.0), (adapter, 1.0))
