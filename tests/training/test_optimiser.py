"""Muon, and what AdamW updates beside it."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.errors import UsageError
from ldm.models.dit import DiT, transformer_blocks
from ldm.runs.dry_run.memory import static_memory
from ldm.training.optimiser import Muon, MuonConfig, OptimiserConfig, orthogonalise


def tiny_dit(num_layers: int = 2) -> DiT:
    return DiT(sample_size=4, width=16, num_layers=num_layers, num_attention_heads=2, caption_channels=8)


def tiny_pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=16,
        sample_size=4, caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip


@pytest.mark.parametrize(("short", "long"), [(8, 8), (16, 64), (48, 192)])
def test_singular_values_are_brought_near_to_one(short: int, long: int) -> None:
    """And what they belong to stays: X = U S V' becomes about U V'."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(3, short, short))
    v, _ = torch.linalg.qr(torch.randn(3, long, short))
    sizes = torch.logspace(-1, 1, short)  # a hundredfold apart
    made = orthogonalise(u * sizes @ v.mT)
    assert made.shape == (3, short, long)
    in_their_basis = u.mT @ made @ v
    diagonal = in_their_basis.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.3 and diagonal.max() < 1.3
    assert (in_their_basis - torch.diag_embed(diagonal)).abs().max() < 1e-3


