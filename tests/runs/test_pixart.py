import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import X0, Epsilon, Preconditioned, V, Velocity
from ldm.diffusion.scheduler import diffusion_config, matching_scheduler
from ldm.errors import UsageError
from ldm.models.autoencoder import LatentNormalizer, decode_latents, set_latent_statistics
from ldm.models.dit import DiT
from ldm.pipeline import LatentDiffusionPipeline
from ldm.runs.pixart import export_pixart, with_normalised_latents

PROMPTS = ["a red circle", "a tiny blue star at the top left of a dark green background"]
QUICK: dict[str, Any] = {"num_inference_steps": 7, "guidance_scale": 4.0}
THEIRS = QUICK | {"use_resolution_binning": False, "clean_caption": False}


def pixart(**changes):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "cross_attention_dim": 16}
    sizes |= {"in_channels": 4, "out_channels": 4, "caption_channels": 384, "sample_size": 8}
    return PixArtTransformer2DModel(**sizes | changes).eval()


def make_pipeline(autoencoder, minilm, path=None, prediction=None, scheduler=None, transformer=None) -> Any:
    diffusion = path or RectifiedFlow(), prediction or Velocity()
    made = LatentDiffusionPipeline(
        vae=autoencoder,
        text_encoder=minilm.model,
        tokenizer=minilm.tokenizer,
        transformer=transformer or pixart(),
        scheduler=scheduler or matching_scheduler(*diffusion),
        diffusion=diffusion_config(*diffusion),
    )
    made.set_progress_bar_config(disable=True)
    return made


def pixels(images) -> Any:
    return np.stack([np.asarray(image).astype(int) for image in images])


def assert_same_images(ours, folder):
    """From the same noise; returns their pipeline and our images."""
    theirs: Any = PixArtAlphaPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    ours.scheduler = theirs.scheduler
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = pixels(ours(PROMPTS, latents=noise, **QUICK).images)
    found = pixels(theirs(PROMPTS, latents=noise, **THEIRS).images)
    print("largest difference", abs(found - wanted).max())
    assert abs(found - wanted).max() <= 2
    return theirs, wanted


@pytest.mark.parametrize(
    "mean, std",
    [([0.1, -0.3, 0.0, 0.2], [0.5, 0.6, 0.7, 0.8]), ([0.0] * 4, [0.25] * 4), ([0.4] * 4, [0.5] * 4)],
    ids=["per channel", "one factor", "a shift too"],
)
def test_the_stock_pipeline_generates_the_same_images(tiny_autoencoder, minilm, tmp_path, mean, std):
    set_latent_statistics(tiny_autoencoder, mean, std)
    ours = make_pipeline(tiny_autoencoder, minilm)
    export_pixart(ours, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert {part[0] for name, part in index.items() if not name.startswith("_")} == {"diffusers", "transformers"}
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".py", ".bin")]

    theirs, wanted = assert_same_images(ours, tmp_path / "out")
    assert wanted.std() > 10 and abs(wanted[0] - wanted[1]).max() > 10  # images of something, and of two things
    # and from the same seed
    wanted = pixels(ours(PROMPTS, generator=torch.Generator().manual_seed(1), **QUICK).images)
    again = theirs(PROMPTS, generator=torch.Generator().manual_seed(1), **THEIRS).images
    assert abs(pixels(again) - wanted).max() <= 2


@pytest.mark.parametrize(
    "path, prediction",
    [
        (VariancePreserving(), Epsilon()),
        (VariancePreserving(zero_terminal_snr=True), V()),
        (VariancePreserving("squaredcos_cap_v2"), X0()),
        (VarianceExploding(), Preconditioned()),
    ],
)
def test_it_generates_the_same_images_on_every_path(tiny_autoencoder, minilm, tmp_path, path, prediction):
    set_latent_statistics(tiny_autoencoder, [0.1, -0.3, 0.0, 0.2], [0.5, 0.6, 0.7, 0.8])
    ours = make_pipeline(tiny_autoencoder, minilm, path, prediction)
    export_pixart(ours, tmp_path / "out")
    _, wanted = assert_same_images(ours, tmp_path / "out")
    assert wanted.std() > 10


def test_networks_in_bf16_generate_nearly_the_same(tiny_autoencoder, minilm, tmp_path):
    set_latent_statistics(tiny_autoencoder, [0.1, -0.3, 0.0, 0.2], [0.5, 0.6, 0.7, 0.8])
    ours = make_pipeline(tiny_autoencoder, minilm)
    ours.save_pretrained(tmp_path)
    half: Any = LatentDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rounded, exact = (made(PROMPTS, latents=noise, output_type="pt", **QUICK).images for made in (half, ours))
    assert 0 < (rounded - exact).abs().mean() < 0.02


