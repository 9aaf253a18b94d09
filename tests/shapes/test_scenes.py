"""What the built-in data set promises: captions that say what is drawn, and a reader that can tell."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm.errors import UsageError
from ldm.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    PRESETS,
    SHAPES,
    Object,
    Scene,
    ShapeSample,
    Size,
    all_scenes,
    generate,
    held_out_prompts,
    is_held_out,
    parse_caption,
    random_scene,
    render,
)
from ldm.shapes.scorer import read_scene, score


def samples(preset: str, size: Size | list[Size], count: int = 400, seed: int = 7, held_out: bool = False) -> list[ShapeSample]:
    return list(generate(count, size, seed, preset, held_out))


def pairs(captions: list[str]) -> list[list[tuple[str, str]]]:
    return [[(thing.colour, thing.shape) for thing in parse_caption(caption).objects] for caption in captions]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("size", [32, 64, 100, 256, [(60, 40), (32, 64), 48, (150, 256)]])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_reader_reads_what_was_drawn(preset: str, size: Size | list[Size], held_out: bool) -> None:
    drawn = samples(preset, size, count=300 if size in (32, 64) else 50, held_out=held_out)
    scores = score([sample.image for sample in drawn], [sample.caption for sample in drawn])
    where = "place" if preset == "one" else "relation"
    assert scores.keys() == {"background", "colour", "shape", "size", where, "prompt_accuracy", "readable"}
    assert scores["prompt_accuracy"] >= 0.99
    assert min(scores.values()) == scores["prompt_accuracy"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_reader_bears_the_blur_and_noise_of_a_decoder(preset: str) -> None:
    rng = np.random.default_rng(0)
    drawn = samples(preset, 64, count=250)
    images = []
    for sample in drawn:
        blurred = np.asarray(Image.fromarray(sample.image).filter(ImageFilter.GaussianBlur(0.7)))
        images.append(np.clip(np.rint(blurred + rng.normal(0, 8, blurred.shape)), 0, 255).astype(np.uint8))
    assert score(images, [sample.caption for sample in drawn])["prompt_accuracy"] >= 0.97


def test_captions_of_other_images_score_as_chance_would() -> None:
    drawn = samples("one", 32, count=1000)
    captions = [drawn[i].caption for i in np.random.default_rng(0).permutation(len(drawn))]
    scores = score([sample.image for sample in drawn], captions)
    for attribute, chance in {
        "background": 1 / 4,
        "colour": 1 / 8,
        "shape": 1 / 8,
        "size": 1 / 2,
        "place": 1 / 5,
    }.items():
        assert scores[attribute] == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / len(drawn)))
    assert scores["prompt_accuracy"] < 0.01


def test_captions_of_other_images_are_never_wholly_right_with_two_objects() -> None:
    drawn = samples("two", 32, count=300)
    captions = [drawn[i].caption for i in np.random.default_rng(0).permutation(len(drawn))]
    assert score([sample.image for sample in drawn], captions)["prompt_accuracy"] < 0.01


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_no_scene_is_not_read(preset: str) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert read_scene(noise, preset) is None
    for background in BACKGROUNDS.values():
        empty = np.tile(np.array(background, np.float64), (64, 64, 1))
        assert read_scene(empty.astype(np.uint8), preset) is None
        assert read_scene(np.clip(empty + rng.normal(0, 8, empty.shape), 0, 255).astype(np.uint8), preset) is None
    other = PRESETS[1 - PRESETS.index(preset)]  # the wrong number of objects
    read = [read_scene(sample.image, preset) is not None for sample in samples(other, 64, count=200)]
    assert np.mean(read) <= 0.01


def test_an_object_at_no_named_place_is_not_read() -> None:
    scene = parse_caption("a small red ring at the top on a black background")
    image = render(scene, 64, np.random.default_rng(0))
    assert read_scene(image, "one") == scene
    assert read_scene(np.roll(image, -16, axis=1), "one") is None  # the top left corner


def test_two_captions_of_one_image_are_both_right_and_exchanged_objects_are_a_wrong_relation() -> None:
    left, right = "a large red circle", "a small blue star"
    image = render(parse_caption(f"{left} left of {right} on a gray background"), 64, np.random.default_rng(0))
    for caption in (f"{left} left of {right}", f"{right} right of {left}"):
        assert score([image], [f"{caption} on a gray background"])["prompt_accuracy"] == 1
    exchanged = score([image], [f"{right} left of {left} on a gray background"])
    assert exchanged["relation"] == exchanged["prompt_accuracy"] == 0
    assert exchanged["colour"] == exchanged["shape"] == exchanged["size"] == exchanged["background"] == 1
    half_right = score([image], [f"{left} left of a small green heart on a white background"])
    assert (half_right["colour"], half_right["size"], half_right["background"]) == (0.5, 1, 0)


def test_score_refuses_what_it_cannot_score() -> None:
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    for images, captions in (([], []), ([image], []), ([image], ["a cat"])):
        with pytest.raises(UsageError):
            score(images, captions)


@pytest.mark.parametrize("preset", PRESETS)
def test_training_never_shows_a_held_out_pair_and_still_shows_every_word(preset: str) -> None:
    seen = list(itertools.chain(*pairs([sample.caption for sample in samples(preset, 32, count=800)])))
    assert not any(is_held_out(*pair) for pair in seen)
    assert {colour for colour, _ in seen} == set(COLOURS)
    assert {shape for _, shape in seen} == set(SHAPES)
    assert len(set(seen)) == 56


@pytest.mark.parametrize("preset", PRESETS)
def test_held_out_shows_only_held_out_pairs_and_every_word(preset: str) -> None:
    captions = [sample.caption for sample in samples(preset, 32, count=200, held_out=True)]
    captions += [random_scene(np.random.default_rng(i), preset, held_out=True).caption for i in range(50)]
    captions += held_out_prompts(preset, 64)
    seen = list(itertools.chain(*pairs(captions)))
    assert all(is_held_out(*pair) for pair in seen)
    assert len(set(seen)) == len({colour for colour, _ in seen}) == len({shape for _, shape in seen}) == 8


@pytest.mark.parametrize(
    ("preset", "held_out", "number"),
    [("one", False, 2240), ("one", True, 320), ("two", False, 197_120), ("two", True, 3584)],
)
def test_all_scenes_are_that_many_and_all_different(preset: str, held_out: bool, number: int) -> None:
    scenes = list(all_scenes(preset, held_out))
    assert len(scenes) == len(set(scenes)) == number


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sample_does_not_depend_on_how_many_are_asked_for(preset: str) -> None:
    few, many = samples(preset, 32, count=5), samples(preset, 32, count=20)
    for a, b in zip(few, many, strict=False):
        assert (a.key, a.caption) == (b.key, b.caption)
        assert np.array_equal(a.image, b.image)
    assert len({sample.key for sample in many}) == 20
    other = samples(preset, 32, count=5, seed=8)
    assert [sample.caption for sample in other] != [sample.caption for sample in few]


def test_an_epoch_of_preset_one_shows_every_scene_once_and_the_next_one_in_another_order() -> None:
    captions = [sample.caption for sample in samples("one", 32, count=640, held_out=True)]
    epochs = captions[:320], captions[320:]
    assert set(epochs[0]) == set(epochs[1]) == {scene.caption for scene in all_scenes("one", held_out=True)}
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("size", [32, 64, 100, 256])
def test_an_image_is_square_bytes_with_the_named_colours(size: int) -> None:
    scene = parse_caption("a large purple square at the center on a beige background")
    image = render(scene, size, np.random.default_rng(0))
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert tuple(image[0, 0]) == BACKGROUNDS["beige"]
    assert tuple(image[size // 2, size // 2]) == COLOURS["purple"]


def test_several_sizes_come_in_turn_with_the_objects_of_their_shorter_side() -> None:
    drawn = samples("one", [(60, 40), 48, (40, 60)], count=6)
    assert [sample.image.shape for sample in drawn] == [(60, 40, 3), (48, 48, 3), (40, 60, 3)] * 2
    scene = parse_caption("a large red circle at the center on a black background")
    areas = [(render(scene, size, np.random.default_rng(0))[..., 0] > 100).sum() for size in ((60, 40), 40, (40, 60))]
    assert max(areas) - min(areas) <= 0.02 * max(areas)


def test_two_objects_stay_apart_and_inside_whatever_the_jitter() -> None:
    rng = np.random.default_rng(0)
    for first, second in itertools.combinations(SHAPES, 2):
        scene = Scene("black", (Object("large", "red", first), Object("large", "blue", second)), "left of")
        for _ in range(8):
            marked = np.abs(render(scene, 128, rng).astype(int) - BACKGROUNDS["black"]).max(axis=2) > 0
            columns = marked.any(axis=0)
            assert not columns[60:68].all(), "no empty column between the two objects"
            assert not columns[[0, -1]].any(), "an object reaches the edge"


@pytest.mark.parametrize("preset", PRESETS)
def test_captions_parse_back_to_their_scene(preset: str) -> None:
    rng = np.random.default_rng(0)
    scenes = list(all_scenes("one")) if preset == "one" else [random_scene(rng, "two") for _ in range(500)]
    for scene in scenes:
        assert scene.preset == preset
        assert parse_caption(scene.caption) == scene
    assert parse_caption(f"  {scenes[0].caption.upper()}\n".replace(" ", "  ")) == scenes[0]


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a small red ring at the left",
        "a small red ring at the left on a green background",
        "a huge red ring at the left on a black background",
        "a small red ring above on a black background",
        "a small red ring at the left on a black background and more",
        "a small red ring above a large red ring on a black background",
    ],
)
def test_a_caption_outside_the_grammar_is_a_usage_error_of_one_line(caption: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_caption(caption)
    assert "\n" not in str(error.value)


def test_bad_arguments_are_refused_before_any_drawing() -> None:
    for count, size, seed, preset in (
        (5, 31, 0, "one"),
        (5, 257, 0, "one"),
        (5, (31, 64), 0, "one"),
        (5, [64, (64, 300)], 0, "one"),
        (-1, 64, 0, "one"),
        (5, 64, -1, "one"),
        (5, 64, 0, "three"),
    ):
        with pytest.raises(UsageError):
            generate(count, size, seed, preset)
    with pytest.raises(UsageError):
        held_out_prompts("three", 5)
    with pytest.raises(UsageError):
        read_scene(np.zeros((64, 64, 3), dtype=np.uint8), "three")


@pytest.mark.parametrize("preset", PRESETS)
def test_held_out_prompts_are_distinct_and_balanced(preset: str) -> None:
    prompts = held_out_prompts(preset, 64, seed=3)
    assert len(set(prompts)) == 64
    assert set(Counter(pair[0] for pair in pairs(prompts)).values()) == {8}
    assert held_out_prompts(preset, 10, seed=3) == prompts[:10]
    assert held_out_prompts(preset, 10, seed=4) != prompts[:10]
    assert len(held_out_prompts("one", 1000)) == 1000
