import json
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import dispatch
from ldm.diffusion.conditioning import Condition
from ldm.diffusion.guidance import ClassifierFree, GuidedDenoiser, Interval
from ldm.diffusion.path import VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import Preconditioned, V
from ldm.diffusion.scheduler import adds_noise, make_scheduler, samplers_for
from ldm.errors import UsageError
from ldm.inference import animation as module
from ldm.inference.animation import (
    BlendedDenoiser,
    even_steps,
    generate_frames,
    key_settings,
    slerp,
    write_gif,
    write_mp4,
)
from ldm.inference.metadata import read_png
from ldm.inference.settings import GenerationSettings

SETTINGS = GenerationSettings("a red circle", steps=3)
PROMPTS = ["a red circle", "a tiny blue star at the top left of a dark green background"]
KEYS = key_settings(SETTINGS, PROMPTS, [1, 2])


def pixels(images):
    return np.stack([np.asarray(image.convert("RGB")).astype(int) for image in images])


def ordinary(pipeline, settings):
    generator = torch.Generator().manual_seed(settings.seed)
    made = pipeline(settings.prompt, settings.negative, settings.steps, settings.guidance, generator=generator)
    return pixels(made.images)[0]


# ------------------------------------------------------------------------------------------------- where frames stand


@pytest.mark.parametrize(("keys", "count"), [(2, 2), (2, 7), (3, 5), (4, 9), (3, 3)])
def test_frames_stand_at_even_steps_from_the_first_key_to_the_last(keys, count):
    places = [first + amount for first, _, amount in even_steps(keys, count)]
    np.testing.assert_allclose(places, np.linspace(0, keys - 1, count), atol=1e-12)
    assert places[0] == 0 and places[-1] == keys - 1
    looped = even_steps(keys, count, loop=True)
    np.testing.assert_allclose([f.first + f.amount for f in looped], np.arange(count) * keys / count, atol=1e-12)
    assert all(frame.second == (frame.first + 1) % keys for frame in looped)


def test_keys_are_prompts_and_seeds_in_pairs():
    assert [(key.prompt, key.seed) for key in key_settings(SETTINGS, PROMPTS, [5])] == [(PROMPTS[0], 5), (PROMPTS[1], 5)]
    assert [key.seed for key in key_settings(SETTINGS, PROMPTS[:1], [5, 6, 7])] == [5, 6, 7]


def test_slerp_is_exact_at_its_ends_keeps_the_norm_and_turns_evenly():
    first, second = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(slerp(first, second, 0), first) and torch.equal(slerp(first, second, 1), second)
    assert torch.equal(slerp(first, first.clone(), 0.3), first)

    def angle(one, other):
        return math.acos(torch.nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), 0))

    for amount in (0.1, 0.5, 0.8):
        found = slerp(first, second, amount)
        assert abs(found.norm() - torch.lerp(first.norm(), second.norm(), amount)) < 1e-3
        assert abs(angle(first, found) - amount * angle(first, second)) < 1e-5
        torch.testing.assert_close(found, slerp(second, first, 1 - amount))
    assert torch.lerp(first, second, 0.5).norm() < 0.75 * first.norm()  # which is why


# -------------------------------------------------------------------------------------------------- mixed predictions


class Recorded(torch.nn.Module):
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.rows = denoiser, []

    def forward(self, **named):
        self.rows.append(len(named["hidden_states"]))
        return self.denoiser(**named)


@pytest.mark.parametrize("guidance", [ClassifierFree(3.0), ClassifierFree(1.0), Interval(ClassifierFree(3.0), 0.6, 1.0)])
def test_a_mixture_is_the_mean_of_both_predictions_and_one_caption_alone_is_as_ever(tiny_dit, guidance):
    generator = torch.Generator().manual_seed(0)
    texts = Condition(torch.randn(2, 5, 16, generator=generator), torch.tensor([[1, 1, 1, 0, 0], [1] * 5]))
    null = Condition(torch.randn(1, 2, 16, generator=generator), torch.ones(1, 2, dtype=torch.long))
    x, t = torch.randn(1, 4, 8, 8, generator=generator).expand(3, -1, -1, -1), torch.full((3,), 0.5)
    recorded = Recorded(tiny_dit)
    with torch.no_grad():
        weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]])
        found = BlendedDenoiser(recorded, texts, weights, null, guidance)(x, 1000 * t, t)
        both = Condition(texts.embeddings[[0, 1, 1]], texts.mask[[0, 1, 1]])
        alone = GuidedDenoiser(tiny_dit, both, null.repeat(3), guidance)(x, 1000 * t, t)
    torch.testing.assert_close(found[:2], alone[:2], rtol=1e-5, atol=1e-5)
    # the rule is linear here, so that the mixture of the guided predictions is the guided mixture
    torch.testing.assert_close(found[2], 0.25 * alone[0] + 0.75 * alone[1], rtol=1e-4, atol=1e-5)
    assert recorded.rows == [4 + 3 * guidance.guides(t)]


# ------------------------------------------------------------------------------------------------------------- frames


