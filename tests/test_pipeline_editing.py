"""Images from images, and the pipeline in the hands of one who knows diffusers."""

import json
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from ldm.cli import dispatch
from ldm.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import Preconditioned, V, Velocity
from ldm.errors import UsageError
from ldm.files import sha256_file
from ldm.models.autoencoder import reconstruct
from ldm.models.image_processor import PreparedImages, feathered, filled
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import LatentDiffusionPipeline, read_image

PROMPT = "a red circle"
QUICK = {"num_inference_steps": 5, "guidance_scale": 2.0}
DIFFUSIONS = {
    "flow": (RectifiedFlow(), Velocity(), "euler"),
    "preserving": (VariancePreserving(), V(), "ddim"),
    "exploding": (VarianceExploding(), Preconditioned(), "euler"),
}


@pytest.fixture
def kind():
    """Of the diffusion; tests are parametrised with others."""
    return "flow"


@pytest.fixture
def pipeline(kind, make_pipeline, minilm):
    words = TextEncoder(minilm.tokenizer, deepcopy(minilm.model), minilm.name)  # here it is halved and moved
    return make_pipeline(*DIFFUSIONS[kind], words)


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def make_image(width=16, height=16, seed=0):
    """Noise: no pixel is like its neighbour."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def half_mask(width=16, height=16, left=8):
    mask = Image.new("L", (width, height))
    mask.paste(255, (left, 0, width, height))
    return mask


def pixels(images):
    return np.stack([np.asarray(each).astype(int) for each in images])


def draw(pipeline, prompt: str | list[str] = PROMPT, **changes: Any):
    return pixels(pipeline(prompt, **QUICK | {"generator": seeds(0)} | changes).images)


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_strength_leads_from_the_image_to_what_the_words_alone_would_draw(kind, pipeline):
    plain, image = pipeline(PROMPT, output_type="latent", generator=seeds(0), **QUICK).images, make_image()
    start = pipeline.encode_images(image)
    settings = {"image": image, "output_type": "latent"} | QUICK
    drawn = {s: pipeline(PROMPT, strength=s, generator=seeds(0), **settings).images for s in (0.2, 0.6, 1.0)}
    assert torch.equal(drawn[1.0], plain)
    assert (drawn[0.2] - start).norm() < (drawn[1.0] - start).norm()
    assert torch.equal(pipeline(PROMPT, generator=seeds(0), **settings).images, drawn[0.6])


def test_the_image_enters_by_the_mode_of_its_posterior(pipeline):
    image = make_image()
    latents = pipeline.encode_images(image)
    assert torch.equal(latents, pipeline.encode_images(image)) and latents.shape == (1, 4, 8, 8)
    expected = reconstruct(pipeline.vae, PreparedImages.of(image, None, None, None, 4).images)
    torch.testing.assert_close(pipeline.decode(latents, "pt"), (expected + 1) / 2)


def test_an_image_a_tensor_and_a_list_are_the_same_and_each_is_drawn_by_itself(pipeline):
    images = [make_image(seed=1), make_image(seed=2)]
    tensors = torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) / 255 for each in images])
    together = draw(pipeline, [PROMPT, "a ring"], image=images, generator=seeds(0, 1))
    assert np.abs(draw(pipeline, [PROMPT, "a ring"], image=tensors, generator=seeds(0, 1)) - together).max() <= 1
    for row, prompt in enumerate([PROMPT, "a ring"]):
        assert np.abs(draw(pipeline, prompt, image=tensors[row], generator=seeds(row))[0] - together[row]).max() <= 1
    # one prompt for several images, several prompts for one image
    assert len(draw(pipeline, image=images, generator=seeds(0, 1))) == 2
    assert len(draw(pipeline, [PROMPT, "a ring", "a star"], image=images[0], generator=seeds(0, 1, 2))) == 3
    many = draw(pipeline, "", image=images, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3))
    assert np.abs(draw(pipeline, "", image=images[1], generator=seeds(2))[0] - many[2]).max() <= 1
    assert np.abs(many[0] - many[1]).max() > 2  # variations


@pytest.mark.parametrize("kind", DIFFUSIONS)
@pytest.mark.parametrize("strength", [None, 0.5])
def test_what_is_not_masked_stays_pixel_for_pixel_beyond_the_band(kind, strength, pipeline):
    image = make_image()
    drawn = draw(pipeline, image=image, mask_image=half_mask(), strength=strength)[0]
    changed = (drawn != np.asarray(image)).any(2)
    band = pipeline.vae_scale_factor
    assert not changed[:, : 8 - band].any() and changed[:, 8:].mean() > 0.9
    everything = draw(pipeline, image=image, mask_image=Image.new("L", (16, 16), 255))
    assert np.abs(everything - draw(pipeline)).max() <= 1  # the mask is the whole image: it is text-to-image


def test_the_mask_falls_off_evenly_over_the_band():
    mask = torch.zeros(1, 1, 1, 9)
    mask[..., 6:] = 1
    assert feathered(mask, 3)[0, 0, 0].tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert torch.equal(feathered(mask, 0), mask)


def test_transparency_is_redrawn_and_the_rest_kept(pipeline):
    """Outpainting: the image lies on a larger, transparent canvas."""
    image, canvas = make_image(), Image.new("RGBA", (24, 16))
    canvas.paste(image, (0, 0))
    drawn = draw(pipeline, image=canvas)[0]
    assert drawn.shape == (16, 24, 3)
    assert np.array_equal(drawn[:, : 16 - pipeline.vae_scale_factor], np.asarray(image)[:, : 16 - pipeline.vae_scale_factor])
    assert (drawn[:, 16:] != 0).any()
    # what colour lies under the transparency is nobody's business
    other = Image.new("RGBA", (24, 16), (255, 0, 255, 0))
    other.paste(image, (0, 0))
    assert np.array_equal(draw(pipeline, image=other)[0], drawn)


def test_a_hole_is_filled_from_around_it():
    images, known = torch.zeros(1, 3, 7, 9), torch.ones(1, 1, 7, 9)
    images[..., :4], known[..., 2:6] = 1.0, 0.0
    images[..., 2:6] = 77.0
    full = filled(images, known)
    assert torch.equal(full[..., :2], images[..., :2]) and torch.equal(full[..., 6:], images[..., 6:])
    assert full.min() >= 0 and full.max() <= 1 and full[0, 0, 3, 2] > full[0, 0, 3, 5]
    assert not filled(torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)).any()


@pytest.mark.parametrize("size", [(16, 16), (18, 15), (9, 13)])
def test_an_image_of_any_size_comes_back_at_its_own(pipeline, size):
    image = make_image(*size)
    mask = half_mask(*size, left=size[0] - 2)
    drawn = draw(pipeline, image=image, mask_image=mask)[0]
    assert drawn.shape == (size[1], size[0], 3)
    assert np.array_equal(drawn[:, : size[0] - 4], np.asarray(image)[:, : size[0] - 4])
    assert draw(pipeline, image=image).shape == (1, size[1], size[0], 3)
    assert draw(pipeline, image=image, height=12, width=20).shape == (1, 12, 20, 3)


def test_an_image_is_scaled_to_fill_the_size_asked_for_and_cut_at_the_centre():
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (16, 0, 48, 32))
    prepared = PreparedImages.of(image, None, 16, 16, 4)
    assert prepared.images.shape == (1, 3, 16, 16) and (prepared.images[:, 2, :, 1:-1] > 0.9).all()
    assert prepared.finish(prepared.images, 2).shape == (1, 3, 16, 16)


def mask_of(image, height=None, width=None):
    mask = PreparedImages.of(make_image(*image.size), image, height, width, 4).mask
    assert mask is not None
    return mask


def test_a_line_of_one_pixel_stays_in_the_mask_at_any_size():
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 33, 64, 34))
    small = mask_of(mask, width=16, height=16)
    assert small[0, 0, 8].all() and not small[0, 0, :8].any() and not small[0, 0, 9:].any()
    large = mask_of(mask, width=256, height=256)
    assert large[0, 0, 132:136].all() and not large[0, 0, :132].any()


def test_transparency_of_a_mask_is_black_and_black_paint_on_it_is_no_white():
    white, black = (Image.new("RGBA", (16, 16), (0, 0, 0, 0)) for _ in range(2))
    white.paste((255, 255, 255, 255), (8, 0, 16, 16))
    black.paste((0, 0, 0, 255), (8, 0, 16, 16))
    under = Image.new("RGBA", (16, 16), (255, 255, 255, 0))  # white that nobody sees
    under.paste((255, 255, 255, 255), (8, 0, 16, 16))
    for mask in (white, under, white.convert("LA"), white.convert("PA"), half_mask().convert("1"), half_mask().convert("RGB")):
        assert torch.equal(mask_of(mask), mask_of(half_mask()))
    for mask in (black, Image.new("RGBA", (16, 16), (255, 255, 255, 0))):
        with pytest.raises(UsageError, match=r"mask_image has no white.*transparent parts of a mask count as black"):
            mask_of(mask)


def test_sixteen_bits_are_scaled_in_masks_and_images():
    values = np.zeros((16, 16), np.uint16)
    values[:, :4], values[:, 8:] = 300, 40000  # dark grey, and light grey
    deep = Image.fromarray(values)
    assert torch.equal(mask_of(deep), mask_of(half_mask()))
    grey = Image.fromarray((values / 257).round().astype(np.uint8))
    expected = PreparedImages.of(grey, None, None, None, 4)
    found = PreparedImages.of(deep, None, None, None, 4)
    assert found.mask is None and torch.equal(found.images, expected.images)
    deep.info["transparency"] = 40000
    with pytest.raises(UsageError, match="no white"):
        mask_of(deep)
    found = PreparedImages.of(deep, None, None, None, 4).mask
    assert found is not None and torch.equal(found, mask_of(half_mask()))
    with pytest.raises(UsageError, match="mask_image is a PIL image of mode F"):
        mask_of(Image.new("F", (16, 16)))


def test_where_nothing_is_left_to_regenerate_is_an_error(pipeline):
    """Cropping, and one image of several: nothing left is not nothing asked."""
    mask, wide = Image.new("L", (64, 16)), Image.new("RGBA", (64, 16), (0, 0, 0, 255))
    mask.paste(255, (0, 0, 8, 16))
    wide.paste((0, 0, 0, 0), (0, 0, 8, 16))
    cropped: list[dict[str, Any]] = [{"image": make_image(64, 16), "mask_image": mask}, {"image": wide}]
    for changes in cropped:
        with pytest.raises(UsageError, match=r"the image has no white .* within its 16x16 pixels"):
            draw(pipeline, height=16, width=16, **changes)
    clear = make_image().convert("RGBA")
    clear.putalpha(half_mask())
    second: list[dict[str, Any]] = [
        {"image": [clear, make_image()]},
        {"image": [make_image()] * 2, "mask_image": [half_mask(), half_mask(left=16)]},
    ]
    for changes in second:
        with pytest.raises(UsageError, match="image 2 of 2 has no white"):
            draw(pipeline, **changes)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"image": "a.png"}, r"image is a str; give PIL images, or tensors"),
        ({"image": []}, r"image holds images of no size at all"),
        ({"image": [make_image(), make_image(12, 16)]}, r"image holds images of 16x16, 12x16; give .* all of one size"),
        ({"image": torch.zeros(16, 16)}, r"image is a tensor \(16, 16\) of torch.float32; give floats \(3, H, W\)"),
        ({"image": torch.zeros(3, 16, 16, dtype=torch.uint8)}, r"of torch.uint8; give floats"),
        ({"image": torch.full((3, 16, 16), 2.0)}, r"image has values from 2 to 2; give them in \[0, 1\]"),
        ({"image": torch.full((3, 16, 16), float("nan"))}, r"image has values from nan to nan"),
        ({"image": make_image(100, 16)}, r"image is 100x16, but the model was trained on 16x16; give height and width"),
        ({"image": make_image(), "width": 18}, r"an image of 18x16 cannot be generated: give multiples of 4"),
        ({"image": make_image(), "strength": 0.0}, r"strength is 0; give a number above 0"),
        ({"image": make_image(), "strength": 1.5}, r"strength is 1.5; give a number above 0"),
        ({"image": make_image(), "strength": 0.1}, r"strength 0.1 of 5 steps leaves none; give a strength of 0.2"),
        ({"strength": 0.5}, r"strength and mask_image are of an image; give image, too"),
        ({"mask_image": half_mask()}, r"strength and mask_image are of an image; give image, too"),
        ({"image": make_image(), "mask_image": half_mask(20, 16)}, r"mask_image is 20x16, but the image 16x16; give a mask of"),
        ({"image": make_image(), "mask_image": Image.new("L", (16, 16))}, r"mask_image has no white, so nothing would be"),
        ({"image": make_image(), "mask_image": "white"}, r"mask_image is a str; give a PIL image"),
        ({"image": make_image(), "mask_image": [half_mask()] * 2}, r"2 masks for 1 images; give one, or one per image"),
        ({"prompt": ["a", "b"], "image": [make_image()] * 3}, r"3 images for 2 prompts; give one, or one per prompt"),
        ({"prompt": ""}, r"the prompt is empty"),
        ({"output_type": "jpg"}, r"output_type is 'jpg'; choose from: pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise_pred"]}, r"no tensor 'noise_pred' .* choose from: latents, pred_"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(pipeline, changes, why):
    with pytest.raises(UsageError, match=why) as error:
        draw(pipeline, **changes)
    assert "\n" not in str(error.value)


def test_an_image_file_keeps_its_transparency_and_one_that_is_none_is_named(tmp_path):
    image = make_image().convert("RGBA")
    image.putalpha(half_mask())
    image.save(tmp_path / "clear.png")
    found = read_image(tmp_path / "clear.png")
    assert found.mode == "RGBA" and np.array_equal(np.asarray(found.getchannel("A")), np.asarray(half_mask()))
    make_image().save(tmp_path / "plain.png")
    assert read_image(tmp_path / "plain.png").tobytes() == make_image().tobytes()
    (tmp_path / "words.png").write_text("words")
    for name, why in (("words.png", "not a JPEG, PNG or WebP image"), ("none.png", r"cannot be read \(No such file")):
        with pytest.raises(UsageError, match=f"{name}.*{why}.*; give a JPEG, PNG or WebP image"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_an_inverted_image_is_drawn_again(kind, pipeline):
    images, prompts = [make_image(seed=1), make_image(seed=2)], [PROMPT, "a ring"]
    noise = pipeline.invert(images, prompts, num_inference_steps=15)
    assert noise.shape == (2, 4, 8, 8) and noise.dtype == torch.float32
    settings = {"num_inference_steps": 15, "guidance_scale": 1.0, "output_type": "pt"}
    again = pipeline(prompts, latents=noise, **settings).images
    expected = pipeline.decode(pipeline.encode_images(images), "pt")
    assert -10 * (again - expected).square().mean().log10() > 25
    torch.testing.assert_close(pipeline.invert(images[1], "a ring", num_inference_steps=15)[0], noise[1], rtol=0, atol=1e-3)
    silent = pipeline.invert(images[0], num_inference_steps=15)
    assert -10 * (pipeline("", latents=silent, **settings).images - expected[:1]).square().mean().log10() > 25


def test_a_callback_has_diffusers_contract(pipeline):
    seen = []

    def look(pipe, step, timestep, tensors):
        assert pipe is pipeline and pipe.num_timesteps == 5
        seen.append((step, set(tensors), tensors["pred_original_sample"]))
        if step == 2:
            pipe._interrupt = True

    names = ["latents", "pred_original_sample"]
    asked = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names, "output_type": "latent"}
    stopped = pipeline(PROMPT, generator=seeds(0), **QUICK | asked).images
    assert [step for step, _, _ in seen] == [0, 1, 2] and all(given == set(names) for _, given, _ in seen)
    assert pipeline.interrupt and seen[0][2].shape == (1, 4, 8, 8)
    assert pipeline.decode(seen[0][2])[0].size == (16, 16)
    asked["callback_on_step_end"] = lambda pipe, step, timestep, tensors: seen.append(tensors["pred_original_sample"])
    whole = pipeline(PROMPT, generator=seeds(0), **QUICK | asked).images
    assert not pipeline.interrupt and not torch.equal(whole, stopped)
    torch.testing.assert_close(seen[-1], whole, rtol=1e-4, atol=1e-4)  # the last step of Euler's leads to the denoiser's x0


@pytest.mark.parametrize(
    "kind, scheduler, options",
    [
        ("flow", FlowMatchHeunDiscreteScheduler, {}),
        ("flow", LTXEulerAncestralRFScheduler, {}),
        ("flow", FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
        ("flow", UniPCMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("preserving", EulerDiscreteScheduler, {}),
        ("preserving", EulerAncestralDiscreteScheduler, {}),
        ("preserving", HeunDiscreteScheduler, {}),
        ("preserving", DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        ("preserving", UniPCMultistepScheduler, {}),
        ("exploding", EDMDPMSolverMultistepScheduler, {}),
    ],
)
def test_a_scheduler_is_swapped_as_in_diffusers(kind, scheduler, options, pipeline):
    plain = draw(pipeline)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    assert np.abs(draw(pipeline) - plain).max() > 0
    assert draw(pipeline, image=make_image(), mask_image=half_mask(), strength=0.5).std() > 10


def test_networks_in_bf16_draw_nearly_the_same_and_the_state_stays_float32(pipeline, tmp_path):
    changes: dict[str, Any] = {"image": make_image(), "mask_image": half_mask(), "strength": 0.6, "output_type": "pt"}
    changes["generator"] = seeds(0)
    pipeline.save_pretrained(tmp_path)
    exact, plain = (
        pipeline(PROMPT, **QUICK | changes).images,
        pipeline(PROMPT, generator=seeds(0), output_type="pt", **QUICK).images,
    )
    half = LatentDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    parts = {name: getattr(half, name).dtype for name in ("vae", "transformer", "text_encoder")}
    assert set(parts.values()) == {torch.bfloat16}
    seen = []
    drawn = half(
        PROMPT,
        generator=seeds(0),
        output_type="pt",
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(tensors["latents"].dtype),
        **QUICK,
    ).images
    assert set(seen) == {torch.float32} and drawn.dtype == torch.float32
    # eight bits of precision in every product
    assert 0 < (drawn - plain).abs().mean() < 0.02
    found = half(PROMPT, **dict[str, Any](QUICK | changes | {"generator": seeds(0)})).images
    assert (found - exact).abs().mean() < 0.02
    moved = pipeline.to(torch.bfloat16)
    assert torch.equal(moved(PROMPT, generator=seeds(0), output_type="pt", **QUICK).images, drawn)
    assert half.invert(make_image(), PROMPT, num_inference_steps=2).dtype == torch.float32


def test_the_parts_are_called_in_the_order_in_which_offloading_moves_them(pipeline, monkeypatch):
    """Through ``forward``, ``vae.encode`` and ``vae.decode`` alone, which is where accelerate's hooks stand."""
    calls = []
    for name in ("text_encoder", "transformer"):
        getattr(pipeline, name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    for name in ("encode", "decode"):
        method = getattr(pipeline.vae, name)
        monkeypatch.setattr(pipeline.vae, name, lambda *a, m=method, name=name, **k: calls.append(f"vae.{name}") or m(*a, **k))
    freed = []
    monkeypatch.setattr(pipeline, "maybe_free_model_hooks", lambda: freed.append(len(calls)))
    draw(pipeline, image=make_image())
    assert [*dict.fromkeys(calls)] == ["text_encoder", "vae.encode", "transformer", "vae.decode"] and freed == [len(calls)]
    assert calls.index("transformer") > max(n for n, name in enumerate(calls) if name == "text_encoder")


def test_offloaded_parts_draw_the_same(pipeline):
    pytest.importorskip("accelerate")
    plain = draw(pipeline, image=make_image())
    pipeline.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(draw(pipeline, image=make_image()), plain)


def invert(arguments):
    dispatch(["invert", *map(str, arguments)])


def test_the_command_writes_noise_reconstruction_and_images(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "model")
    make_image(18, 13).save(tmp_path / "given.png")
    arguments = [tmp_path / "model", tmp_path / "given.png", PROMPT, "--steps", 5, "--out"]
    invert([*arguments, tmp_path / "out", "--edit", "a ring", "--edit", "a blue star"])
    names = {"noise.safetensors", "reconstruction.png", "redrawn.png", "edit-1.png", "edit-2.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert Image.open(tmp_path / "out" / "edit-2.png").size == (18, 13)
    for path in (tmp_path / "out").glob("*.png"):
        info = Image.open(path).info
        assert "trainedAlgorithmicMedia" in info["XML:com.adobe.xmp"] and str(tmp_path) not in info["ldm"]
        (stored,) = json.loads(info["ldm"])["settings"]
        assert stored["image"] == f"sha256:{sha256_file(tmp_path / 'given.png')}" and stored["steps"] == 5
        edits = {"edit-1.png": "a ring", "edit-2.png": "a blue star"}
        assert stored["prompt"] == edits.get(path.name, PROMPT)
    printed = capsys.readouterr().out
    assert "redrawn.png: " in printed and " dB from the reconstruction" in printed
    with pytest.raises(UsageError, match="already holds other work"):
        invert([*arguments, tmp_path / "out"])
    with pytest.raises(UsageError, match=r"model_index.json: not a JPEG, PNG or WebP image \(but JSON\)"):
        invert([tmp_path / "model", tmp_path / "model" / "model_index.json", "--out", tmp_path / "new"])
    assert not (tmp_path / "new").exists()
