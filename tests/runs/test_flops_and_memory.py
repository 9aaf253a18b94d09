"""FLOPs against closed forms and a published value; static memory against what a step holds."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ldm.models.dit import DiT
from ldm.models.layers import Attention
from ldm.runs.dry_run.flops import StepFlops, peak_flops
from ldm.runs.dry_run.memory import network_parameters, static_memory
from ldm.runs.dry_run.peaks import PEAKS
from ldm.training.optimiser import MuonConfig


def test_a_linear_layer() -> None:
    x = torch.randn(5, 32, requires_grad=True)
    with StepFlops() as flops:
        nn.Linear(32, 64)(x).sum().backward()
    assert flops.forward == 2 * 5 * 32 * 64
    assert flops.backward == 2 * flops.forward  # by the input and by the weight
    assert flops.total == 3 * flops.forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # a fused kernel, which recomputes, and plain products
def test_attention_whatever_computes_it(dtype: torch.dtype) -> None:
    batch, tokens, width = 2, 16, 64
    x = torch.randn(batch, tokens, width, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), StepFlops() as flops:
        Attention(width, 4)(x).sum().backward()
    assert flops.forward == 2 * batch * (4 * tokens * width**2 + 2 * tokens**2 * width)
    assert flops.backward == 2 * flops.forward


def test_dit_xl_2_is_as_published() -> None:
    """118.64 Gflops a forward at 256 px, multiply-adds counted once (Peebles & Xie 2022, table 4)."""
    with torch.device("meta"):
        network = DiTTransformer2DModel()  # diffusers' defaults are its sizes
        image, number = torch.randn(1, 4, 32, 32), torch.zeros(1, dtype=torch.long)
        with StepFlops() as flops:
            network(image, number, number).sample.sum().backward()
    assert flops.forward == pytest.approx(2 * 118.64e9, rel=0.001)
    assert flops.backward == pytest.approx(2 * flops.forward, rel=0.001)


def test_ours_of_the_same_sizes_differs_by_its_attention_to_the_text() -> None:
    layers, width, tokens, words = 28, 1152, 256, 20
    with torch.device("meta"):
        network = DiT(4, 32, 2, width, layers, 16, caption_channels=768, pooled_text=False, adaln="zero")
        with StepFlops() as flops:
            network(torch.randn(1, 4, 32, 32), torch.randn(1, words, 768), torch.rand(1))
    queries_and_out, keys_and_values, attended = 2 * tokens * width**2, 2 * words * width**2, 2 * tokens * words * width
    text = 2 * layers * (queries_and_out + keys_and_values + attended) + 2 * words * (768 + width) * width
    assert flops.forward - text == pytest.approx(2 * 118.64e9, rel=0.001)


def test_what_checkpointing_recomputes_does_not_count() -> None:
    counted = []
    for checkpointing in (False, True):
        network = DiT(sample_size=8, width=64, num_layers=3, num_attention_heads=2, caption_channels=16)
        if checkpointing:
            network.enable_gradient_checkpointing()
        with StepFlops() as flops:
            network(torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.rand(2)).sample.sum().backward()
        counted.append((flops.forward, flops.backward))
    assert counted[0] == counted[1]


def test_a_gradient_penalty_counts() -> None:
    """A backward pass through a backward pass calls no module, so it is not taken for checkpointing."""
    layer, x = nn.Linear(8, 16, bias=False), torch.randn(4, 8, requires_grad=True)
    with StepFlops() as flops:
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    product = 2 * 4 * 8 * 16
    # d x; then through it: by its gradient and by W; and of that gradient on through the layer: by W and by x
    assert (flops.forward, flops.backward) == (product, 5 * product)


class Block(nn.Module):
    """torch 2.10 compiles no module of torch.nn itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_a_compiled_block_is_counted_and_compiles_afterwards() -> None:
    block, x = Block(), torch.randn(2, 8)
    calls = []

    def backend(graph: torch.fx.GraphModule, example: object) -> torch.fx.GraphModule:
        calls.append(graph)
        return graph

    block.compile(backend=backend)
    with StepFlops() as flops:
        expected = block(x)
    assert flops.forward == 2 * 2 * 8 * 8 and not calls
    assert torch.equal(block(x), expected) and calls


def test_counting_changes_nothing() -> None:
    network, x = nn.Linear(8, 8), torch.randn(2, 8)
    network(x).square().sum().backward()
    expected, network.weight.grad = network.weight.grad, None
    with StepFlops():
        network(x).square().sum().backward()
    assert network.weight.grad is not None and expected is not None and torch.equal(network.weight.grad, expected)


def test_parameters_by_part() -> None:
    whole = nn.ModuleDict({"small": nn.Linear(2, 3), "large": nn.Linear(10, 10), "none": nn.ReLU()})
    whole["small"].bias.requires_grad_(False)
    counted = network_parameters(whole)
    assert list(counted) == ["large", "small"]
    assert counted["small"] == (6, 3)


@pytest.mark.parametrize("muon", [None, 1e-3])
def test_static_memory_is_what_a_step_leaves_behind(muon: float | None) -> None:
    network = DiT(sample_size=4, width=16, num_layers=2, num_attention_heads=2, caption_channels=8)
    optimiser, _ = MuonConfig(muon_learning_rate=muon).build(network, 10, network.blocks)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimiser.step()
    parameters = list(network.parameters())
    moments = [tensor for state in optimiser.state.values() for tensor in state.values() if tensor.numel() > 1]
    number = sum(parameter.numel() for parameter in parameters)
    matrices = sum(matrix.numel() for group in optimiser.param_groups if group.get("muon") for matrix in group["params"])
    memory = static_memory(number, averaged=number, averages=2, matrices=matrices)
    assert memory.weights == sum(parameter.nbytes for parameter in parameters)
    assert memory.gradients == sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    assert memory.optimiser == sum(moment.nbytes for moment in moments)
    assert memory.averages == 2 * memory.weights
    assert static_memory(number, averaged=number, averages=2, shards=4, matrices=matrices).total == memory.total / 4


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), "bf16-mixed") is None


@pytest.mark.parametrize(
    "name, bf16, fp32",
    [
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 3090", 71.2, 35.6),
        ("NVIDIA GeForce RTX 5090", 209.6, 104.8),
        ("NVIDIA RTX A6000", 154.8, 38.7),
        ("NVIDIA RTX 6000 Ada Generation", 364.4, 91.1),
        ("NVIDIA A40", 149.7, 37.4),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.5, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA H200", 989.5, 67),
        ("NVIDIA H200 NVL", 835.5, 60),
        ("NVIDIA GH200 480GB", 989.5, 67),
        ("NVIDIA B200", 2250, 75),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),  # slower chips under the same name
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(
    monkeypatch: pytest.MonkeyPatch, name: str, bf16: float | None, fp32: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    for precision, expected in (("bf16-mixed", bf16), ("32-true", fp32)):
        assert peak_flops(torch.device("cuda"), precision) == (expected and pytest.approx(expected * 1e12))


def test_tf32_is_the_peak_of_fp32_products_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A40")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(torch.device("cuda"), "32-true") == pytest.approx(74.8e12)
    for name, peaks in PEAKS.items():
        assert peaks.fp32 <= peaks.tf32 <= (peaks.bf16 or peaks.tf32), name