def test_flow_schedulers_give_way_to_one_on_the_same_path(tiny_autoencoder, minilm, tmp_path):
    """With many steps DPM-Solver++ arrives where Euler does."""
    ours = make_pipeline(tiny_autoencoder, minilm, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0))
    export_pixart(ours, tmp_path / "out")
    theirs: Any = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert theirs.config.use_flow_sigmas and theirs.config.flow_shift == 2.0
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def latents(scheduler, steps):
        ours.scheduler = scheduler
        return ours(PROMPTS[0], latents=noise, num_inference_steps=steps, guidance_scale=1.0, output_type="latent").images

    euler = latents(FlowMatchEulerDiscreteScheduler(shift=2.0), 200)
    apart = [(latents(theirs, steps) - euler).abs().mean() for steps in (5, 40)]
    assert apart[1] < apart[0] / 2 and apart[1] < 0.02 * (euler - noise).abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("mean, std", [([0.1, -0.3, 0.0, 0.2], [0.5, 0.6, 0.7, 0.8]), ([0.0] * 4, [0.25] * 4)])
def test_the_folded_autoencoder_reads_and_writes_normalised_latents(tiny_autoencoder, tmp_path, convolutions, mean, std):
    if not convolutions:  # as those of SD3 and FLUX
        tiny_autoencoder.quant_conv = tiny_autoencoder.post_quant_conv = None
        tiny_autoencoder.register_to_config(use_quant_conv=False, use_post_quant_conv=False)
    set_latent_statistics(tiny_autoencoder, mean, std)
    with_normalised_latents(tiny_autoencoder).save_pretrained(tmp_path)
    folded: Any = AutoencoderKL.from_pretrained(tmp_path)
    factor = folded.config.scaling_factor
    assert folded.config.latents_mean is None and factor == (4.0 if mean == [0.0] * 4 else 1.0)
    normalised = torch.randn(2, 4, 8, 8)
    wanted = decode_latents(tiny_autoencoder, normalised)
    torch.testing.assert_close(folded.decode(normalised / factor).sample.clamp(-1, 1), wanted, rtol=1e-5, atol=1e-5)

    images = torch.rand(2, 3, 16, 16) * 2 - 1
    before, after = tiny_autoencoder.encode(images).latent_dist, folded.encode(images).latent_dist
    torch.testing.assert_close(
        after.mean * factor, LatentNormalizer.of(tiny_autoencoder).normalize(before.mean), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(after.std * factor, before.std / torch.tensor(std).view(1, -1, 1, 1), rtol=1e-4, atol=1e-5)


def test_sizes_reach_the_denoiser_as_in_the_stock_pipeline(tiny_autoencoder, minilm, tmp_path):
    conditioned: dict[str, Any] = {"attention_head_dim": 12, "cross_attention_dim": 24, "use_additional_conditions": True}
    ours = make_pipeline(tiny_autoencoder, minilm, transformer=pixart(sample_size=128, **conditioned))
    remarks = export_pixart(ours, tmp_path / "out")
    assert not any("height=" in remark for remark in remarks)
    theirs: Any = PixArtAlphaPipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    ours.scheduler = theirs.scheduler
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = pixels(theirs(PROMPTS, latents=noise, height=16, width=16, **THEIRS).images)
    assert abs(found - pixels(ours(PROMPTS, latents=noise, **QUICK).images)).max() <= 2
    larger = pixels(ours(PROMPTS, latents=noise, original_size=(999, 999), **QUICK).images)
    assert abs(found - larger).max() > 2
    with pytest.raises(UsageError, match="at sample_size 128 alone, but this denoiser has sample_size 8 and use_additional"):
        export_pixart(make_pipeline(tiny_autoencoder, minilm, transformer=pixart(**conditioned)), tmp_path / "other")


def test_what_cannot_run_there_is_refused(tiny_autoencoder, minilm, tmp_path):
    dit = DiT(sample_size=8, width=32, num_layers=1, num_attention_heads=2)
    with pytest.raises(UsageError, match="the denoiser is a DiT, but PixArtAlphaPipeline runs a PixArt"):
        export_pixart(make_pipeline(tiny_autoencoder, minilm, transformer=dit), tmp_path)
    with pytest.raises(UsageError, match="predicts X0, but on its path PixArtAlphaPipeline can only run Velocity"):
        export_pixart(make_pipeline(tiny_autoencoder, minilm, prediction=X0()), tmp_path)
    pipeline = make_pipeline(tiny_autoencoder, minilm)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    pipeline.text_encoder = CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=1))
    with pytest.raises(UsageError, match="to 120 tokens, but this CLIPTextModel reads 77"):
        export_pixart(pipeline, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_to_mind_is_said(tiny_autoencoder, minilm, tmp_path):
    (remark,) = export_pixart(make_pipeline(tiny_autoencoder, minilm), tmp_path)
    assert "use_resolution_binning=False" in remark
