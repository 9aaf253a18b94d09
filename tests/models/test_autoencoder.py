import copy
import json
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from ldm.errors import LdmError, UsageError
from ldm.models.autoencoder import (
    AutoencoderConfig,
    LatentNormalizer,
    autoencoder_hash,
    decode,
    decode_latents,
    enable_tiling,
    encode,
    images_to_pil,
    load_autoencoder,
    pixels_to_images,
    reconstruct,
    set_latent_statistics,
)


def small(**changes):
    settings: dict[str, Any] = {
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "mid_block_add_attention": False,
        "sample_size": 16,
    }
    return AutoencoderConfig(**settings | changes)


def images(batch=2, size=16):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("levels, factor", [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 32)])
@pytest.mark.parametrize("latent_channels", [1, 4, 32])
def test_each_level_after_the_first_halves_the_image(levels, factor, latent_channels):
    config = small(block_out_channels=[8] * levels, latent_channels=latent_channels, sample_size=64)
    assert config.factor == factor
    network = config.build()
    posterior = encode(network, images(size=64))
    assert posterior.mean.shape == posterior.std.shape == (2, latent_channels, 64 // factor, 64 // factor)
    assert posterior.mean.isfinite().all() and posterior.mean.std() > 0.01
    assert decode(network, posterior.mode()).shape == (2, 3, 64, 64)


def test_the_default_is_the_f8_autoencoder_of_latent_diffusion():
    with torch.device("meta"):
        network = AutoencoderConfig().build()
    assert AutoencoderConfig().factor == 8 and network.config["latent_channels"] == 4 and network.config["sample_size"] == 256
    assert 83e6 < sum(parameter.numel() for parameter in network.parameters()) < 84e6  # as in Rombach et al.


def test_mid_attention_and_blocks_are_as_asked():
    assert small(mid_block_add_attention=True).build().encoder.mid_block.attentions[0] is not None
    assert small(mid_block_add_attention=False).build().encoder.mid_block.attentions[0] is None
    assert len(list(small(layers_per_block=3).build().encoder.down_blocks[0].get_submodule("resnets").children())) == 3


@pytest.mark.parametrize(
    "changes, why",
    [
        (
            {"block_out_channels": [8] * 3, "sample_size": 18},
            "sample_size 18 is not a multiple of 4, the factor of 3 block_out",
        ),
        ({"block_out_channels": [8, 10]}, "block_out_channels holds 10, not a multiple of norm_num_groups 4"),
        ({"block_out_channels": []}, "block_out_channels is empty"),
        ({"block_out_channels": [8, 0]}, "block_out_channels holds 0"),
        ({"block_out_channels": [-4]}, "block_out_channels holds -4"),
        ({"latent_channels": 0}, "latent_channels is 0; give 1 or more"),
        ({"layers_per_block": 0}, "layers_per_block is 0; give 1 or more"),
        ({"norm_num_groups": 0}, "norm_num_groups is 0; give 1 or more"),
        ({"sample_size": 0}, "sample_size is 0; give 1 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes, why):
    with pytest.raises(UsageError, match=why):
        small(**changes).build()


# -- from a directory ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["ours", "sd", "flux"])
def directory(request, tmp_path, randomised):
    """An autoencoder with latent statistics, laid out as ours, SD's or FLUX's is."""
    kinds: dict[str, dict[str, Any]] = {
        "ours": {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0], "scaling_factor": 1.0},
        "sd": {"scaling_factor": 0.18215},
        "flux": {"scaling_factor": 0.36, "shift_factor": 0.12, "use_quant_conv": False, "use_post_quant_conv": False},
    }
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [6, 6, 12],
    }
    network = AutoencoderKL(**sizes, norm_num_groups=3, sample_size=24, **kinds[request.param])
    randomised(network).save_pretrained(tmp_path / request.param)
    return str(tmp_path / request.param)


def statistics(network):
    return {k: network.config[k] for k in ("latents_mean", "latents_std", "scaling_factor", "shift_factor")}


def weights(*modules):
    return [value.clone() for module in modules if module is not None for value in module.state_dict().values()]


def same(these, those):
    return all(torch.equal(this, that) for this, that in zip(these, those, strict=True))


def test_a_warm_start_is_the_directory_bit_for_bit_without_its_latent_statistics(directory):
    config = AutoencoderConfig(init_from=directory)
    assert config.factor == 4
    network, theirs = config.build(), AutoencoderKL.from_pretrained(directory)
    assert same(weights(network), weights(theirs))
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert statistics(network) == {"latents_mean": None, "latents_std": None, "scaling_factor": 1.0, "shift_factor": None}
    z = encode(network, images()).mode()
    assert torch.equal(LatentNormalizer.of(network).normalize(z), z)


def test_training_the_decoder_alone_keeps_encoder_and_latents_bit_for_bit(directory, tmp_path):
    network, theirs = AutoencoderConfig(init_from=directory, train="decoder").build(), AutoencoderKL.from_pretrained(directory)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        posterior = encode(network, images(4))
        (torch.mean((decode(network, posterior.sample()) - images(4)) ** 2) + 1e-3 * posterior.kl().mean()).backward()
        optimiser.step()
    network.save_pretrained(tmp_path / "out")
    after = AutoencoderKL.from_pretrained(tmp_path / "out")
    assert same(weights(after.encoder, after.quant_conv), weights(theirs.encoder, theirs.quant_conv))
    ours, before = encode(after, images()), encode(theirs, images())
    assert torch.equal(ours.mean, before.mean) and torch.equal(ours.std, before.std)
    assert statistics(after) == statistics(theirs)
    for moved in ("decoder", "post_quant_conv"):
        if getattr(theirs, moved) is not None:
            pairs = zip(getattr(after, moved).parameters(), getattr(theirs, moved).parameters(), strict=True)
            assert all((new != old).any() for new, old in pairs)


@torch.no_grad()
@pytest.mark.parametrize("train", ["all", "decoder"])
def test_stock_diffusers_opens_a_warm_start_too(directory, tmp_path, train):
    network = AutoencoderConfig(init_from=directory, train=train, sample_size=16, tiling=True).build()
    network.save_pretrained(tmp_path / "out")
    again = AutoencoderKL.from_pretrained(tmp_path / "out")
    assert (reconstruct(again, images(3)) - reconstruct(network, images(3))).abs().max() <= 1e-5


def test_half_precision_is_trained_in_full(tiny_autoencoder, tmp_path):
    tiny_autoencoder.half().save_pretrained(tmp_path)
    network = AutoencoderConfig(init_from=str(tmp_path)).build()
    assert network.dtype == torch.float32 and same(weights(network), [value.float() for value in weights(tiny_autoencoder)])


@pytest.mark.parametrize(
    "field, value, theirs",
    [
        ("block_out_channels", [6, 6, 6], r"\[6, 6, 12\]"),
        ("latent_channels", 16, "4"),
        ("layers_per_block", 2, "1"),
        ("norm_num_groups", 6, "3"),
        ("mid_block_add_attention", False, "True"),
    ],
)
@pytest.mark.parametrize("directory", ["sd"], indirect=True)
def test_settings_that_contradict_the_directory_are_refused_by_name(directory, field, value, theirs):
    with pytest.raises(UsageError, match=rf"{field} is .*, but .*sd has {theirs}; leave") as error:
        AutoencoderConfig(init_from=directory, **{field: value}).build()
    assert str(value) in str(error.value) and directory in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("directory", ["sd"], indirect=True)
def test_settings_of_the_directory_may_be_repeated_and_the_sample_size_is_free(directory):
    network = AutoencoderConfig([6, 6, 12], 4, 1, 3, True, 64, init_from=directory).build()
    assert network.config["sample_size"] == 64
    assert AutoencoderConfig(init_from=directory).build().config["sample_size"] == 24
    with pytest.raises(UsageError, match="sample_size 30 is not a multiple of 4"):
        AutoencoderConfig(init_from=directory, sample_size=30).build()


def test_decoder_alone_needs_a_directory(tmp_path):
    with pytest.raises(UsageError, match=r"train decoder .* init_from"):
        small(train="decoder").build()
    for ask in (lambda config: config.factor, lambda config: config.build()):
        with pytest.raises(UsageError, match=r"nowhere is not an autoencoder directory"):
            ask(AutoencoderConfig(init_from=str(tmp_path / "nowhere")))


def test_a_directory_that_lacks_weights_is_not_filled_up_at_random(tiny_autoencoder, tmp_path):
    tiny_autoencoder.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if not name.startswith("encoder.conv_in")}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 2 weights of an AutoencoderKL, encoder.conv_in"):
        load_autoencoder(tmp_path)


# -- large images ------------------------------------------------------------------------------------------------------


def waves(height, width, period):
    """A smooth image, (1, 3, H, W), that repeats itself every ``period`` pixels."""
    y, x = (torch.arange(side) * 2 * math.pi / period for side in (height, width))
    return 0.8 * torch.stack([x.sin() * y.cos()[:, None], (x + y[:, None]).cos(), (y + 1).sin()[:, None] + 0 * x])[None]


@torch.no_grad()
def tiled_and_whole(network, image):
    """Latents and reconstruction of both."""
    both = []
    for switch in (lambda: enable_tiling(network), network.disable_tiling):
        switch()
        z = encode(network, image).mode()
        both.append((z, decode(network, z)))
    return both


@pytest.mark.parametrize("levels, side", [(2, 32), (3, 32), (4, 64)])
def test_tiles_are_placed_correctly(levels, side, randomised):
    """Where kernels cover one pixel and every tile holds whole waves, a tile equals its part of the whole."""
    torch.manual_seed(0)
    network = randomised(small(block_out_channels=[8] * levels, sample_size=side).build())
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
                centre = module.weight[..., 1, 1].clone()
                module.weight.zero_()[..., 1, 1] = centre
    # 13 and 5 quarters of a tile: neither is a multiple of a tile, nor of the three quarters from one to the next
    (z, image), (whole_z, whole) = tiled_and_whole(network, waves(side // 4 * 13, side // 4 * 5, side // 4))
    torch.testing.assert_close(z, whole_z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(image, whole, rtol=1e-3, atol=1e-3)


def test_a_tiled_reconstruction_of_a_smooth_image_is_close_to_the_whole_one():
    torch.manual_seed(0)
    (_, tiled), (_, whole) = tiled_and_whole(small(sample_size=64).build(), waves(256, 256, 32))
    assert whole.std() > 0.4
    assert (tiled - whole).abs().mean() < 0.05  # of a range of 2; what is left is at the tiles' borders


@pytest.mark.parametrize("height, width", [(36, 100), (100, 36), (8, 40), (68, 16), (52, 44)])
def test_any_multiple_of_the_factor_can_be_tiled(height, width):
    (z, image), (whole_z, whole) = tiled_and_whole(small(block_out_channels=[8, 8, 8]).build(), waves(height, width, 16))
    assert z.shape == whole_z.shape and image.shape == whole.shape and image.isfinite().all()


@torch.no_grad()
def test_tiles_of_few_latents_align_unlike_those_of_diffusers():
    network, image = small(block_out_channels=[8] * 4).build(), waves(48, 48, 16)  # f8 at 16 px: two latents a side
    network.enable_tiling()
    assert encode(network, image).mean.shape == (1, 4, 7, 7)  # diffusers 0.42: the tiles do not align
    (z, _), _ = tiled_and_whole(network, image)
    assert z.shape == (1, 4, 6, 6)


def gradients(network, batch):
    posterior = encode(network, batch)
    decode(network, posterior.mode()).square().mean().backward()
    return [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("sample_size", [16, 20])
def test_training_is_never_tiled(sample_size):
    found = []
    for tiling in (False, True):
        torch.manual_seed(0)
        found.append(gradients(small(sample_size=sample_size, tiling=tiling).build(), images(2, sample_size)))
    assert same(*found)


def test_gradients_flow_through_tiles(randomised):
    network = randomised(small(tiling=True).build())
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(network, images(1, 40)))


def test_slices_are_the_batch_and_so_are_their_gradients(randomised):
    network, batch = randomised(small(slicing=True).build()).double(), images(5).double()
    assert network.use_slicing and not network.use_tiling
    sliced = reconstruct(network, batch), gradients(network, batch)
    network.zero_grad()
    network.disable_slicing()
    torch.testing.assert_close((reconstruct(network, batch), gradients(network, batch)), sliced, rtol=1e-9, atol=1e-9)


# -- latents and images ------------------------------------------------------------------------------------------------


def test_a_fresh_posterior_is_narrow_and_finite(tiny_autoencoder):
    posterior = encode(tiny_autoencoder, images())
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, np.exp(-3.0)))
    assert posterior.mean.isfinite().all() and posterior.mean.std() > 0.05


@torch.no_grad()
def test_latent_statistics_normalise_and_are_undone_in_decoding(tiny_autoencoder):
    z = encode(tiny_autoencoder, images(16)).mode()
    set_latent_statistics(tiny_autoencoder, z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).tolist())
    normalised = LatentNormalizer.of(tiny_autoencoder).normalize(z)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(4), rtol=1e-5, atol=1e-5)
    plain = decode(tiny_autoencoder, z).clamp(-1, 1)
    torch.testing.assert_close(decode_latents(tiny_autoencoder, normalised), plain, rtol=1e-4, atol=1e-5)


