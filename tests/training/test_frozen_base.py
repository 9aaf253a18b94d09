"""The base of an adapter in bfloat16 and 8-bit integers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from ldm.errors import UsageError
from ldm.training.adapters import Adapter, AdapterConfig
from ldm.training.frozen_base import frozen_layers, store, stored_bytes


@pytest.mark.parametrize(("precision", "least", "bound"), [("bf16", 1.9, 0.01), ("int8", 3.0, 0.03)])
def test_weights_take_less_and_compute_nearly_the_same(precision: Any, least: float, bound: float, tiny_dit: Any) -> None:
    """What is trained, and everything outside the blocks, keeps its type."""
    if precision == "int8":
        pytest.importorskip("torchao")
    adapter = Adapter(AdapterConfig(rank=2, base_precision=precision), tiny_dit, "tiny")
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.rand(2)
    before = tiny_dit(*inputs).sample
    layers = [*frozen_layers(tiny_dit.blocks)]
    fp32 = sum(stored_bytes(layer.weight) for layer in layers)
    assert fp32 == sum(4 * layer.weight.numel() for layer in layers)
    adapter.store_base()
    after = tiny_dit(*inputs).sample
    assert fp32 / sum(stored_bytes(layer.weight) for layer in layers) > least
    assert 0 < (after - before).norm() / before.norm() < bound and after.dtype == torch.float32
    others = [weight for name, weight in tiny_dit.named_parameters() if not name.endswith("weight") or "blocks" not in name]
    assert all(weight.dtype == torch.float32 for weight in others)
    trained = [weight for weight in tiny_dit.parameters() if weight.requires_grad]
    after.square().mean().backward()
    assert all(weight.grad is not None and weight.dtype == torch.float32 for weight in trained)
    assert all(layer.weight.grad is None for layer in layers)
    with torch.autocast("cpu", torch.bfloat16):
        assert (tiny_dit(*inputs).sample - before).norm() / before.norm() < bound + 0.02


def test_int8_without_torchao_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UsageError, match=r"pip install 'ldm\[int8\]'"):
        store([nn.Sequential(nn.Linear(16, 16))], "int8")
