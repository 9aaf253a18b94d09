"""FSDP in bf16 computes what DDP in bf16 does: on one process, whose shards are whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ldm.models.autoencoder import AutoencoderConfig, decode, encode
from ldm.models.dit import DiT, transformer_blocks
from ldm.training.fsdp import full_tensor, shard

TIMES = torch.tensor([3.217, 101.3, 499.1, 997.3])  # bf16 has 3, 101.5, 500 and 996
DENOISERS: dict[str, dict[str, Any]] = {
    "single": {},
    "zero": {"adaln": "zero", "norm": "rms_norm", "activation": "swiglu", "positions": "rope"},
    "plain": {"qk_norm": False, "pooled_text": False},
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def denoiser(randomised: Any, variant: str) -> DiT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"sample_size": 8, "width": 32, "num_layers": 3, "num_attention_heads": 2, "caption_channels": 16}
    return randomised(DiT(**sizes | DENOISERS[variant]))


def predict(network: nn.Module, bf16: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 4, 8, 8, generator=generator)
    given = {
        "encoder_hidden_states": torch.randn(4, 5, 16, generator=generator),
        "encoder_attention_mask": torch.ones(4, 5, dtype=torch.int64),
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return network(x, timestep=TIMES, **given).sample


def reconstruct(network: Any, bf16: bool = True) -> Tensor:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return decode(network, encode(network, x).mode())


def gradients(network: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Of a random projection of the output: full and in fp32."""
    (output.float() * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).mean().backward()
    return {name: full_tensor(each.grad).float() for name, each in network.named_parameters() if each.grad is not None}


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all gradients together, relative to them."""
    return float(sum((found[name] - exact[name]).square().sum() for name in exact) ** 0.5) / float(
        sum(each.square().sum() for each in exact.values()) ** 0.5
    )


@pytest.mark.parametrize("variant", DENOISERS)
def test_times_arrive_unrounded_and_the_residual_stream_is_fp32(randomised: Any, mesh: DeviceMesh, variant: str) -> None:
    network = denoiser(randomised, variant)
    seen: dict[Any, Any] = {}

    def note(number: int) -> Any:
        return lambda _, given, out: seen.update({number: (given[0].dtype, given[1].dtype, out.dtype)})

    network.time_features.register_forward_pre_hook(lambda _, given: seen.update(times=given[0].clone()))
    for number, block in enumerate(network.blocks):
        block.register_forward_hook(note(number))
    network.proj_out.register_forward_pre_hook(lambda _, given: seen.update(last=given[0].dtype))
    predict(network)
    plain = dict(seen)
    shard(network, transformer_blocks(network), mesh, torch.bfloat16)
    predict(network)
    assert torch.equal(seen.pop("times"), TIMES) and torch.equal(plain.pop("times"), TIMES)
    assert seen == plain == {number: (torch.float32,) * 3 for number in range(3)} | {"last": torch.float32}


def pixart() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4}
    return PixArtTransformer2DModel(**sizes, num_layers=2, cross_attention_dim=16, caption_channels=16, sample_size=8)


def autoencoder() -> tuple[AutoencoderKL, list[nn.Module], list[nn.Module]]:
    """With its levels and all parts that are gathered, as stage one names them."""
    torch.manual_seed(0)
    config = AutoencoderConfig(block_out_channels=[8, 16], norm_num_groups=4, layers_per_block=1, sample_size=16)
    network = config.build()
    encoder, decoder = network.encoder, network.decoder
    levels = [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]
    between = [layer for layer in (network.quant_conv, network.post_quant_conv) if layer is not None]
    return network, levels, [*levels, encoder, decoder, *between]


@pytest.mark.parametrize("name", [*DENOISERS, "pixart", "autoencoder"])
def test_a_step_in_bf16_has_the_gradients_of_one_without_fsdp(randomised: Any, mesh: DeviceMesh, name: str) -> None:
    compute: Any = predict
    if name == "autoencoder":
        network, _, parts = autoencoder()
        compute = reconstruct
    else:
        network = pixart() if name == "pixart" else denoiser(randomised, name)
        parts = transformer_blocks(network)
    whole, exact = copy.deepcopy(network), copy.deepcopy(network)
    expected = gradients(exact, compute(exact, bf16=False))
    without = gradients(whole, compute(whole))
    shard(network, parts, mesh, torch.bfloat16)
    found = gradients(network, compute(network))
    assert found.keys() == without.keys() == expected.keys()
    assert error(found, expected) < 2 * error(without, expected) < 0.05
    assert error(found, without) < 2 * error(without, expected)


@pytest.mark.parametrize("stage, graphs", [("denoiser", 1), ("autoencoder", 6)])
def test_compiled_blocks_under_fsdp_are_whole(randomised: Any, mesh: DeviceMesh, stage: str, graphs: int) -> None:
    """One graph for the denoiser's blocks, which are alike, and one for each level. Gathering the weights is outside of it, and
    in the backward pass too they are gathered before they are used."""
    compute: Any = predict
    if stage == "autoencoder":
        network, compiled, parts = autoencoder()
        compute = reconstruct
    else:
        network = denoiser(randomised, "single")
        compiled = parts = transformer_blocks(network)
    without = gradients(network, compute(network))
    network.zero_grad()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in compiled:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    shard(network, parts, mesh, torch.bfloat16)
    assert error(gradients(network, compute(network)), without) < 0.05
    assert counter.frame_count == graphs
