"""What diffusers' own pipelines take and refuse, ours does: names, defaults and the checks of their ``check_inputs``."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from PIL import Image

from ldm.diffusion.path import RectifiedFlow
from ldm.diffusion.prediction import Velocity
from ldm.diffusion.scheduler import diffusion_config
from ldm.errors import LdmError, UsageError
from ldm.inference.generate import ImageGenerator
from ldm.inference.settings import GenerationSettings
from ldm.models.autoencoder import autoencoder_hash
from ldm.models.text_encoder import text_encoder_hash, unknown_words
from ldm.pipeline import LatentDiffusionPipeline, load_pipeline

PROMPT = "a red circle"
DIFFUSION = diffusion_config(RectifiedFlow(), Velocity())
RECOMMENDED = {"scheduler": "euler", "steps": 2, "guidance": 1.0, "replaces": {"_class_name": "None"}}
NOISE = torch.zeros(1, 4, 8, 8)


@pytest.fixture
def pipeline(make_pipeline, short_words):
    return make_pipeline(words=short_words)


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def latents(pipeline, *arguments, **changes):
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "generator": seeds(0)} | changes
    return pipeline(*arguments, **settings).images


def test_none_is_the_default_of_what_may_be_left_out(pipeline):
    plain = latents(pipeline, PROMPT)
    none = ("negative_prompt", "height", "width", "latents", "image", "mask_image", "strength", "callback_on_step_end")
    embeds = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    assert torch.equal(latents(pipeline, PROMPT, **dict.fromkeys((*none, *embeds))), plain)
    assert torch.equal(latents(pipeline, PROMPT, negative_prompt=""), plain)
    assert latents(pipeline, None, latents=NOISE).shape == (1, 4, 8, 8)
    assert pipeline(PROMPT, num_inference_steps=1, generator=None).images[0].size == (16, 16)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": []}, r"prompt is \[\]; give a text, or a list of one or more"),
        ({"prompt": 3}, "prompt is 3; give a text"),
        ({"prompt": [PROMPT, None]}, "a prompt is None; give a text"),
        ({"prompt": b"a ring"}, "prompt is b'a ring'; give a text"),
        ({"prompt": "a \ud83d ring"}, "holds half a surrogate pair"),
        ({"negative_prompt": []}, r"negative_prompt is \[\]; give a text"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"negative_prompt": 5}, "negative_prompt is 5; give a text"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; give 1 or more"),
        ({"num_images_per_prompt": -1}, "num_images_per_prompt is -1"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt is 1.5"),
        ({"num_inference_steps": 10**15}, "num_inference_steps is 1000000000000000, above the limit of 10,000"),
        ({"guidance_scale": float("nan")}, "scale is nan; give a finite number"),
        ({"guidance_scale": "3"}, "scale is '3'; give a finite number"),
        ({"height": 0}, "an image of 16x0 cannot be generated: give multiples of 4"),
        ({"width": -16}, "an image of -16x16 cannot be generated: give multiples of 4"),
        ({"width": 16.0}, "an image of 16.0x16 cannot be generated"),
        ({"height": 2**40}, "no side may be above 32768 pixels"),
        ({"generator": seeds(0, 1)}, "2 generators for 1 images; give one, or one per image"),
        ({"generator": []}, "0 generators for 1 images"),
        ({"generator": seeds(0), "num_images_per_prompt": 3}, "1 generators for 3 images"),
        ({"generator": seeds(0), "prompt": [PROMPT, "a ring"]}, "1 generators for 2 images"),
        ({"generator": 7}, "generator is a int; give a torch.Generator"),
        ({"generator": [None]}, "generator is a NoneType; give a torch.Generator"),
        ({"latents": NOISE, "height": 32}, r"latents are \(1, 4, 8, 8\), but \(1, 4, 16, 8\) are needed"),
        ({"latents": NOISE, "num_images_per_prompt": 2, "generator": None}, r"but \(2, 4, 8, 8\) are needed"),
        ({"latents": NOISE[:, :3]}, r"latents are \(1, 3, 8, 8\), but \(1, 4, 8, 8\) are needed"),
        ({"latents": NOISE[..., :7]}, "an image of 14x16 cannot be generated"),
        ({"latents": NOISE[0]}, r"latents is a tensor \(4, 8, 8\); give a float tensor \(B, C, h, w\)"),
        ({"latents": NOISE.long()}, "latents is a tensor .*; give a float tensor"),
        ({"latents": NOISE.numpy()}, "latents is a ndarray; give a float tensor"),
        ({"latents": NOISE / 0}, "latents hold values that are not finite"),
        ({"latents": NOISE, "image": Image.new("RGB", (32, 16))}, r"but \(1, 4, 8, 16\) are needed"),
        ({"output_type": None}, "output_type is None; choose from: pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "no tensor 'prompt_embeds' for a callback"),
        ({"prompt_embeds": torch.zeros(1, 3, 32)}, "prompt and prompt_embeds are both given; give one of them"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 32)}, "prompt_embeds need their attention mask; give both"),
        ({"negative_prompt_attention_mask": torch.ones(1, 3)}, "negative_prompt_embeds need their attention mask"),
        ({"image": np.zeros((16, 16, 3), np.uint8)}, "image is a ndarray; give PIL images, or tensors"),
        ({"image": torch.zeros(3, 0, 16)}, "without any pixels"),
        ({"image": Image.new("RGB", (0, 16))}, "without any pixels"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_line(pipeline, changes, why):
    with pytest.raises(UsageError, match=why) as error:
        latents(pipeline, **{"prompt": PROMPT} | changes)
    assert "\n" not in str(error.value)


def test_generators_may_be_a_list_or_a_tuple_of_one_per_image(pipeline):
    both = latents(pipeline, [PROMPT, "a ring"], generator=seeds(0, 1))
    assert torch.equal(latents(pipeline, [PROMPT, "a ring"], generator=tuple(seeds(0, 1))), both)
    torch.testing.assert_close(latents(pipeline, "a ring", generator=seeds(1)), both[1:], rtol=0, atol=1e-4)


def test_given_latents_say_the_size(pipeline):
    noise = torch.randn(1, 4, 4, 12, generator=seeds(0)[0])
    image = pipeline(PROMPT, latents=noise, num_inference_steps=2).images[0]
    assert image.size == (24, 8)
    assert torch.equal(latents(pipeline, PROMPT, height=8, width=24), latents(pipeline, PROMPT, latents=noise))


def test_encoded_prompts_are_those_of_the_prompts(pipeline):
    prompts, negatives = [PROMPT, "a tiny blue star"], ["a ring", ""]
    plain = latents(pipeline, prompts, negative_prompt=negatives, generator=seeds(0, 1))
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    encoded = dict(zip(names, pipeline.encode_prompt(prompts, negatives), strict=True))
    assert torch.equal(latents(pipeline, generator=seeds(0, 1), **encoded), plain)
    given = {name: encoded[name] for name in names[:2]}
    expected = latents(pipeline, prompts, generator=seeds(0, 1))
    assert torch.equal(latents(pipeline, generator=seeds(0, 1), **given), expected)
    with pytest.raises(UsageError, match="3 negative_prompt_embeds for 2 prompts"):
        latents(pipeline, prompts, **dict(zip(names[2:], pipeline.encode_prompt(["a"] * 3)[:2], strict=True)))


def test_a_pipeline_is_made_from_another_s_parts(pipeline):
    again = LatentDiffusionPipeline.from_pipe(pipeline)
    again.set_progress_bar_config(disable=True)
    assert all(again.components[name] is part for name, part in pipeline.components.items())
    assert torch.equal(latents(again, PROMPT), latents(pipeline, PROMPT)) and again.config["diffusion"]


def test_tiling_and_slicing_are_switched_by_diffusers_names(pipeline):
    large = {"height": 32, "width": 32, "output_type": "pt", "generator": seeds(0)}
    plain = pipeline(PROMPT, num_inference_steps=1, **large).images
    pipeline.enable_vae_tiling()
    assert pipeline.vae.use_tiling
    tiled = pipeline(PROMPT, num_inference_steps=1, **large | {"generator": seeds(0)}).images
    assert tiled.shape == plain.shape and 0 < (tiled - plain).abs().mean() < 0.1
    pipeline.disable_vae_tiling()
    pipeline.enable_vae_slicing()
    assert pipeline.vae.use_slicing and not pipeline.vae.use_tiling
    both = {"num_inference_steps": 1, "output_type": "pt"}
    sliced = pipeline([PROMPT, "a ring"], generator=seeds(0, 1), **both).images
    pipeline.disable_vae_slicing()
    torch.testing.assert_close(pipeline([PROMPT, "a ring"], generator=seeds(0, 1), **both).images, sliced, rtol=0, atol=1e-4)


def test_a_pil_image_is_turned_upright_and_so_is_its_mask(pipeline):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert torch.equal(pipeline.encode_images(turned), pipeline.encode_images(upright))
    mask = Image.new("L", (24, 16))
    mask.paste(255, (12, 0, 24, 16))
    turned_mask = mask.transpose(Image.Transpose.ROTATE_90)
    turned_mask.getexif()[0x0112] = 6
    drawn = [
        pipeline(PROMPT, image=image, mask_image=painted, num_inference_steps=2, generator=seeds(0)).images[0]
        for image, painted in ((upright, mask), (turned, turned_mask))
    ]
    assert drawn[1].size == (24, 16) and drawn[0].tobytes() == drawn[1].tobytes()


def test_arrays_are_images_as_the_pipeline_gives_them(pipeline):
    arrays = pipeline([PROMPT, "a ring"], num_inference_steps=1, output_type="np", generator=seeds(0, 1)).images
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    torch.testing.assert_close(pipeline.encode_images(arrays), pipeline.encode_images(tensors))
    torch.testing.assert_close(pipeline.encode_images(arrays[0]), pipeline.encode_images(tensors[0]))
    mask = np.zeros((16, 16), np.float32)
    mask[:, 8:] = 1
    settings = {"image": arrays[0], "num_inference_steps": 1}
    masked = [latents(pipeline, PROMPT, mask_image=each, **settings) for each in (mask, torch.from_numpy(mask))]
    torch.testing.assert_close(*masked)


class Halve(PipelineCallback):
    tensor_inputs = ("latents",)  # pyright: ignore  # diffusers declares a property there, and assigns lists in its own

    def __init__(self):
        super().__init__(cutoff_step_ratio=0.5)

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        return {"latents": callback_kwargs["latents"] / 2} if step_index + 1 == pipeline.num_timesteps else callback_kwargs


def test_diffusers_own_callbacks_work_and_latents_of_another_shape_are_refused(pipeline):
    assert torch.equal(latents(pipeline, PROMPT, callback_on_step_end=Halve()), latents(pipeline, PROMPT) / 2)
    with pytest.raises(UsageError, match=r"the callback returned latents \(1, 4, 8, 4\); give \(1, 4, 8, 8\)"):
        latents(pipeline, PROMPT, callback_on_step_end=lambda *given: {"latents": given[3]["latents"][..., :4]})
    calls = []
    latents(
        pipeline, PROMPT, callback_on_step_end=lambda *given: calls.append(given[3]), callback_on_step_end_tensor_inputs=None
    )
    assert calls == [{}, {}]


def test_words_that_the_tokenizer_does_not_know_are_named_once(pipeline, caplog):
    assert torch.equal(latents(pipeline, "a 🔴 ring"), latents(pipeline, "a 🦊 ring"))  # the same image
    latents(pipeline, "a 🔴 ring \u200b")
    assert [record.getMessage() for record in caplog.records] == [
        f"the text encoder does not know these words: {word!r}" for word in ("🔴", "🦊", "\u200b")
    ]
    assert unknown_words(pipeline.tokenizer, ["a red ring", ""]) == []
    warnings = []
    generator = ImageGenerator(pipeline, warn=warnings.append)
    for _ in range(2):
        generator.check(GenerationSettings("a 🔴 ring"))
    assert warnings == ["the text encoder does not know these words of the prompt 'a 🔴 ring': '🔴'; change them"]
    with pytest.raises(UsageError, match="does not know these words of the prompt 'a 🔴 ring': '🔴'"):
        ImageGenerator(pipeline, strict=True).check(GenerationSettings("a 🔴 ring"))


# -- what is saved and loaded ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(make_pipeline, short_words, tmp_path_factory):
    """The folder of a pipeline that knows what it was trained on, 8 x 4 latents."""
    made, folder = make_pipeline(words=short_words), tmp_path_factory.mktemp("pipeline")
    text = text_encoder_hash(made.tokenizer, made.text_encoder)
    made.register_to_config(
        trained_on={"autoencoder": autoencoder_hash(made.vae), "text_encoder": text, "latent_shape": [4, 4, 8]}
    )
    made.save_pretrained(folder)
    return folder


def test_the_default_size_is_the_one_trained_on(saved):
    loaded = load_pipeline(saved).to("cpu")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.default_size == (8, 16)
    assert loaded(PROMPT, num_inference_steps=1).images[0].size == (16, 8)
    assert loaded(PROMPT, num_inference_steps=1, height=16).images[0].size == (16, 16)


def test_all_sizes_trained_on_are_known_and_one_far_from_them_is_warned_of_once(saved, tmp_path, caplog):
    """Of several the first is the default; a pipeline of before knows one."""
    several = [[4, 4, 8], [4, 8, 4], [4, 6, 6]]
    index = json.loads((saved / INDEX).read_text())
    folder = edited(saved, tmp_path / "several", INDEX, {"trained_on": index["trained_on"] | {"latent_shapes": several}})
    loaded, before = load_pipeline(folder).to("cpu"), load_pipeline(saved).to("cpu")
    assert loaded.trained_sizes == [(8, 16), (16, 8), (12, 12)] and before.trained_sizes == [(8, 16)] == [before.default_size]
    assert loaded.default_size == (8, 16)
    for height, width in ((8, 16), (12, 12), (12, 16), (16, 8), (16, 12)):
        loaded.latent_shape(1, height, width)
    assert not caplog.records
    for pipeline, sizes in ((loaded, ((24, 24), (24, 24), (4, 16))), (before, ((16, 8),))):
        for height, width in sizes:
            pipeline.latent_shape(1, height, width)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        f"{size} is far from the sizes that the model was trained on, the nearest is {nearest}"
        for size, nearest in (("24x24", "12x12"), ("16x4", "16x8"), ("8x16", "16x8"))
    ]


@pytest.mark.parametrize("variant", [None, "fp16", "half"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_copy_in_half_precision_is_known_as_the_same_network(saved, tmp_path, caplog, dtype, variant):
    half = LatentDiffusionPipeline.from_pretrained(saved, dtype=dtype)
    assert half.vae.dtype == half.text_encoder.dtype == dtype
    half.save_pretrained(tmp_path / "half", variant=variant)
    loaded = load_pipeline(tmp_path / "half").to("cpu")
    assert loaded.vae.dtype == loaded.transformer.dtype == loaded.text_encoder.dtype == torch.float32
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["vae/", "text_encoder/"]
    assert "a copy in half precision; images differ slightly" in caplog.text
    loaded.save_pretrained(tmp_path / "again")  # a copy of the copy keeps the record
    load_pipeline(tmp_path / "again")


def test_another_network_in_half_precision_is_refused(saved, make_pipeline, short_words, tmp_path):
    half = LatentDiffusionPipeline.from_pretrained(saved, dtype=torch.float16)
    half.save_pretrained(tmp_path)
    other = make_pipeline(words=short_words, seed=1).vae.half()
    config = (tmp_path / "vae" / "config.json").read_text()
    other.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(config)
    with pytest.raises(UsageError, match=r"vae/ of the pipeline is autoencoder \w+, but its denoiser was trained with"):
        load_pipeline(tmp_path)
    other.float().save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(config)
    with pytest.raises(UsageError, match=r"vae/ of the pipeline is autoencoder"):
        load_pipeline(tmp_path)


def test_half_precision_without_a_record_is_loaded_and_said(saved, tmp_path, caplog):
    LatentDiffusionPipeline.from_pretrained(saved, dtype=torch.float16).save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({key: value for key, value in json.loads(index.read_text()).items() if key != "fingerprints"}))
    load_pipeline(tmp_path)
    assert caplog.text.count("in half precision; of which network it is a copy was not recorded") == 2


def edited(folder, to, name, change):
    """A copy of a pipeline with one file changed: a value merged into its JSON, or the whole text."""
    shutil.copytree(folder, to)
    file = to / name
    content = change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change)
    file.write_text(content)
    return to


DEEP = "[" * 100_000
INDEX, VAE, DENOISER = "model_index.json", "vae/config.json", "transformer/config.json"
SCHEDULER, TEXT, TOKENIZER = "scheduler/scheduler_config.json", "text_encoder/config.json", "tokenizer/tokenizer.json"


@pytest.mark.parametrize(
    "name, change, why",
    [
        (VAE, {"latents_std": [5.0, 6.0, 7.0, 8.0]}, "vae/config.json of the pipeline has latent statistics"),
        (VAE, {"latents_std": ["a"] * 4}, ""),
        (VAE, {"latents_std": 5}, ""),
        (VAE, {"latents_std": [0.0] * 4}, "standard deviation of 0"),
        (VAE, {"scaling_factor": "x", "latents_std": None}, ""),
        (VAE, {"layers_per_block": 10**6}, "vae/config.json: layers_per_block is 1000000, above the limit of 1,000"),
        (VAE, {"block_out_channels": "many"}, ""),
        (VAE, {"latent_channels": None}, ""),
        (DENOISER, {"num_layers": 10**6}, "transformer/config.json: num_layers is 1000000, above the limit of 1,000"),
        (DENOISER, {"num_layers": -1}, "num_layers"),
        (DENOISER, {"num_layers": 1}, "num_layers in transformer/config.json of the pipeline is 1, but it was saved with 2"),
        (DENOISER, {"positions": "rope"}, "positions in transformer/config.json of the pipeline is 'rope'"),
        (DENOISER, {"num_layers": "2"}, "num_layers"),
        (DENOISER, {"patch_size": 0}, "patch_size"),
        (DENOISER, {"width": None}, "width"),
        (DENOISER, {"num_attention_heads": 0}, "num_attention_heads"),
        (DENOISER, {"num_attention_heads": 3}, "num_attention_heads"),
        (DENOISER, {"mlp_ratio": float("nan")}, "mlp_ratio"),
        (DENOISER, {"norm": "none"}, "norm"),
        (DENOISER, {"positions": 3}, "positions"),
        (DENOISER, {"adaln": "two"}, "adaln"),
        (DENOISER, "null", "transformer/config.json is no JSON object"),
        (DENOISER, DEEP, "transformer/config.json is not readable JSON"),
        (DENOISER, '{"width": ' + "9" * 5000 + "}", "transformer/config.json is not readable JSON"),
        (SCHEDULER, "[]", "scheduler_config.json is no JSON object"),
        (SCHEDULER, {"shift": "a"}, ""),
        (SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000, above the limit of 100,000"),
        (TEXT, {"num_hidden_layers": 10**7}, "text_encoder/config.json: num_hidden_layers is 10000000, above the limit"),
        (TEXT, {"hidden_size": "wide"}, ""),
        (TEXT, "{}", ""),
        (TOKENIZER, "{}", ""),
        (TOKENIZER, DEEP, ""),
        (INDEX, "null", "model_index.json: "),
        (INDEX, DEEP, "model_index.json"),
        (INDEX, {"_class_name": 3}, "model_index.json: _class_name: "),
        (INDEX, {"vae": 3}, "model_index.json: vae: "),
        (INDEX, {"vae": ["diffusers"]}, "model_index.json: vae: "),
        (INDEX, {"vae": ["diffusers", "Nothing"]}, ""),
        (INDEX, {"transformer": ["nowhere.at_all", "DiT"]}, ""),
        (INDEX, {"trained_on": []}, "model_index.json: trained_on: "),
        (INDEX, {"trained_on": {"latent_shape": [4, 0, 8]}}, r"model_index.json: trained_on.latent_shape.1: "),
        (INDEX, {"trained_on": {"latent_shape": [4, 8]}}, r"model_index.json: trained_on.latent_shape: "),
        (INDEX, {"trained_on": {"latent_shapes": [[4, 8]]}}, r"model_index.json: trained_on.latent_shapes.0: "),
        (INDEX, {"trained_on": {"autoencoder": 5}}, r"model_index.json: trained_on.autoencoder: "),
        (INDEX, {"fingerprints": {"autoencoder": "x"}}, r"model_index.json: fingerprints.autoencoder: "),
        (INDEX, {"diffusion": {"path": 3}}, "model_index.json: diffusion.path: "),
        (INDEX, {"diffusion": DIFFUSION | {"resolution_shift": {"side": 3}}}, "resolution_shift of model_index.json is"),
        (INDEX, {"diffusion": DIFFUSION | {"resolution_shift": {"shift": 0}}}, "ResolutionShift: shift is 0"),
        (INDEX, {"diffusion": {"path": {"class_path": 3, "init_args": {}}, "prediction": {}}}, "diffusion of model_index.json"),
        (INDEX, {"recommended": RECOMMENDED | {"steps": 0}}, "model_index.json: recommended.steps: "),
        (INDEX, {"recommended": RECOMMENDED | {"scheduler": "x"}}, "no sampler 'x' for "),
        (INDEX, {"recommended": RECOMMENDED}, "the scheduler 'None' is none of: DDIMScheduler, "),
        (INDEX, {"format_version": "new"}, "model_index.json: the pipeline has format version 'new'"),
    ],
)
def test_a_damaged_file_of_a_pipeline_is_one_line(saved, tmp_path, name, change, why):
    with pytest.raises(LdmError, match=why) as error:
        load_pipeline(edited(saved, tmp_path / "damaged", name, change))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_pipe_among_the_files_is_named_and_not_waited_for(saved, tmp_path):
    import os

    shutil.copytree(saved, tmp_path / "piped")
    os.mkfifo(tmp_path / "piped" / "vae" / "pipe.safetensors")
    with pytest.raises(UsageError, match=r"pipe.safetensors is no regular file, or a broken link; restore it"):
        load_pipeline(tmp_path / "piped")


def test_an_image_that_is_not_finite_is_an_error_and_no_black_one(pipeline):
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(LdmError, match="the autoencoder gives values that are not finite; put back"):
        pipeline(PROMPT, num_inference_steps=1)
    with pytest.raises(LdmError, match="the autoencoder gives values that are not finite; put back"):
        pipeline.to(torch.float16)(PROMPT, num_inference_steps=1)


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_an_autoencoder_that_overflows_in_half_precision_is_used_in_float32_and_says_so(pipeline, caplog, direction):
    """As SDXL's does in fp16: its activations are beyond 65,504, before a norm makes them small again."""
    vae = pipeline.vae
    with torch.no_grad():
        for convolution in (vae.post_quant_conv, vae.encoder.conv_in):
            convolution.weight.mul_(6e4 / convolution.weight.abs().max())
            convolution.bias.zero_()
    latents, image = torch.randn(1, 4, 8, 8, generator=seeds(0)[0]), Image.effect_noise((16, 16), 255).convert("RGB")

    def compute():
        return pipeline.decode(latents, "pt") if direction == "decode" else pipeline.encode_images(image)

    expected = compute()
    torch.nn.Module.to(vae, torch.float16)
    for _ in range(2):
        torch.testing.assert_close(compute(), expected, rtol=0.02, atol=0.02)
    assert vae.dtype == torch.float32
    assert caplog.messages == ["the autoencoder overflows in float16 and is used in float32 from now on"]