def test_scale_does_not_matter_and_sign_is_kept() -> None:
    matrices = torch.randn(2, 8, 24)
    made = orthogonalise(matrices)
    torch.testing.assert_close(orthogonalise(1e-6 * matrices), made, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(orthogonalise(-3.0 * matrices), -made, rtol=1e-3, atol=1e-4)
    assert not orthogonalise(torch.zeros(1, 4, 4)).any()


def test_matrices_are_updated_as_by_torchs_muon_and_the_rest_as_by_adamw() -> None:
    """A convolution's as the matrix that it is."""
    torch.manual_seed(0)
    hidden = [torch.randn(8, 8), torch.randn(24, 8), torch.randn(8, 24), torch.randn(4, 3, 2, 2)]
    rest = [torch.randn(8), torch.randn(4, 3, 2, 2)]
    mine = [nn.Parameter(tensor.clone()) for tensor in hidden], [nn.Parameter(tensor.clone()) for tensor in rest]
    theirs = [nn.Parameter(tensor.flatten(1).clone()) for tensor in hidden], [nn.Parameter(tensor.clone()) for tensor in rest]
    ours = Muon(mine[1], mine[0], 0.02, torch.bfloat16, lr=0.01, weight_decay=0.1)
    muon = torch.optim.Muon(theirs[0], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[1], lr=0.01, weight_decay=0.1)
    for _ in range(5):
        for parameter, other in zip(chain(*mine), chain(*theirs), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.view_as(other).clone()
        for optimiser in (ours, muon, adamw):
            optimiser.step()
    for parameter, other in zip(mine[0], theirs[0], strict=True):  # in bf16, products in another order
        torch.testing.assert_close(parameter, other.view_as(parameter), rtol=0, atol=2e-3)
    for parameter, other in zip(mine[1], theirs[1], strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("make", [tiny_dit, tiny_pixart])
def test_muon_has_the_blocks_matrices_and_adamw_all_else(make: Callable[[], nn.Module]) -> None:
    network = make()
    config = MuonConfig(1e-3, muon_learning_rate=4e-3, warmup_steps=2)
    optimiser, schedule = config.build(network, 10, transformer_blocks(network))
    adamws, muons = (group["params"] for group in optimiser.param_groups)
    assert {id(parameter) for parameter in adamws + muons} == {id(parameter) for parameter in network.parameters()}
    assert len(adamws) + len(muons) == len(list(network.parameters()))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    blocks = "blocks.", "transformer_blocks."
    assert all(parameter.ndim == 2 and names[id(parameter)].startswith(blocks) for parameter in muons)
    left = [names[id(parameter)] for parameter in adamws if parameter.ndim == 2 and names[id(parameter)].startswith(blocks)]
    assert all("table" in name for name in left) and len(muons) == 2 * 10
    assert [group["lr"] for group in optimiser.param_groups] == [0, 0]
    optimiser.step()
    schedule.step()
    assert [group["lr"] for group in optimiser.param_groups] == [0.5e-3, 2e-3]


def test_parameters_without_a_gradient_do_not_change() -> None:
    network = tiny_dit()
    config = MuonConfig(1e-3, weight_decay=0.1, muon_learning_rate=4e-3)
    optimiser, _ = config.build(network, 10, transformer_blocks(network))
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    optimiser.step()
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    assert not optimiser.state


def test_a_saved_state_resumes_exactly() -> None:
    torch.manual_seed(0)
    gradients = [[torch.randn_like(parameter) for parameter in tiny_dit().parameters()] for _ in range(4)]

    def run(network: DiT, optimiser: Optimizer, some: list[list[torch.Tensor]]) -> None:
        for step in some:
            for parameter, gradient in zip(network.parameters(), step, strict=True):
                parameter.grad = gradient.clone()
            optimiser.step()

    network = tiny_dit()
    config = MuonConfig(1e-3, muon_learning_rate=4e-3)
    optimiser = config.build(network, 10, transformer_blocks(network))[0]
    run(network, optimiser, gradients[:2])
    other = tiny_dit()
    other.load_state_dict(network.state_dict())
    resumed = config.build(other, 10, transformer_blocks(other))[0]
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    run(network, optimiser, gradients[2:])
    run(other, resumed, gradients[2:])
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_a_network_without_blocks_is_refused_with_the_fix() -> None:
    with pytest.raises(UsageError, match=r"Linear does not name the class of its blocks.*DDP and AdamW"):
        transformer_blocks(nn.Linear(2, 2))


def test_a_rate_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match=r"muon_learning_rate is -0.1; give 0 or more"):
        MuonConfig(muon_learning_rate=-0.1).build(nn.Linear(2, 2), 10)


class Operations(TorchDispatchMode):
    """Counts operations by name, except for those that start nothing on a device."""

    FREE = frozenset({"alias", "detach", "expand", "select", "slice", "split", "transpose", "unbind", "unsqueeze", "view"})

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if "record_function" not in name and name.removeprefix("_unsafe_") not in self.FREE:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def random_gradients(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)


def set_found_inf(optimiser: Optimizer, value: float) -> None:
    """As torch's GradScaler does it."""
    optimiser.found_inf = torch.tensor(value)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("num_layers", [2, 28])
def test_the_number_of_operations_does_not_grow_with_the_number_of_blocks(num_layers: int) -> None:
    """Three shapes of matrices; none of the operations makes the host wait for a device."""
    network = tiny_dit(num_layers)
    optimiser, _ = MuonConfig(1e-3, weight_decay=0.1, muon_learning_rate=4e-3).build(network, 10, transformer_blocks(network))
    random_gradients(network)
    optimiser.step()  # makes its state
    set_found_inf(optimiser, 0.0)
    with Operations() as operations:
        optimiser.step()
    assert operations.counts.total() <= 107
    assert not {"_local_scalar_dense", "nonzero", "equal"} & operations.counts.keys()


@pytest.mark.parametrize("muon", [None, 4e-3])
@pytest.mark.parametrize("first", [True, False])
def test_a_void_step_changes_nothing(muon: float | None, first: bool) -> None:
    """The one that ``found_inf`` marks: neither weights nor moments nor counts, even if no gradient is finite."""
    torch.manual_seed(0)
    network = tiny_dit()
    optimiser, _ = MuonConfig(1e-3, weight_decay=0.1, muon_learning_rate=muon).build(network, 10, transformer_blocks(network))
    if not first:
        random_gradients(network)
        optimiser.step()
    weights, state = copy.deepcopy(network.state_dict()), copy.deepcopy(optimiser.state_dict()["state"])
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    set_found_inf(optimiser, 1.0)
    optimiser.step()
    assert all(torch.equal(weight, weights[name]) for name, weight in network.state_dict().items())
    for number, values in optimiser.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, torch.zeros_like(value) if first else state[number][name])


def test_a_step_that_is_not_void_is_that_without_the_mark() -> None:
    made = []
    for marked in (False, True):
        torch.manual_seed(0)
        network = tiny_dit()
        config = MuonConfig(1e-3, weight_decay=0.1, muon_learning_rate=4e-3)
        optimiser, _ = config.build(network, 10, transformer_blocks(network))
        for _ in range(3):
            random_gradients(network)
            if marked:
                set_found_inf(optimiser, 0.0)
            optimiser.step()
        made.append([*network.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*made, strict=True))


def test_matrices_beyond_the_limit_of_memory_are_updated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[Tensor]] = []
    for limit in (2**26, 3 * 16 * 16, 1):  # all, three and one at once
        monkeypatch.setattr("ldm.training.optimiser.MAX_NUMBERS", limit)
        torch.manual_seed(0)
        network = tiny_dit()
        optimiser, _ = MuonConfig(1e-3, muon_learning_rate=4e-3).build(network, 10, transformer_blocks(network))
        for _ in range(2):
            random_gradients(network)
            optimiser.step()
        made.append([parameter.detach() for parameter in network.parameters()])
    for others in made[1:]:
        for parameter, other in zip(made[0], others, strict=True):
            torch.testing.assert_close(parameter, other, rtol=0, atol=1e-7)


