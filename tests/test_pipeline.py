import json
import os
import subprocess
import sys
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from ldm.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import X0, Epsilon, Preconditioned, V, Velocity
from ldm.diffusion.scheduler import diffusion_config, make_scheduler, matching_scheduler, samplers_for
from ldm.errors import LdmError, UsageError
from ldm.models.autoencoder import decode_latents
from ldm.pipeline import FORMAT_VERSION, RENAMED, LatentDiffusionPipeline, load_pipeline

PROMPTS = ["a red circle", "a tiny blue star at the top left of a dark green background", "a ring"]
QUICK = {"num_inference_steps": 4, "guidance_scale": 4.0}


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def draw(pipeline, prompt=PROMPTS, generators=(0, 1, 2), **changes):
    return pixels(pipeline(prompt, generator=seeds(*generators), **QUICK | changes).images)


FRESH = """
import sys
import numpy as np, torch
from diffusers import AutoencoderKL
folder, out, prompt = sys.argv[1:]
assert "ldm" not in sys.modules
vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
assert "ldm" not in sys.modules
with torch.no_grad():
    decoded = vae.decode(torch.linspace(-1, 1, 256).view(1, 4, 8, 8)).sample

import ldm
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(folder)
pipeline.set_progress_bar_config(disable=True)
image = pipeline(prompt, num_inference_steps=4, guidance_scale=4.0, generator=torch.Generator().manual_seed(0)).images[0]
np.savez(out, decoded=decoded.numpy(), image=np.asarray(image), name=type(pipeline).__module__)
"""


