import copy
import json
from typing import Any, NamedTuple

import pytest

from ldm.errors import UsageError
from ldm.inference.prompts import Limits, fit_prompts, parse_size, plan_prompts, read_prompts, repeated
from ldm.inference.settings import GenerationSettings
from ldm.models.text_encoder import TextEncoder


@pytest.fixture
def encoder(minilm):
    """One that takes eight tokens, two of them special."""
    short = copy.deepcopy(minilm.tokenizer)
    short.model_max_length = 8
    return TextEncoder(short, minilm.model, "short")


class Cut(NamedTuple):
    kept: str
    cut: str


def fit_prompt(encoder, prompt):
    """The part that is kept, and the words that are cut."""
    fit = fit_prompts(encoder, [prompt])[prompt]
    assert fit.tokens == encoder.tokenizer(fit.kept)["input_ids"]
    return Cut(fit.kept, fit.cut)


def written(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_prompt_that_fits_stays_as_it_is(encoder, minilm):
    for prompt in ("", "a red ring", "one two three four five six", " spaces   stay\n"):
        assert fit_prompt(encoder, prompt) == (prompt, "")
    assert fit_prompt(minilm, "ring " * (minilm.max_tokens - 2)).cut == ""


@pytest.mark.parametrize(
    "prompt, kept, cut",
    [
        ("one two three four five six seven", "one two three four five six", "seven"),
        ("one two three four five six, seven eight.", "one two three four five six", ", seven eight."),
        # "antidisestablishmentarianism" is several tokens, of which some would fit
        ("one two three antidisestablishmentarianism ring", "one two three", "antidisestablishmentarianism ring"),
        ("eins zwei\ndrei", None, None),
    ],
)
def test_a_long_prompt_is_cut_between_words_and_what_is_cut_is_known(encoder, prompt, kept, cut):
    fit = fit_prompt(encoder, prompt)
    if kept is not None:
        assert fit == (kept, cut)
    assert len(encoder.tokenizer(fit.kept)["input_ids"]) <= 8 and fit_prompt(encoder, fit.kept) == (fit.kept, "")
    assert prompt.startswith(fit.kept) and prompt.endswith(fit.cut)
    assert (fit.kept + fit.cut).split() == prompt.split() or f"{fit.kept} {fit.cut}".split() == prompt.split()


def test_what_is_kept_is_what_the_text_encoder_would_have_seen_of_whole_words(encoder):
    prompt = "one two three four five six seven eight"
    assert (
        encoder.tokenizer(prompt, truncation=True, max_length=8)["input_ids"]
        == encoder.tokenizer(fit_prompt(encoder, prompt).kept)["input_ids"]
    )


def test_a_prompt_of_which_no_word_fits_is_refused(encoder):
    encoder.tokenizer.model_max_length = 4
    with pytest.raises(UsageError, match=r"has \d+ tokens, the text encoder takes 4; shorten it"):
        fit_prompt(encoder, "antidisestablishmentarianism")


def test_what_is_no_text_is_refused(encoder):
    with pytest.raises(UsageError, match="half a surrogate pair"):
        fit_prompt(encoder, "a \ud800 ring")


def test_images_of_one_prompt_count_their_seeds_on():
    images = repeated({"prompt": "a ring", "seed": 4, "size": "64x32"}, 3, "here")
    assert images == [GenerationSettings("a ring", seed=seed, width=64, height=32) for seed in (4, 5, 6)]
    for count in (0, -1, "2", 1.0, True, None):
        with pytest.raises(UsageError, match=r"^here: count is "):
            repeated({"prompt": "a ring"}, count, "here")


def test_sizes():
    assert parse_size("512x768") == (512, 768) and parse_size("64") == parse_size(64) == (64, 64)
    for wrong in ("", "x", "64x", "64x32x1", "-8", "6.4", None, True):
        with pytest.raises(UsageError, match="give WIDTHxHEIGHT or one number"):
            parse_size(wrong)  # pyright: ignore[reportArgumentType]  what a file may hold


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    file = written(tmp_path / "prompts.txt", "\ufeffa ring", "", "  # a remark", " a star \r", "{not json}", "")
    found = read_prompts(file, {"seed": 5, "steps": 9}, count=2)
    assert [(one.prompt, one.seed, one.steps) for one in found if isinstance(one, GenerationSettings)] == [
        (prompt, 5 + number, 9) for number, prompt in enumerate(["a ring"] * 2 + ["a star"] * 2 + ["{not json}"] * 2)
    ]


def test_a_line_of_json_says_more_than_the_command_line(tmp_path):
    lines = (
        {"prompt": "a ring"},
        {"prompt": "a star", "seed": 100, "count": 3, "size": 64, "negative": "blur", "scheduler": "heun", "guidance": 1},
        "",
        {"prompt": "a ring", "guidance_interval": [0.2, 0.8], "height": 16, "original_size": "64x48", "crop_left": 2},
    )
    found = read_prompts(written(tmp_path / "prompts.jsonl", *lines), {"seed": 5, "width": 32, "steps": 9})
    original: Any = {"original_width": 64, "original_height": 48, "crop_left": 2}
    star = {"negative": "blur", "scheduler": "heun", "guidance": 1.0, "steps": 9, "width": 64, "height": 64}
    assert found == [
        GenerationSettings("a ring", seed=5, steps=9, width=32),
        *(GenerationSettings("a star", seed=seed, **star) for seed in (100, 101, 102)),
        GenerationSettings("a ring", seed=9, steps=9, width=32, height=16, guidance_interval=(0.2, 0.8), **original),
    ]
    assert isinstance(found[-1], GenerationSettings) and found[-1].size_condition() == {
        "original_size": (48, 64),
        "crops_coords_top_left": (0, 2),
    }


def test_a_broken_line_stands_in_its_place_and_names_itself(tmp_path):
    def check(settings):
        if settings.scheduler == "magic":
            raise UsageError("no sampler 'magic'")
        if not settings.prompt:
            raise UsageError("the prompt is empty")

    lines = (
        '{"prompt": "a ring"',
        {"prompt": "a star"},
        {"seed": 3},
        [],
        {"prompt": "a star", "scheduler": "magic"},
        {"prompt": 1},
    )
    lines += (
        {"prompt": "a ring", "count": 0},
        {"prompt": "a ring", "size": "big"},
        {"prompt": "a ring", "bogus": 1},
        "[" * 100_000,
    )
    file = written(tmp_path / "prompts.jsonl", *lines)
    found = read_prompts(file, {"seed": 7}, check=check)
    assert found[1] == GenerationSettings("a star", seed=8) and len(found) == 10
    broken = {line: one for line, one in enumerate(found, 1) if isinstance(one, UsageError)}
    expected = {
        1: "is not readable JSON",
        3: "the prompt is empty",
        4: "no JSON object",
        5: "no sampler 'magic'",
        6: "prompt is 1",
        7: "count is 0",
        8: "size is 'big'",
        9: "no setting 'bogus'",
        10: "is not readable JSON",
    }
    assert list(broken) == list(expected)
    for line, error in broken.items():
        assert str(error).startswith(f"{file}, line {line}: ") and expected[line] in str(error) and "\n" not in str(error)


def test_what_a_file_may_ask_for_has_limits(tmp_path):
    lines = [{"prompt": "a", "count": 3}, {"prompt": "b", "count": 10**7}, {"prompt": "c", "steps": 10**6}, {"prompt": "d"}]
    file = written(tmp_path / "prompts.jsonl", *lines)
    found = read_prompts(file, {})
    errors = {number: str(error) for number, error in enumerate(found) if isinstance(error, UsageError)}
    assert len(found) == 6 and "line 2: 10,000,003 images are more than the limit of 100,000" in errors[3]
    assert "line 3: 1,000,000 steps are more than the limit of 1,000; raise it by --max-steps" in errors[4]
    assert not any(isinstance(one, UsageError) for one in read_prompts(written(file, lines[2]), {}, limits=Limits(9, 10**6)))
    with pytest.raises(UsageError, match="3 images are more than the limit of 2"):
        plan_prompts(["a", "b", "c"], {}, 1, lambda settings: None, Limits(images=2))


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "' + "a" * 30_000 + '"}',
        '{"prompt": "a", "width": 1' + "0" * 9 + "}",
        '{"prompt": "a", "size": "60000x60000"}',
        '{"prompt": "a", "seed": ' + "9" * 5_000 + "}",
        '{"prompt": "a", "seed": ' + "9" * 4_000 + "}",
        '{"prompt": "a", "guidance": NaN}',
        '{"prompt": "a", "guidance": 1e999}',
        '{"prompt": null}',
        '{"prompt": "a", "count": true}',
        '{"prompt": "a", "guidance_interval": [0, "1"]}',
        '{"prompt": "a", "guidance_rule": "' + "x" * 9_000 + '"}',
        '{"prompt": "a", "' + "x" * 9_000 + '": 1}',
        '{"prompt": "a\\ud800"}',
        "null",
    ],
)
def test_a_hostile_line_is_one_short_line(tmp_path, line):
    (error,) = read_prompts(written(tmp_path / "prompts.jsonl", line), {})
    assert isinstance(error, UsageError) and len(str(error)) < 600 and "\n" not in str(error)


def test_a_line_that_is_not_utf8_is_a_broken_one(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"a ring\nein gr\xfcner Ring\na star\n")
    found = read_prompts(file, {})
    assert [type(one) for one in found] == [GenerationSettings, UsageError, GenerationSettings]
    assert f"{file}, line 2" in str(found[1])


def test_files_that_hold_no_prompts_are_refused(tmp_path):
    for name, content, why in (
        ("prompts.txt", "\n# nothing\n", "holds no prompt"),
        ("prompts.csv", "a ring", "no prompt file by its name"),
        ("gone.txt", None, "cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=why) as error:
            read_prompts(tmp_path / name, {})
        assert str(tmp_path / name) in str(error.value)
