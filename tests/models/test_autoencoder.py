import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from ldm.errors import UsageError
from ldm.models.autoencoder import (
    AutoencoderConfig,
    autoencoder_hash,
    decode_latents,
    images_to_pictures,
    load_autoencoder,
    normalise_latents,
    pixels_to_images,
    set_latent_statistics,
)


def small(**changes):
    settings = {"widths": [8, 16], "norm_groups": 4, "layers_per_block": 1, "mid_attention": False, "sample_size": 16}
    return AutoencoderConfig(**settings | changes)


def images(batch=2, size=16):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("widths, factor", [([8], 1), ([8, 16], 2), ([8, 8, 16], 4), ([8, 8, 8, 8], 8)])
@pytest.mark.parametrize("latent_channels", [1, 4])
def test_each_level_after_the_first_halves_the_picture(widths, factor, latent_channels):
    config = small(widths=widths, latent_channels=latent_channels)
    assert config.factor == factor
    network = config.build().eval()
    z = network.encode(images()).latent_dist.mode()
    assert z.shape == (2, latent_channels, 16 // factor, 16 // factor)
    assert network.decode(z).sample.shape == (2, 3, 16, 16)


def test_mid_attention_and_blocks_are_as_asked():
    assert small(mid_attention=True).build().encoder.mid_block.attentions[0] is not None
    assert small(mid_attention=False).build().encoder.mid_block.attentions[0] is None
    assert len(small(layers_per_block=3).build().encoder.down_blocks[0].resnets) == 3


def test_sizes_that_do_not_fit_are_refused_by_name():
    with pytest.raises(UsageError, match=r"sample_size 18 is not a multiple of 4, the factor of 3 widths"):
        small(widths=[8, 8, 8], sample_size=18).build()
    with pytest.raises(UsageError, match=r"widths holds 10, not a multiple of norm_groups 4"):
        small(widths=[8, 10]).build()


def test_a_fresh_posterior_is_narrow_and_finite(tiny_autoencoder):
    posterior = tiny_autoencoder.encode(images()).latent_dist
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, np.exp(-3.0)))
    assert posterior.mean.isfinite().all() and posterior.mean.std() > 0.05


@torch.no_grad()
def test_latent_statistics_normalise_and_are_undone_in_decoding(tiny_autoencoder):
    z = tiny_autoencoder.encode(images(16)).latent_dist.mode()
    set_latent_statistics(tiny_autoencoder, z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).tolist())
    normalised = normalise_latents(tiny_autoencoder, z)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(4), rtol=1e-5, atol=1e-5)
    plain = tiny_autoencoder.decode(z).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_latents(tiny_autoencoder, normalised), plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_autoencoder_from_elsewhere_brings_scale_and_shift_instead(tiny_autoencoder):
    tiny_autoencoder.register_to_config(scaling_factor=0.36, shift_factor=0.12)
    z = torch.randn(2, 4, 8, 8)
    normalised = normalise_latents(tiny_autoencoder, z)
    torch.testing.assert_close(normalised, (z - 0.12) * 0.36)  # as diffusers' SD3 and FLUX pipelines do
    plain = tiny_autoencoder.decode(z).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_latents(tiny_autoencoder, normalised), plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_stock_diffusers_opens_it(tiny_autoencoder, tmp_path):
    set_latent_statistics(tiny_autoencoder, [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    tiny_autoencoder.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    for again in (AutoencoderKL.from_pretrained(tmp_path), load_autoencoder(tmp_path)):
        assert torch.equal(again(images()).sample, tiny_autoencoder(images()).sample)
        assert list(again.config.latents_std) == [1.0, 2.0, 3.0, 4.0]
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


def test_what_is_no_autoencoder_is_refused_by_name(tiny_autoencoder, tmp_path):
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
        with pytest.raises(UsageError) as error:
            load_autoencoder(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_every_pixel_value_comes_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    pixels[:, 1] = pixels[:, 1].flip(-1)
    pixels[1, 2] = 7
    floats = pixels_to_images(pixels)
    assert floats.dtype == torch.float32 and floats.min() == -1 and floats.max() == 1
    pictures = images_to_pictures(floats)
    assert [picture.mode for picture in pictures] == ["RGB", "RGB"] and pictures[0].size == (16, 16)
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), pixels.permute(0, 2, 3, 1).numpy())


def test_pictures_are_clamped_and_neither_turned_nor_mirrored():
    tall = torch.full((1, 3, 4, 2), -9.0)
    tall[0, :, 0, 1] = 9.0
    (picture,) = images_to_pictures(tall.bfloat16())
    assert picture.size == (2, 4) and picture.getpixel((1, 0)) == (255, 255, 255) and picture.getpixel((0, 1)) == (0, 0, 0)
