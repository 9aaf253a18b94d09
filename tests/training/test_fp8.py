"""Matrix products in fp8, on a CPU, which has them too; torchao is needed."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.models.dit import DiT
from ldm.training.fp8 import require_fp8, to_fp8


def initialised_dit() -> DiT:
    """Without the zeros that a network begins with."""
    torch.manual_seed(0)
    network = DiT(sample_size=8, width=64, num_layers=2, num_attention_heads=2, caption_channels=8)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network


def output_and_gradients(network: DiT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 8, generator=generator)  # 15 text tokens
    output = network(latents, text, torch.tensor([10.0, 500.0, 990.0])).sample
    output.square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    return output.detach(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def test_only_the_products_change() -> None:
    """By 1.3% of the output and 1.8% of the gradients; names, weights and their gradients' type stay."""
    pytest.importorskip("torchao")
    network = initialised_dit()
    expected, gradients = output_and_gradients(network)
    other = copy.deepcopy(network)
    other.zero_grad()
    parameters = [*other.parameters()]
    assert to_fp8(other.blocks) == 2 * 10
    assert list(other.state_dict()) == list(network.state_dict())
    assert all(mine is before for mine, before in zip(other.parameters(), parameters, strict=True))
    found, found_gradients = output_and_gradients(other)
    assert 0.005 < (found - expected).norm() / expected.norm() < 0.02
    assert 0.005 < (found_gradients - gradients).norm() / gradients.norm() < 0.03
    assert found_gradients.dtype == torch.float32


def test_a_block_stays_one_graph() -> None:
    pytest.importorskip("torchao")
    network = initialised_dit()
    to_fp8(network.blocks)
    expected, _ = output_and_gradients(network)
    for block in network.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    found, _ = output_and_gradients(network)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


def test_blocks_without_fitting_layers_are_refused() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(UsageError, match="a width that is a multiple of 16"):
        to_fp8(DiT(sample_size=4, width=24, num_layers=1, num_attention_heads=2, caption_channels=8, mlp_ratio=1).blocks)


def test_what_cannot_run_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, bf16 = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
    with pytest.raises(UsageError, match=r"compute capability 8.9 or more .*, and this is cpu"):
        require_fp8(cpu, bf16, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(UsageError, match=r"this is one of 8\.6"):
        require_fp8(gpu, bf16, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(UsageError, match="give precision bf16-mixed"):
        require_fp8(gpu, torch.float32, True)
    with pytest.raises(UsageError, match="give compile too"):
        require_fp8(gpu, bf16, False)
    require_fp8(gpu, bf16, True)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UsageError, match=r"pip install 'ldm\[fp8\]'"):
        to_fp8([])