def test_latent_statistics_are_float32_buffers_outside_the_state_dict(tiny_autoencoder):
    set_latent_statistics(tiny_autoencoder, [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    normalizer = LatentNormalizer.of(tiny_autoencoder)
    assert {name: (buffer.dtype, buffer.shape) for name, buffer in normalizer.named_buffers()} == {
        "mean": (torch.float32, (4,)),
        "std": (torch.float32, (4,)),
    }
    assert not normalizer.state_dict()
    z = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(normalizer.denormalize(normalizer.normalize(z)), z)


@torch.no_grad()
def test_an_autoencoder_from_elsewhere_brings_scale_and_shift_instead(tiny_autoencoder):
    tiny_autoencoder.register_to_config(scaling_factor=0.36, shift_factor=0.12)
    z = torch.randn(2, 4, 8, 8)
    normalised = LatentNormalizer.of(tiny_autoencoder).normalize(z)
    torch.testing.assert_close(normalised, (z - 0.12) * 0.36)  # as diffusers' SD3 and FLUX pipelines do
    plain = decode(tiny_autoencoder, z).clamp(-1, 1)
    torch.testing.assert_close(decode_latents(tiny_autoencoder, normalised), plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_stock_diffusers_opens_it(tiny_autoencoder, tmp_path):
    set_latent_statistics(tiny_autoencoder, [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    tiny_autoencoder.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    for again in (AutoencoderKL.from_pretrained(tmp_path), load_autoencoder(tmp_path)):
        assert torch.equal(again(images()).sample, tiny_autoencoder(images()).sample)
        assert list(again.config["latents_std"]) == [1.0, 2.0, 3.0, 4.0]
        assert autoencoder_hash(again) == autoencoder_hash(tiny_autoencoder)


def test_a_loaded_autoencoder_is_frozen(tiny_autoencoder, tmp_path):
    tiny_autoencoder.train().save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_hash_is_of_weights_and_architecture_not_of_statistics(tiny_autoencoder):
    before = autoencoder_hash(tiny_autoencoder)
    set_latent_statistics(tiny_autoencoder, [1.0] * 4, [2.0] * 4)
    tiny_autoencoder.requires_grad_(False).train()
    assert autoencoder_hash(tiny_autoencoder) == before
    weight = tiny_autoencoder.decoder.conv_out.weight
    kept = weight[0, 0, 0, 0].clone()
    weight[0, 0, 0, 0] += 1e-6
    changed = autoencoder_hash(tiny_autoencoder)
    assert changed != before
    weight[0, 0, 0, 0] = kept
    assert autoencoder_hash(tiny_autoencoder) == before
    tiny_autoencoder.register_to_config(scaling_factor=0.5)
    assert autoencoder_hash(tiny_autoencoder) not in (before, changed)


def test_a_directory_without_an_autoencoder_is_refused_by_name(tiny_autoencoder, tmp_path):
    with pytest.raises(UsageError, match=r"nowhere is not an autoencoder directory \(no config.json\)"):
        load_autoencoder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    tiny_autoencoder.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    tiny_autoencoder.save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("not JSON")
    for name in ("empty", "cut", "broken"):
        with pytest.raises(LdmError) as error:
            load_autoencoder(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_every_pixel_value_comes_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    pixels[:, 1] = pixels[:, 1].flip(-1)
    pixels[1, 2] = 7
    floats = pixels_to_images(pixels)
    assert floats.dtype == torch.float32 and floats.min() == -1 and floats.max() == 1
    images = images_to_pil(floats)
    assert [image.mode for image in images] == ["RGB", "RGB"] and images[0].size == (16, 16)
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), pixels.permute(0, 2, 3, 1).numpy())


def test_images_are_clamped_and_neither_turned_nor_mirrored():
    tall = torch.full((1, 3, 4, 2), -9.0)
    tall[0, :, 0, 1] = 9.0
    (image,) = images_to_pil(tall.bfloat16())
    assert image.size == (2, 4) and image.getpixel((1, 0)) == (255, 255, 255) and image.getpixel((0, 1)) == (0, 0, 0)


@pytest.fixture
def saved(tiny_autoencoder, tmp_path):
    tiny_autoencoder.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_the_autoencoder_of_a_pipeline_is_used(saved, caplog):
    assert autoencoder_hash(load_autoencoder(saved.parent)) == autoencoder_hash(load_autoencoder(saved))
    assert f"{saved.parent} is a pipeline, its autoencoder {saved} is used" in caplog.text
    assert AutoencoderConfig(init_from=str(saved.parent)).build().config["latent_channels"] == 4


@pytest.mark.parametrize("of_pipeline", [False, True])
def test_half_precision_weights_alone_are_used_in_full_precision(saved, tiny_autoencoder, of_pipeline, caplog):
    (saved / "diffusion_pytorch_model.safetensors").unlink()
    half = copy.deepcopy(tiny_autoencoder).half()
    half.save_pretrained(saved, variant="fp16")
    found = load_autoencoder(saved.parent if of_pipeline else saved)
    assert found.dtype == torch.float32 and "variant fp16 alone" in caplog.text
    for name, weight in half.float().state_dict().items():
        assert torch.equal(found.state_dict()[name], weight)


def test_its_weights_are_its_own_whatever_becomes_of_the_file(saved):
    """Mapped into memory, they would change with the file, and a shorter file would end the process."""
    network = load_autoencoder(saved)
    before = encode(network, torch.zeros(1, 3, 16, 16)).mean
    os.truncate(saved / "diffusion_pytorch_model.safetensors", 10)
    assert torch.equal(encode(network, torch.zeros(1, 3, 16, 16)).mean, before)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (b"{", "config.json is not readable JSON"),
        (b"null", "config.json"),
        (b"[" * 100_000, "config.json is not readable JSON"),
        (b'{"latent_channels": ' + b"9" * 5000 + b"}", "config.json"),
        ({"layers_per_block": 10**6}, "config.json: layers_per_block is 1000000, above the limit"),
        ({"layers_per_block": 65}, "config.json: layers_per_block: .*less than or equal to 64"),
        ({"block_out_channels": []}, "config.json: block_out_channels"),
        ({"block_out_channels": [8, "16"]}, "config.json: block_out_channels.1"),
        ({"block_out_channels": [8, 10**9]}, "config.json: block_out_channels.1"),
        ({"down_block_types": []}, "config.json: down_block_types"),
        ({"up_block_types": None}, "config.json: up_block_types"),
        ({"scaling_factor": 0}, "config.json: scaling_factor"),
        ({"scaling_factor": None}, "config.json: scaling_factor"),
        ({"latents_std": [1.0, -1.0, 1.0, 1.0], "latents_mean": [0.0] * 4}, "config.json: latents_std.1"),
        ({"latents_mean": "0"}, "config.json: latents_mean"),
        ({"latents_std": [float("nan")] * 4}, "config.json: latents_std.0"),
        ({"norm_num_groups": 0}, "config.json: norm_num_groups"),
        ({"norm_num_groups": 3}, "cannot be loaded|not a multiple of norm_num_groups 3"),
        ({"act_fn": "none"}, "cannot be loaded"),
        ({"sample_size": [1, 2, 3]}, "config.json: sample_size"),
    ],
)
def test_broken_configs_are_one_line(saved, change, expected):
    config = saved / "config.json"
    config.write_bytes(change if isinstance(change, bytes) else json.dumps(json.loads(config.read_text()) | change).encode())
    for load in (load_autoencoder, lambda folder: AutoencoderConfig(init_from=str(folder)).build()):
        with pytest.raises(LdmError, match=expected) as error:
            load(saved)
        assert "\n" not in str(error.value)


def test_more_layers_than_anyone_means_are_refused():
    with pytest.raises(UsageError, match="layers_per_block is 1000000; give at most 64"):
        AutoencoderConfig(layers_per_block=10**6).build()


def test_pipes_among_its_files_do_not_block(saved):
    os.mkfifo(saved / "diffusion_pytorch_model.bin")
    with pytest.raises(LdmError, match=r"diffusion_pytorch_model.bin is a named pipe; restore the directory"):
        load_autoencoder(saved)


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        ([0.0] * 4, [1.0, 0.0, 1.0, 1.0], "channel 1 of the latents has a standard deviation of 0"),
        ([0.0] * 4, [1.0, 1.0, 1.0, -1.0], "channel 3 of the latents has a standard deviation of -1"),
        ([0.0] * 4, [1.0, float("inf"), 1.0, 1.0], "must be a finite mean"),
        ([float("nan")] * 4, [1.0] * 4, "must be a finite mean"),
        ([0.0] * 4, [1.0] * 3, "must be a finite mean"),
        ([0.0] * 3, [1.0] * 3, "statistics of 3 channels, but 4 latent_channels"),
    ],
)
def test_statistics_by_which_nothing_can_be_normalised_are_refused(tiny_autoencoder, mean, std, expected):
    tiny_autoencoder.register_to_config(latents_mean=mean, latents_std=std)
    with pytest.raises(LdmError, match=expected):
        LatentNormalizer.of(tiny_autoencoder)
