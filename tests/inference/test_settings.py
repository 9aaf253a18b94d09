import dataclasses
import math

import pytest

from ldm.diffusion.guidance import AdaptiveProjected, ClassifierFree, Interval, Rescale, ZeroStar
from ldm.errors import UsageError
from ldm.inference.settings import GenerationSettings

EVERYTHING = {
    "prompt": "a ring\nand a “half” 🟥",
    "negative": "blur",
    "seed": 2**63 - 1,
    "steps": 7,
    "guidance": -1.5,
    "guidance_rule": "apg",
    "guidance_rescale": 0.25,
    "guidance_interval": [0.1, 0.9],
    "scheduler": "ddim",
    "eta": 0.3,
    "width": 64,
    "height": 32,
    "image": "a.png",
    "strength": 0.5,
    "original_width": 64,
    "original_height": 32,
    "crop_left": 3,
    "crop_top": None,
    "mask": "b.png",
    "weak": None,
    "lora": ["style.safetensors=0.8"],
    "embedding": ["learned_embeds.safetensors"],
}


def test_settings_come_back_from_their_json():
    everything = GenerationSettings.from_json(EVERYTHING, "here")
    assert everything.to_json() == EVERYTHING and set(EVERYTHING) == {f.name for f in dataclasses.fields(GenerationSettings)}
    for settings in (everything, GenerationSettings("a ring"), GenerationSettings("a ring", weak="old")):
        assert GenerationSettings.from_json(settings.to_json(), "here") == settings
        assert hash(settings) == hash(dataclasses.replace(settings))
    assert GenerationSettings.from_json({"prompt": "a ring"}, "here") == GenerationSettings("a ring")
    assert type(GenerationSettings.from_json({"prompt": "a ring", "guidance": 2}, "here").guidance) is float


def test_the_rule_is_what_the_fields_say():
    assert GenerationSettings("a", guidance=2.0).rule() == ClassifierFree(2.0)
    assert GenerationSettings("a", guidance_rule="zero-star").rule() == ZeroStar(3.0)
    everything = GenerationSettings.from_json(EVERYTHING, "here")
    assert everything.rule() == Interval(Rescale(AdaptiveProjected(-1.5), 0.25), 0.1, 0.9)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"prompt": None}, "prompt is None; give text"),
        ({"seed": -1}, "seed is -1; give a number from 0 to"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": True}, "seed is True; give a whole number"),
        ({"seed": "1"}, "seed is '1'; give a whole number"),
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"steps": 2.5}, "steps is 2.5; give a whole number"),
        ({"guidance": math.nan}, "guidance is nan; give a finite number"),
        ({"guidance_rule": "best"}, "guidance_rule is 'best'; choose one of: classifier-free, zero-star, apg"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; give a number from 0 to 1"),
        ({"guidance_interval": [0.5, 0.5]}, "guidance_interval is 0.5 to 0.5; give 0 <= low < high <= 1"),
        ({"guidance_interval": [0.5]}, r"guidance_interval is \[0.5\]; give two numbers"),
        ({"eta": 0.5}, "eta is of the scheduler ddim"),
        ({"eta": math.nan, "scheduler": "ddim"}, "eta is nan"),
        ({"width": 0}, "width is 0; give 1 or more"),
        ({"crop_top": -1}, "crop_top is -1; give 0 or more"),
        ({"original_width": 8}, "original_width and original_height belong together; give both"),
        ({"strength": 0.5}, "strength is of a given image; give image, too"),
        ({"strength": 1.01, "image": "a.png"}, "strength is 1.01; give a number from 0 to 1"),
        ({"mask": "b.png"}, "mask is of a given image; give image, too"),
        ({"weak": "old", "negative": "blur"}, "weak and negative are both what guidance leads away from; give one of them"),
        ({"stepps": 3}, "there is no setting 'stepps'; choose from: prompt, negative, seed, steps"),
    ],
)
def test_what_no_image_can_have_is_refused_in_one_line_that_names_it(changes, why):
    with pytest.raises(UsageError, match=f"^prompts.jsonl, line 3: {why}") as error:
        GenerationSettings.from_json({"prompt": "a ring"} | changes, "prompts.jsonl, line 3")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, [], "a ring", {"promt": "a ring"}])
def test_settings_are_an_object(content):
    with pytest.raises(UsageError, match=r"^here: "):
        GenerationSettings.from_json(content, "here")