def test_a_saved_pipeline_opens_in_another_process_through_diffusers(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    parts = {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == parts | {"model_index.json"}
    assert not list((tmp_path / "saved").rglob("*.bin")) and not list((tmp_path / "saved").rglob("*.py"))
    arguments = [str(tmp_path / "saved"), str(tmp_path / "out.npz"), PROMPTS[0]]
    done = subprocess.run([sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    here = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), **QUICK).images[0]
    assert np.array_equal(found["image"], np.asarray(here)) and found["name"] == "ldm.pipeline"
    with torch.no_grad():
        decoded = pipeline.vae.decode(torch.linspace(-1, 1, 256).view(1, 4, 8, 8)).sample
    np.testing.assert_allclose(found["decoded"], decoded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "imports", ["import ldm, diffusers", "import diffusers, ldm", "import ldm.models.text_encoder, diffusers"]
)
def test_diffusers_knows_the_pipeline_in_whichever_order_they_are_imported(imports):
    checks = "assert diffusers.LatentDiffusionPipeline is ldm.LatentDiffusionPipeline; from ldm import DiT"
    checks += "\nassert diffusers.AutoencoderKL and not hasattr(diffusers, 'Nonsense') and not hasattr(ldm, 'Nonsense')"
    done = subprocess.run([sys.executable, "-c", f"{imports}\n{checks}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_load_pipeline_opens_what_was_saved_and_names_what_was_not(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    again = load_pipeline(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert type(again) is LatentDiffusionPipeline and list(again.vae.config.latents_std) == [0.5, 0.6, 0.7, 0.8]
    if not torch.cuda.is_available():
        assert np.array_equal(draw(again), draw(pipeline))
    with pytest.raises(UsageError, match=r"nowhere is not a pipeline directory \(no model_index.json\)"):
        load_pipeline(tmp_path / "nowhere")
    (tmp_path / "saved" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"saved cannot be opened"):
        load_pipeline(tmp_path / "saved")


def test_a_newer_format_and_former_names_are_refused_by_name(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index, network = tmp_path / "model_index.json", tmp_path / "transformer" / "config.json"
    content, config = json.loads(index.read_text()), json.loads(network.read_text())
    assert content["format_version"] == FORMAT_VERSION
    for former, name in RENAMED.items():
        network.write_text(json.dumps({key: value for key, value in config.items() if key != name} | {former: config[name]}))
        with pytest.raises(UsageError, match=f"config.json calls {name} by its former name {former}; rename it"):
            load_pipeline(tmp_path)
    network.write_text(json.dumps(config))
    index.write_text(json.dumps({key: value for key, value in content.items() if key != "format_version"}))
    assert load_pipeline(tmp_path).config["format_version"] == FORMAT_VERSION  # written before formats had versions
    index.write_text(json.dumps(content | {"format_version": 99}))
    for opened in (load_pipeline, LatentDiffusionPipeline.from_pretrained):
        with pytest.raises(LdmError, match=r"model_index.json: the pipeline has format version 99, and this ldm reads up to"):
            opened(tmp_path)


def test_an_image_does_not_depend_on_the_batch_it_was_drawn_in(pipeline):
    together = draw(pipeline)
    assert together.shape == (3, 16, 16, 3)
    assert together.std() > 10 and np.abs(together[0] - together[1]).max() > 10  # images, and not all the same
    for row, prompt in enumerate(PROMPTS):
        assert np.abs(draw(pipeline, prompt, [row])[0] - together[row]).max() <= 1
    backwards = draw(pipeline, PROMPTS[::-1], [2, 1, 0])
    assert np.abs(backwards[::-1] - together).max() <= 1


def test_words_and_seeds_change_the_image_and_nothing_else_does(pipeline):
    plain = draw(pipeline, PROMPTS[0], [0])
    assert np.array_equal(draw(pipeline, PROMPTS[0], [0]), plain)
    assert np.abs(draw(pipeline, PROMPTS[1], [0]) - plain).max() > 2
    assert np.abs(draw(pipeline, PROMPTS[0], [1]) - plain).max() > 10


def test_guidance_is_that_of_two_calls_by_hand(pipeline):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    found = pipeline(PROMPTS[0], latents=noise, output_type="latent", num_inference_steps=5, guidance_scale=2.5).images
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    x = noise
    with torch.no_grad():
        for sigma, following in pairwise(cast(torch.Tensor, scheduler.sigmas)):
            time = (sigma * 1000).view(1)
            conditional, null = (
                pipeline.transformer(x, *[encoded[0]], time, encoded[1]).sample
                for encoded in (pipeline.embed(pipeline.tokenize([text])) for text in (PROMPTS[0], ""))
            )
            x = x + (following - sigma) * (null + 2.5 * (conditional - null))
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)


def test_a_negative_prompt_leads_away_and_guidance_1_ignores_it(pipeline):
    plain, negative = draw(pipeline), draw(pipeline, negative_prompt="a red circle")
    assert np.abs(negative - plain).max() > 2
    assert np.array_equal(draw(pipeline, negative_prompt=["a red circle"] * 3), negative)
    unguided = draw(pipeline, guidance_scale=1.0)
    assert np.array_equal(draw(pipeline, guidance_scale=1.0, negative_prompt="a red circle"), unguided)
    # led away from itself by any strength, a prompt stays what it is without guidance
    assert np.abs(draw(pipeline, negative_prompt=PROMPTS, guidance_scale=6.0) - unguided).max() <= 1
    with pytest.raises(UsageError, match="2 negative prompts for 3 prompts"):
        draw(pipeline, negative_prompt=["a", "b"])


@pytest.mark.parametrize(
    "prompt, why",
    [("", "the prompt is empty"), (" \n", "the prompt is empty"), ("circle " * 600, r"has \d+ tokens, the text encoder takes")],
)
def test_prompts_that_would_not_be_drawn_as_written_are_refused(pipeline, prompt, why):
    for prompts in (prompt, [PROMPTS[0], prompt]):
        with pytest.raises(UsageError, match=why) as error:
            pipeline(prompts, **QUICK)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("height, width", [(18, 16), (16, 30), (15, 16)])
def test_sizes_that_cannot_be_drawn_are_refused(pipeline, height, width):
    with pytest.raises(UsageError, match=f"an image of {width}x{height} cannot be generated: give multiples of 4 pixels"):
        pipeline(PROMPTS[0], height=height, width=width, **QUICK)


def test_output_types_are_one_image_in_four_forms(pipeline):
    def drawn(output_type):
        return pipeline(PROMPTS, generator=seeds(0, 1, 2), output_type=output_type, **QUICK).images

    latents, tensors, images, arrays = (drawn(kind) for kind in ("latent", "pt", "pil", "np"))
    assert arrays.dtype == np.float32 and np.array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    assert latents.shape == (3, 4, 8, 8) and tensors.shape == (3, 3, 16, 16)
    assert tensors.min() >= 0 and tensors.max() <= 1 and all(isinstance(image, Image.Image) for image in images)
    with torch.no_grad():
        torch.testing.assert_close((decode_latents(pipeline.vae, latents) + 1) / 2, tensors)
    assert np.array_equal((tensors.permute(0, 2, 3, 1) * 255).round().int().numpy(), pixels(images))
    (as_tuple,) = pipeline(PROMPTS, generator=seeds(0, 1, 2), return_dict=False, **QUICK)
    assert np.array_equal(pixels(as_tuple), pixels(images))


def test_each_prompt_has_its_images_side_by_side(pipeline):
    many = draw(pipeline, PROMPTS[:2], range(4), num_images_per_prompt=2)
    each = [draw(pipeline, PROMPTS[row // 2], [row])[0] for row in range(4)]
    assert np.abs(many - np.stack(each)).max() <= 1


def test_a_callback_sees_every_step_and_may_change_the_latents(pipeline):
    seen = []

    def look(pipe, step, timestep, tensors):
        assert pipe is pipeline
        seen.append((step, timestep.item(), tensors["latents"].clone()))
        return {}

    final = pipeline(PROMPTS[0], generator=seeds(0), callback_on_step_end=look, output_type="latent", **QUICK).images
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [time for _, time, _ in seen] == sorted((time for _, time, _ in seen), reverse=True)
    assert torch.equal(seen[-1][2], final)

    def blank(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert not pipeline(PROMPTS[0], callback_on_step_end=blank, output_type="latent", **QUICK).images.any()


def test_starting_noise_may_be_given(pipeline):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = pixels(pipeline(PROMPTS[0], latents=noise, **QUICK).images)
    assert np.array_equal(given, draw(pipeline, PROMPTS[0], [0]))


@pytest.mark.parametrize("name", samplers_for(RectifiedFlow(), Velocity()))
def test_every_sampler_draws_each_image_by_itself(pipeline, name):
    plain = draw(pipeline)
    pipeline.scheduler = make_scheduler(name, *pipeline.diffusion)
    together = draw(pipeline)
    assert together.std() > 10 and np.array_equal(draw(pipeline), together)
    assert name == "euler" or np.abs(together - plain).max() > 2
    assert np.abs(draw(pipeline, PROMPTS[1], [1])[0] - together[1]).max() <= 1


@pytest.mark.parametrize(
    "path, prediction, name, options",
    [
        (VariancePreserving(), V(), "ddim", {"eta": 0.7, "timestep_spacing": "linspace"}),
        (VariancePreserving(), Epsilon(), "ddpm", {}),
        (VarianceExploding(), Preconditioned(), "dpm++2m-sde", {}),
        (RectifiedFlow(), X0(), "heun", {}),
    ],
)
def test_a_saved_pipeline_knows_its_diffusion_and_its_sampler(pipeline, tmp_path, path, prediction, name, options):
    parts = pipeline.components | {"scheduler": make_scheduler(name, path, prediction, **options)}
    made = LatentDiffusionPipeline(**parts, diffusion=diffusion_config(path, prediction))
    made.save_pretrained(tmp_path)
    words = json.loads((tmp_path / "model_index.json").read_text())["diffusion"]
    assert words == diffusion_config(path, prediction) and words["prediction"]["class_path"].endswith(type(prediction).__name__)
    again = load_pipeline(tmp_path).to("cpu")
    for each in (made, again):
        each.set_progress_bar_config(disable=True)
    assert type(again.diffusion.path) is type(path) and type(again.diffusion.prediction) is type(prediction)
    assert np.array_equal(draw(again), draw(made))


def test_a_pipeline_that_does_not_say_what_it_was_trained_with_is_what_its_first_scheduler_says(pipeline):
    assert diffusion_config(*pipeline.diffusion) == diffusion_config(RectifiedFlow(), Velocity())
    parts = pipeline.components | {"scheduler": matching_scheduler(VariancePreserving("linear"), V())}
    assert diffusion_config(*LatentDiffusionPipeline(**parts).diffusion) == diffusion_config(VariancePreserving("linear"), V())


def test_a_scheduler_of_another_path_is_refused_before_anything_is_drawn(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(UsageError, match=r"DDIMScheduler does not fit Velocity on RectifiedFlow\(\).* one of: euler, "):
        draw(pipeline)
    index = tmp_path / "model_index.json"
    content = json.loads(index.read_text())
    content["diffusion"]["path"]["class_path"] = "ldm.diffusion.path.VarianceExploding"
    index.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"does not fit Velocity on VarianceExploding\(.*one of: dpm\+\+2m, "):
        load_pipeline(tmp_path)
    content["diffusion"]["path"]["class_path"] = "os.system"
    index.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"diffusion of model_index.json cannot be read"):
        load_pipeline(tmp_path)


def test_progress_counts_the_calls_of_the_denoiser(pipeline, monkeypatch):
    pipeline.scheduler = make_scheduler("heun", *pipeline.diffusion)
    totals, calls = [], []
    shown = pipeline.progress_bar
    monkeypatch.setattr(pipeline, "progress_bar", lambda total: totals.append(total) or shown(total=total))
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    draw(pipeline)
    assert totals == [len(calls)] == [7]


def test_its_weights_are_its_own_whatever_becomes_of_the_files(pipeline, tmp_path):
    """Mapped into memory, they would change with the files, and a shorter file would end the process."""
    pipeline.save_pretrained(tmp_path)
    opened = load_pipeline(tmp_path).to("cpu")
    for file in tmp_path.rglob("*.safetensors"):
        os.truncate(file, 10)
    opened.set_progress_bar_config(disable=True)
    assert opened("a ring", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)
