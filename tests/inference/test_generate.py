import dataclasses
import json
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.diffusion.path import RectifiedFlow, VariancePreserving
from ldm.diffusion.prediction import V, Velocity
from ldm.diffusion.scheduler import diffusion_config
from ldm.errors import LdmError, UsageError
from ldm.inference.generate import ImageGenerator, batch_key, open_pipeline, scheduler_for
from ldm.inference.settings import GenerationSettings

WORDS = ["a red circle", "a tiny blue star at the top left of a dark green background", "a ring"]


@pytest.fixture
def make(make_pipeline, short_words):
    return partial(make_pipeline, words=short_words)


@pytest.fixture
def pipeline(make):
    return make()


@pytest.fixture
def saved(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def pixels(image):
    return np.asarray(image).astype(int)


def drawn(pipeline, settings, **changes):
    """Images in the order of their settings."""
    found = sorted(ImageGenerator(pipeline).generate(settings, **changes), key=lambda one: one[0])
    assert [number for number, *_ in found] == list(range(len(settings)))
    assert [given for _, given, *_ in found] == list(settings)
    return [pixels(image) for _, _, image, _ in found]


def difference(first, second):
    return np.abs(first - second).max()


@pytest.mark.parametrize(
    "diffusion, name",
    [
        ((RectifiedFlow(), Velocity()), None),
        ((RectifiedFlow(), Velocity()), "euler-ancestral"),
        ((VariancePreserving(), V()), "ddpm"),
    ],
)
def test_an_image_is_the_same_alone_and_in_a_batch_of_eight(make, diffusion, name):
    pipeline = make(*diffusion)
    settings = [
        GenerationSettings(WORDS[i % 3], seed=i, steps=6, scheduler=name, negative="blur" if i % 2 else "") for i in range(8)
    ]
    together = drawn(pipeline, settings, batch_size=8)
    for first, second in pairwise(together):
        assert difference(first, second) > 10
    for one, there in zip(settings, together, strict=True):
        (alone,) = drawn(pipeline, [one])
        assert difference(alone, there) <= 1
    (again,) = drawn(pipeline, settings[:1])
    assert np.array_equal(again, drawn(pipeline, settings[:1])[0])


def test_unlike_images_are_drawn_apart_and_each_as_its_settings_say(pipeline):
    base = GenerationSettings("a ring", steps=3)
    changes = [{}, {"steps": 4}, {"width": 32}, {"guidance": 1.0}, {"scheduler": "heun"}, {"guidance_rule": "apg"}, {"seed": 1}]
    settings = [dataclasses.replace(base, **change) for change in changes] * 2
    images = drawn(pipeline, settings, batch_size=4)
    assert images[2].shape == (16, 32, 3)
    for first, second in zip(images[:7], images[7:], strict=True):
        assert difference(first, second) <= 1
    for changed in (1, 3, 4, 5, 6):
        assert difference(images[0], images[changed]) > 1
    own = pipeline(base.prompt, num_inference_steps=3, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)).images[0]
    assert difference(pixels(own), images[0]) <= 1


def test_no_more_than_a_batch_is_held_or_drawn_ahead(pipeline):
    batches = []
    pipeline.transformer.register_forward_hook(lambda *_: batches.append(1))
    images = ImageGenerator(pipeline).generate(
        [GenerationSettings("a ring", seed=seed, steps=1) for seed in range(1000)], batch_size=2
    )
    for _ in range(3):
        next(images)
    assert len(batches) == 2


def test_the_scheduler_of_the_pipeline_stays_its_own(pipeline):
    own = pipeline.scheduler
    drawn(pipeline, [GenerationSettings("a ring", steps=2, scheduler="heun")])
    assert pipeline.scheduler is own and scheduler_for(pipeline, GenerationSettings("a ring")) is own
    with pytest.raises(UsageError, match="no sampler 'ddim'"):
        drawn(pipeline, [GenerationSettings("a ring", scheduler="ddim", eta=0.3)])
    assert pipeline.scheduler is own


def test_eta_reaches_ddim(make):
    pipeline = make(VariancePreserving(), V())
    still, eta, noisy = drawn(
        pipeline, [GenerationSettings("a ring", steps=4, scheduler="ddim", eta=eta) for eta in (None, 0.0, 1.0)]
    )
    assert np.array_equal(still, eta) and difference(still, noisy) > 1


def test_a_long_prompt_is_drawn_as_far_as_it_is_seen(pipeline):
    seen = " ".join(["ring"] * 22)
    long, cut = drawn(pipeline, [GenerationSettings(seen + " and a star", steps=2), GenerationSettings(seen, steps=2)])
    assert np.array_equal(long, cut)


def test_previews_are_what_the_denoiser_takes_the_image_for(pipeline):
    steps = []
    settings = [GenerationSettings(WORDS[seed % 3], seed=seed, steps=6) for seed in range(6)]
    images = drawn(pipeline, settings, batch_size=6, on_step=steps.append, preview_every=2)
    assert [(step.done, step.total, len(step.previews)) for step in steps] == [(n, 6, 0 if n % 2 else 4) for n in range(1, 7)]
    assert steps[0].settings == settings
    # the last call leads to the image itself
    for guess, image in zip(steps[-1].previews, images, strict=False):
        assert difference(pixels(guess), image) <= 1
    assert difference(pixels(steps[1].previews[0]), images[0]) > 1