def test_frames_at_keys_are_the_ordinary_images(pipeline):
    settings = replace(SETTINGS, negative="a ring", guidance=2.0)
    keys = key_settings(settings, [*PROMPTS, "a ring"], [1, 2, 3])
    drawn = pixels(generate_frames(pipeline, keys, 5, batch_size=3))
    assert drawn.shape == (5, 16, 16, 3)
    for frame, key in ((0, 0), (2, 1), (4, 2)):
        assert np.abs(drawn[frame] - ordinary(pipeline, keys[key])).max() <= 1
    assert np.abs(drawn[0] - drawn[2]).mean() > 5 and np.abs(drawn[2] - drawn[4]).mean() > 5
    looped = pixels(generate_frames(pipeline, keys, 6, loop=True, batch_size=6))
    assert np.abs(looped[0] - ordinary(pipeline, keys[0])).max() <= 1
    assert np.abs(looped[4] - ordinary(pipeline, keys[2])).max() <= 1


@pytest.mark.parametrize(("prompts", "seeds"), [(PROMPTS, [1]), (PROMPTS[:1], [1, 2])])
def test_the_step_between_neighbours_falls_as_one_over_the_number_of_frames(pipeline, prompts, seeds):
    keys = key_settings(SETTINGS, prompts, seeds)

    def largest_step(count):
        return np.abs(np.diff(pixels(generate_frames(pipeline, keys, count, batch_size=32)), axis=0)).mean((1, 2, 3)).max()

    few, many = largest_step(9), largest_step(33)
    whole = np.abs(ordinary(pipeline, keys[0]) - ordinary(pipeline, keys[1])).mean()
    assert whole > 2  # levels of 255
    assert few < 4 * whole / 8 + 0.5  # a way four times as fast as the straight one, and half a level of rounding
    assert many < 0.25 * few * 1.3 + 0.5


def test_a_frame_does_not_depend_on_its_batch_and_frames_come_as_they_are_drawn(pipeline):
    calls = []
    hook = pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    drawn = generate_frames(pipeline, KEYS, 6, batch_size=2)
    first = next(drawn)
    assert len(calls) == SETTINGS.steps  # one batch of three
    together = generate_frames(pipeline, KEYS, 6, batch_size=6)
    assert np.abs(pixels([first, *drawn]) - pixels(together)).max() <= 1
    hook.remove()


def test_every_deterministic_sampler_serves_and_one_that_adds_noise_is_refused(pipeline):
    noisy = {"euler-ancestral", "dpm++2m-sde"}
    for name in samplers_for(*pipeline.diffusion):
        keys = [replace(key, scheduler=name) for key in KEYS]
        if name in noisy:
            good = ", ".join(name for name in samplers_for(*pipeline.diffusion) if name not in noisy)
            with pytest.raises(
                UsageError, match=rf"{name.replace('+', '.')} adds noise .* choose one of: {good.replace('+', '.')}$"
            ):
                generate_frames(pipeline, keys, 3)
        else:
            assert len([*generate_frames(pipeline, keys, 2)]) == 2

    for diffusion, expected in (
        ((VariancePreserving(), V()), noisy | {"ddpm"}),
        ((VarianceExploding(), Preconditioned()), {"dpm++2m-sde"}),
    ):
        assert {name for name in samplers_for(*diffusion) if adds_noise(make_scheduler(name, *diffusion))} == expected
    assert adds_noise(make_scheduler("ddim", VariancePreserving(), V(), eta=0.3))
    pipeline.scheduler = make_scheduler("euler-ancestral", *pipeline.diffusion)
    with pytest.raises(UsageError, match="scheduler LTXEulerAncestralRFScheduler adds noise"):
        generate_frames(pipeline, KEYS, 3)


def test_keys_that_make_no_way_are_refused_before_anything_is_drawn(pipeline):
    for keys, complaint in (
        ([KEYS[0], replace(KEYS[1], guidance=2.0)], "may differ in prompt and seed alone"),
        ([replace(key, image="x.png") for key in KEYS], "need no image"),
        ([KEYS[0], replace(KEYS[1], prompt="word " * 600)], "tokens, the text encoder takes"),
        ([replace(key, width=17) for key in KEYS], "17x16 cannot be generated"),
    ):
        with pytest.raises(UsageError, match=complaint):
            generate_frames(pipeline, keys, 3)


# ---------------------------------------------------------------------------------------------------------- GIF, MP4


