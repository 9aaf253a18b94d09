"""Every class of autoencoders: its own encoding and decoding, its factor, its statistics, and configs that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Pipeline
from torch import Tensor

from ldm.errors import LdmError, UsageError
from ldm.models.autoencoder import (
    AutoencoderConfig,
    LatentNormalizer,
    autoencoder_hash,
    decode_latents,
    downsampling_factor,
    enable_tiling,
    encode,
    encode_latents,
    has_posterior,
    in_float32,
    load_autoencoder,
    set_latent_statistics,
)
from tests.samples import AUTOENCODERS

FACTORS = {"flux2": 2, "dc": 4, "tiny": 2, "pixels": 1}


def images(batch: int = 2, size: int = 16) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(params=AUTOENCODERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_latents_are_those_that_diffusers_gives_and_come_back_from_a_directory(kind: str, tmp_path: Path) -> None:
    network = AUTOENCODERS[kind]()
    found = network.encode(images())
    z = found.latent_dist.mode() if kind == "flux2" else found.latents if kind == "tiny" else found.latent
    posterior = encode(network, images())
    assert torch.equal(posterior.mode(), z) and downsampling_factor(network) == FACTORS[kind] == 16 // z.shape[-1]
    assert has_posterior(network) == bool(posterior.std.any()) == bool(in_float32(posterior).std.any()) == (kind == "flux2")
    mean, std = [0.1 * n for n in range(z.shape[1])], [1 + 0.1 * n for n in range(z.shape[1])]
    set_latent_statistics(network, mean, std)
    network.save_pretrained(tmp_path)
    again = load_autoencoder(tmp_path)
    assert again.config["latents_mean"] == mean and again.config["latents_std"] == std
    assert autoencoder_hash(again) == autoencoder_hash(network) != autoencoder_hash(network, torch.float16)
    normalised = encode_latents(again, images())
    assert torch.equal(normalised, LatentNormalizer(mean, std).normalize(z))
    torch.testing.assert_close(decode_latents(again, normalised), network.decode(z).sample.clamp(-1, 1), atol=1e-5, rtol=0)


def test_pixels_are_their_own_latents() -> None:
    network = load_autoencoder("identity")
    assert torch.equal(encode_latents(network, images()), images()) and torch.equal(decode_latents(network, images()), images())
    assert next(network.half().parameters(), None) is None and network.dtype == torch.float16


def test_statistics_are_those_of_their_own_pipelines() -> None:
    dc, z = AUTOENCODERS["dc"](), torch.randn(2, 4, 6, 6)
    dc.register_to_config(scaling_factor=0.41407)
    torch.testing.assert_close(LatentNormalizer.of(dc).normalize(z), z * 0.41407)
    flux, z = AUTOENCODERS["flux2"](), torch.randn(2, 4, 6, 6)
    with torch.no_grad():  # the same for all pixels of a patch
        flux.bn.running_mean.copy_(torch.arange(4.0).repeat_interleave(4))
        flux.bn.running_var.copy_(torch.arange(1.0, 5).repeat_interleave(4))
    patches = flux.bn.eval()(Flux2Pipeline._patchify_latents(z))
    torch.testing.assert_close(LatentNormalizer.of(flux).normalize(z), Flux2Pipeline._unpatchify_latents(patches))
    # over patches whose pixels differ, the moments are those of the whole channel
    of_pixels = torch.randn(4, 4, 1000) * torch.rand(4, 4, 1) + torch.randn(4, 4, 1)
    with torch.no_grad():
        flux.bn.running_mean.copy_(of_pixels.mean(2).flatten())
        flux.bn.running_var.copy_(of_pixels.var(2, correction=0).flatten() - flux.bn.eps)
    torch.testing.assert_close(LatentNormalizer.of(flux).mean, of_pixels.mean((1, 2)))
    torch.testing.assert_close(LatentNormalizer.of(flux).std, of_pixels.std((1, 2), correction=0))


@torch.no_grad()
def test_tiling_works_on_what_exceeds_a_tile_or_is_refused(kind: str) -> None:
    network = AUTOENCODERS[kind]()
    if kind == "tiny":
        with pytest.raises(UsageError, match="an AutoencoderTiny does not work in tiles"):
            enable_tiling(network)
        return
    small = decode_latents(network, encode_latents(network, images(1, 32)))
    whole = encode_latents(network, images(1, 96))
    enable_tiling(network)
    if kind == "dc":
        network.enable_tiling(32, 32, 24, 24)
    assert network.use_tiling and torch.equal(decode_latents(network, encode_latents(network, images(1, 32))), small)
    tiled = encode_latents(network, images(1, 96))
    assert tiled.shape == whole.shape and torch.equal(tiled, whole) == (kind == "pixels")
    assert decode_latents(network, tiled).shape == (1, 3, 96, 96)


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    (
        "flux2",
        {"_class_name": "AutoencoderKLWan"},
        "holds a network of 'AutoencoderKLWan'; give one of: AutoencoderKL, ",
    ),
    ("flux2", {"_class_name": ["AutoencoderKL"]}, r"holds a network of \[.*; give one of"),
    ("flux2", {"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types is .*, not one for each of 2 block_out_channels"),
    ("flux2", {"patch_size": [2]}, "patch_size"),
    ("flux2", {"batch_norm_eps": 0.0}, "batch_norm_eps"),
    ("dc", {"encoder_block_out_channels": []}, "encoder_block_out_channels"),
    ("dc", {"decoder_layers_per_block": [1]}, "decoder_layers_per_block is .*, not one for each of 3 encoder_block_out"),
    ("dc", {"encoder_layers_per_block": [1, 1, 10**9]}, "encoder_layers_per_block"),
    ("dc", {"latent_channels": 8}, "cannot be loaded as an AutoencoderDC"),
    ("dc", {"in_channels": 1}, "in_channels"),
    ("dc", {"encoder_layers_per_block": [1, 0, 1]}, "encoder_layers_per_block"),
    ("tiny", {"upsampling_scaling_factor": 3}, "upsampling_scaling_factor"),
    ("tiny", {"num_decoder_blocks": [1]}, "num_decoder_blocks is .*, not one for each of 2 num_encoder_blocks"),
    ("tiny", {"out_channels": 4}, "out_channels"),
    ("pixels", {"latent_channels": 4}, "latent_channels"),
    ("pixels", {"latents_std": [0.0] * 3}, "latents_std"),
]


@pytest.mark.parametrize(("kind", "changes", "why"), CHANGES, ids=lambda value: str(value)[:40])
def test_configs_of_no_autoencoder_are_refused_in_one_line(
    kind: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    AUTOENCODERS[kind]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(LdmError, match=why) as error:
        load_autoencoder(tmp_path)
    assert "\n" not in str(error.value)


def test_stage_one_trains_an_autoencoderkl_alone(kind: str, tmp_path: Path) -> None:
    AUTOENCODERS[kind]().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="cannot be trained, but used as it is; give an AutoencoderKL"):
        AutoencoderConfig(init_from=str(tmp_path)).build()