def test_what_is_raised_while_drawing_ends_it(pipeline):
    def stop(step):
        raise KeyboardInterrupt

    own = pipeline.scheduler
    with pytest.raises(KeyboardInterrupt):
        drawn(pipeline, [GenerationSettings("a ring", steps=2, scheduler="heun")], on_step=stop)
    assert pipeline.scheduler is own


def test_autoguidance_by_itself_is_no_guidance(pipeline, saved):
    guided, plain = drawn(
        pipeline, [GenerationSettings("a ring", steps=3, weak=str(saved)), GenerationSettings("a ring", steps=3, guidance=1.0)]
    )
    assert difference(guided, plain) <= 1
    index = saved / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"diffusion": diffusion_config(VariancePreserving(), V())}))
    with pytest.raises(UsageError, match=r"weak .*pipeline was trained with another path; give an earlier checkpoint"):
        ImageGenerator(pipeline).check(GenerationSettings("a ring", weak=str(saved)))


def test_a_weak_model_of_another_kind_is_refused(pipeline, make, tmp_path):
    with pytest.raises(UsageError, match=r"weak .* is not a pipeline directory"):
        ImageGenerator(pipeline).check(GenerationSettings("a ring", weak=str(tmp_path)))
    make(sample_size=4).save_pretrained(tmp_path / "small")
    with pytest.raises(UsageError, match=r"weak .*small was trained with another sample_size"):
        ImageGenerator(pipeline).check(GenerationSettings("a ring", weak=str(tmp_path / "small")))


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"scheduler": "magic"}, r"no sampler 'magic' for .*; choose one of: euler, euler-ancestral, heun, "),
        ({"scheduler": "ddim"}, "no sampler 'ddim'"),
        ({"width": 15}, "an image of 15x16 cannot be generated: give multiples of 4 pixels"),
        ({"image": "gone.png"}, "gone.png cannot be read"),
        ({"image": "words.png"}, r"words.png: .*; give a JPEG, PNG or WebP"),
        ({"image": "image.png", "mask": "mask.png"}, "mask"),
        ({"image": "image.png", "strength": 0.01, "steps": 10}, "strength 0.01 of 10 steps leaves none"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_drawing(pipeline, tmp_path, monkeypatch, changes, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.png").write_text("no image")
    Image.new("RGB", (16, 16), "red").save("image.png")
    Image.new("L", (12, 16), 255).save("mask.png")
    with pytest.raises(UsageError, match=why) as error:
        ImageGenerator(pipeline).check(GenerationSettings("a ring", **changes))
    assert "\n" not in str(error.value)


def test_an_image_to_start_from_and_a_mask_reach_the_pipeline(pipeline, tmp_path):
    given = Image.effect_noise((16, 16), 90).convert("RGB")
    given.save(tmp_path / "image.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (8, 0, 16, 16))
    mask.save(tmp_path / "mask.png")
    image = str(tmp_path / "image.png")
    base = GenerationSettings("a ring", steps=4, image=image)
    some = [dataclasses.replace(base, strength=0.5), dataclasses.replace(base, strength=0.5, seed=1)]
    inside = dataclasses.replace(base, mask=str(tmp_path / "mask.png"))
    near, other, inpainted = drawn(pipeline, [*some, inside], batch_size=2)
    assert difference(near, other) > 1 and difference(near, drawn(pipeline, some[:1])[0]) <= 1
    assert np.array_equal(inpainted[:, :4], pixels(given)[:, :4]) and difference(inpainted[:, 8:], pixels(given)[:, 8:]) > 1
    variation = dataclasses.replace(base, prompt="", strength=0.5)
    assert difference(drawn(pipeline, [variation])[0], near) > 0


def test_the_batch_key_is_all_but_prompts_and_seed():
    base = GenerationSettings("a ring", negative="blur", seed=3, steps=4)
    assert batch_key(base) == batch_key(dataclasses.replace(base, prompt="a star", negative="", seed=9))
    assert batch_key(base) != batch_key(dataclasses.replace(base, steps=5))


def test_a_pipeline_is_opened_as_asked(saved, pipeline):
    settings = [GenerationSettings("a ring", steps=2)]
    (plain,), (again,) = drawn(pipeline, settings), drawn(open_pipeline(saved, "cpu"), settings)
    assert np.array_equal(plain, again)
    half = open_pipeline(saved, "cpu", "bf16")
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    assert 0 < difference(plain, drawn(half, settings)[0]) < 40
    compiled = open_pipeline(saved, "cpu", compiled=True)
    assert all(block._compiled_call_impl is not None for block in compiled.transformer.blocks)


def test_tiles_are_decoded_only_where_the_image_is_larger(saved, pipeline):
    tiled = open_pipeline(saved, "cpu", tiled=True)
    small, large = GenerationSettings("a ring", steps=2), GenerationSettings("a ring", steps=2, width=40, height=24)
    (plain, whole), (same, tiles) = drawn(pipeline, [small, large]), drawn(tiled, [small, large])
    assert np.array_equal(plain, same)
    assert 0 < np.abs(whole - tiles).mean() < 12 and tiles.shape == (24, 40, 3)


def test_memory_that_does_not_suffice_is_one_line(pipeline, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\nmore"
        )

    monkeypatch.setattr(pipeline.vae, "decode", fail)
    with pytest.raises(LdmError, match="not enough memory for 1 images at a time") as error:
        drawn(pipeline, [GenerationSettings("a ring", steps=1)])
    assert "\n" not in str(error.value)