def disc(width, height, number, count):
    """A red disc on its way over two ramps."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 255 * number // count)], -1).astype(np.uint8)
    image[(x - width * number / count) ** 2 + (y - height / 2) ** 2 < (height / 4) ** 2] = (230, 20, 30)
    return Image.fromarray(image)


def shrunk(image, size):
    """What was enlarged as it was, of the part that was not added."""
    factor = image.width // size[0]
    return np.asarray(image.convert("RGB")).astype(int)[: size[1] * factor : factor, : size[0] * factor : factor]


def one_by_one(images):
    """Copies of images; whoever takes them may hold the latest two."""
    seen = []
    for image in images:
        image = image.copy()
        seen.append(weakref.ref(image))
        assert sum(reference() is not None for reference in seen) <= 2
        yield image


@pytest.mark.parametrize("size", [(40, 40), (33, 21), (325, 327)])
def test_a_gif_comes_back_with_its_times_and_nearly_its_colours(tmp_path, size):
    images = [disc(size[0], size[1], number, 7) for number in range(7)]
    write_gif(tmp_path / "x.gif", one_by_one(images), fps=12)
    with Image.open(tmp_path / "x.gif") as gif:
        assert getattr(gif, "n_frames", 1) == 7 and gif.info["loop"] == 0
        assert max(gif.size) >= 320 and gif.width * size[1] == gif.height * size[0]
        durations = []
        for number, image in enumerate(images):
            gif.seek(number)
            durations.append(gif.info["duration"])
            assert np.abs(shrunk(gif, size) - np.asarray(image)).mean() < 3  # levels of 255
    assert set(durations) <= {80, 90} and abs(sum(durations) - 7 / 12 * 1000) <= 5  # milliseconds


@pytest.mark.parametrize(("size", "shown"), [((40, 40), (320, 320)), ((33, 21), (330, 210)), ((325, 327), (326, 328))])
def test_an_mp4_comes_back_with_its_frames_size_rate_and_nearly_its_colours(tmp_path, size, shown):
    av = pytest.importorskip("av")
    images = [disc(size[0], size[1], number, 7) for number in range(7)]
    write_mp4(tmp_path / "x.mp4", one_by_one(images), fps=12.5)
    with av.open(str(tmp_path / "x.mp4")) as film:
        stream = film.streams.video[0]
        found = [*film.decode(stream)]
        assert (stream.width, stream.height) == shown and len(found) == stream.frames == 7
        assert float(stream.average_rate) == 12.5 and stream.pix_fmt == "yuv420p" and found[0].colorspace == 1  # BT.709
        for frame, image in zip(found, images, strict=True):
            assert np.abs(shrunk(frame.to_image(), size) - np.asarray(image)).mean() < 4  # levels of 255


# ------------------------------------------------------------------------------------------------------- command line


def run(*arguments):
    dispatch([str(argument) for argument in arguments])


def test_the_command_writes_frames_gif_and_mp4(pipeline, tmp_path, capsys):
    av = pytest.importorskip("av")
    pipeline.save_pretrained(tmp_path / "pipeline")
    settings = ["--steps", "2", "--device", "cpu", "--frames", "3"]
    run("interpolate", tmp_path / "pipeline", *PROMPTS, "--out", tmp_path / "out", "--gif", "--mp4", *settings)
    assert "3 frames, interpolation.gif, interpolation.mp4" in capsys.readouterr().out
    names = ["0000.png", "0001.png", "0002.png", "interpolation.gif", "interpolation.mp4"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    packet = b"digitalsourcetype/trainedAlgorithmicMedia"
    assert all(packet in (tmp_path / "out" / name).read_bytes() for name in names)
    assert read_png(tmp_path / "out" / "0002.png")[0].prompt == PROMPTS[1]  # a key is one prompt's image
    between = json.loads(Image.open(tmp_path / "out" / "0001.png").info["ldm"])
    assert [one["prompt"] for one in between["settings"]] == PROMPTS and between["amount"] == 0.5
    with Image.open(tmp_path / "out" / "interpolation.gif") as gif:
        assert getattr(gif, "n_frames", 1) == 3 and gif.info["loop"] == 0
    with av.open(str(tmp_path / "out" / "interpolation.mp4")) as film:
        assert len([*film.decode(video=0)]) == 3
    drawn = generate_frames(pipeline, key_settings(replace(SETTINGS, steps=2), PROMPTS, [0]), 3)
    found = pixels(Image.open(tmp_path / "out" / name) for name in names[:3])
    assert np.abs(found - pixels(drawn)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([PROMPTS[0]], "nothing between one image and itself; give two prompts or two seeds"),
        ([*PROMPTS, "--frames", "1"], "1 frames cannot hold 2 key images; give 2 frames or more"),
        ([*PROMPTS, "--frames", "1000000000"], "more than 100000"),
        ([*PROMPTS, "--fps", "0"], "fps is 0"),
        ([*PROMPTS, "--fps", "nan"], "fps is nan"),
        ([*PROMPTS, "--gif", "--fps", "60"], "a GIF shows 50 frames per second at most"),
        ([*PROMPTS, "--seeds", "1", "2", "3"], "2 prompts and 3 seeds make no pairs"),
        ([*PROMPTS, "--batch-size", "0"], "--batch-size is 0"),
        ([*PROMPTS, "--mp4"], "pip install 'ldm\\[video\\]'"),
    ],
)
def test_bad_usage_is_known_before_the_model_is_opened(tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # as where PyAV is not installed
    with pytest.raises(UsageError, match=complaint):
        run("interpolate", tmp_path / "nowhere", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