def wide_dit() -> DiT:
    """Some of its weights have more than 4,096 numbers."""
    torch.manual_seed(0)
    return DiT(sample_size=4, width=64, num_layers=2, num_attention_heads=2, caption_channels=8)


def trained(network: DiT, optimiser: Optimizer, steps: range) -> None:
    """Steps on gradients with a direction of their own and noise."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in network.parameters():
            parameter.grad = 0.1 + torch.randn(parameter.shape, generator=generator)
        optimiser.step()


def test_moments_in_eight_bits_train_like_those_of_32_in_a_quarter_of_the_memory() -> None:
    pytest.importorskip("bitsandbytes")
    networks, optimisers = [], []
    for eight_bit in (False, True):
        network = wide_dit()
        optimiser, _ = OptimiserConfig(1e-3, weight_decay=0.1, eight_bit=eight_bit).build(network, 100)
        trained(network, optimiser, range(20))
        networks.append(nn.utils.parameters_to_vector(network.parameters()))
        optimisers.append(optimiser)
    start = nn.utils.parameters_to_vector(wide_dit().parameters())
    assert (networks[1] - networks[0]).norm() < 0.03 * (networks[0] - start).norm()
    shared = "qmap1", "qmap2"  # one table for all weights
    held = sum(
        value.nbytes
        for state in optimisers[1].state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name not in shared
    )
    sizes = [parameter.numel() for parameter in wide_dit().parameters()]
    expected = static_memory(sum(sizes), eight_bit=sum(size for size in sizes if size >= 4096)).optimiser
    assert held == expected < 0.35 * static_memory(sum(sizes)).optimiser


def test_moments_in_eight_bits_resume_exactly_from_plain_tensors(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config, whole = OptimiserConfig(1e-3, eight_bit=True), wide_dit()
    optimiser = config.build(whole, 100)[0]
    trained(whole, optimiser, range(3))
    torch.save({"weights": whole.state_dict(), "optimiser": optimiser.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = wide_dit()
    resumed.load_state_dict(saved["weights"])
    second = config.build(resumed, 100)[0]
    second.load_state_dict(saved["optimiser"])
    trained(whole, optimiser, range(3, 6))
    trained(resumed, second, range(3, 6))
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_eight_bits_are_refused_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="Muon's weights do not have"):
        MuonConfig(muon_learning_rate=1e-3, eight_bit=True).build(nn.Linear(2, 2), 10)
    config = OptimiserConfig(eight_bit=True)
    with pytest.raises(UsageError, match="would undo the memory order channels_last"):
        config.build(nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last), 10)  # pyright: ignore[reportCallIssue]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    with pytest.raises(UsageError, match=r"eight_bit needs bitsandbytes .*pip install 'ldm\[eight-bit\]'"):
        config.build(nn.Linear(2, 2), 10)


def test_eight_bits_are_refused_where_bitsandbytes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It learns only in its first step that its library lacks a device, or this version of CUDA."""

    def fail(*_: object) -> None:
        raise RuntimeError("no kernel for this device\nand a long explanation")

    monkeypatch.setattr(pytest.importorskip("bitsandbytes").optim.AdamW8bit, "step", fail)
    with pytest.raises(UsageError, match=r"bitsandbytes cannot run on cpu \(no kernel for this device\); set it to false"):
        OptimiserConfig(eight_bit=True).build(nn.Linear(2, 2), 10)
