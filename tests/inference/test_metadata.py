"""What is inside a PNG comes back as it was, is read by others, and is never trusted."""

import json
import re
import struct
import zlib
from dataclasses import replace
from typing import cast
from xml.etree import ElementTree

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import Preconditioned, V, Velocity
from ldm.diffusion.scheduler import Scheduler, make_scheduler, sampler_name, samplers_for
from ldm.errors import UsageError
from ldm.files import write_json
from ldm.inference.generate import ImageGenerator, open_pipeline
from ldm.inference.metadata import Provenance, a1111_parameters, model_hash, provenance_of, read_png, save_png
from ldm.inference.settings import GenerationSettings

HASH = "0123456789abcdef" * 4
PROVENANCE = Provenance(
    "a model", HASH, "dpm++2m", "DPMSolverMultistepScheduler", "float32", "cpu (any)", "0.1.0", "2.13.0", "0.42.1"
)
SETTINGS = GenerationSettings("a red ring, small", "blur", seed=7, steps=20, guidance=4.5)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8))
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = some.text(some.characters(codec=None, exclude_categories=()), max_size=60)
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # the grammar of A1111's own reader


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def read_as_a1111(text):
    """Prompt, negative prompt and the pairs, by the rules of its reader."""
    *lines, last = text.strip().split("\n")
    pairs = PAIR.findall(last)
    assert len(pairs) >= 3  # else it takes the line for a part of the prompt
    start = next(n for n, line in enumerate(lines) if line.startswith("Negative prompt:"))
    lines[start] = lines[start].removeprefix("Negative prompt:")
    parts = ["\n".join(line.strip() for line in part) for part in (lines[:start], lines[start:])]
    return *parts, {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}


def saved(folder, settings=SETTINGS, provenance=PROVENANCE, **options):
    save_png(IMAGE, folder / "x.png", settings, provenance, **options)
    return folder / "x.png"


def with_chunk(path, text):
    chunks = PngInfo()
    chunks.add_text("ldm", text)
    IMAGE.save(path, pnginfo=chunks)
    return path


def changed(path, change):
    """The image with its JSON changed."""
    content = json.loads(Image.open(path).info["ldm"])
    change(content)
    return with_chunk(path, json.dumps(content))


def refused(path):
    """The one line with which a file is refused."""
    with pytest.raises(UsageError) as caught:
        read_png(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 700 and re.search("; (give|choose|say|fix) ", line) and str(path) in line
    return line


# ---- there and back


@given(
    prompt=TEXT.filter(str.strip),
    negative=TEXT,
    seed=some.integers(0, 2**63 - 1),
    guidance=some.floats(-1e6, 1e6),
    interval=some.sampled_from([(0.0, 1.0), (0.1, 0.7)]),
    size=some.none() | some.integers(1, 10_000),
)
@example("a\nNegative prompt: b\nSteps: 3, Sampler: x, Seed: 1", 'c, "d"\0\ud800', 0, 0.1, (0.0, 1.0), None)
@QUICK
def test_settings_come_back_whatever_a_prompt_holds(tmp_path, prompt, negative, seed, guidance, interval, size):
    before = GenerationSettings(prompt, negative, seed, guidance=guidance, guidance_interval=interval, width=size)
    assert read_png(saved(tmp_path, before)) == (before, replace(PROVENANCE, width=16, height=24))


def test_every_field_comes_back(tmp_path):
    full = GenerationSettings(
        "a", "b", 1, 2, 3.0, "apg", 0.5, (0.25, 0.75), "ddim", 0.3, 16, 24, "start.png", 0.6, "mask.png"
    )  # fmt: skip
    full = replace(full, original_width=32, original_height=48, crop_left=4, crop_top=0)
    assert read_png(saved(tmp_path, full))[0] == full
    weak = GenerationSettings("a", weak="pipelines/weak")
    assert read_png(saved(tmp_path, weak))[0] == weak


@pytest.mark.parametrize("metadata", [True, False])
def test_the_pixels_are_as_they_were(tmp_path, metadata):
    assert np.array_equal(np.asarray(Image.open(saved(tmp_path, metadata=metadata))), np.asarray(IMAGE))


def test_without_metadata_nothing_is_left(tmp_path):
    image = Image.open(saved(tmp_path))
    image.info |= {"dpi": (300, 300), "icc_profile": b"profile", "comment": "secret"}
    save_png(image, tmp_path / "y.png", SETTINGS, PROVENANCE, metadata=False)
    assert Image.open(tmp_path / "y.png").info == {} and image.info["comment"] == "secret"
    assert {kind for kind, _ in chunks(tmp_path / "y.png")} == {b"IHDR", b"IDAT", b"IEND"}
    assert "without metadata" in refused(tmp_path / "y.png")


def test_an_image_is_whole_or_not_there(tmp_path, monkeypatch):
    before = saved(tmp_path).read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saved(tmp_path, replace(SETTINGS, seed=8))
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"] and (tmp_path / "x.png").read_bytes() == before


def test_absolute_paths_are_not_stored(tmp_path):
    given = GenerationSettings("a", image=str(tmp_path / "photo.png"), mask=str(tmp_path / "mask.png"))
    path = saved(tmp_path, given)
    assert (read_png(path)[0].image, read_png(path)[0].mask) == ("photo.png", "mask.png")
    assert str(tmp_path).encode() not in path.read_bytes()


def test_an_image_made_of_several_is_marked_and_not_taken_for_one_prompts(tmp_path):
    save_png(IMAGE, tmp_path / "grid.png", [SETTINGS, replace(SETTINGS, prompt="a star")], PROVENANCE, amount=0.5)
    info = Image.open(tmp_path / "grid.png").info
    content = json.loads(info["ldm"])
    assert [one["prompt"] for one in content["settings"]] == [SETTINGS.prompt, "a star"] and content["amount"] == 0.5
    assert "trainedAlgorithmicMedia" in info["XML:com.adobe.xmp"] and SETTINGS.prompt in info["parameters"]
    assert "not an image of one prompt" in refused(tmp_path / "grid.png")


def test_the_longest_prompts_are_read_back(tmp_path):
    longest = replace(SETTINGS, prompt="🎨" * 20_000, negative="\ud800" * 20_000)
    assert read_png(saved(tmp_path, longest))[0] == longest
    with pytest.raises(UsageError, match="more than 20000 characters"):
        replace(SETTINGS, negative="a" * 20_001)


# ---- what others read


WORDS = some.text(some.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=60)
ORDINARY = WORDS.map(lambda text: "\n".join(map(str.strip, text.split("\n"))).strip()).filter(
    lambda text: text and "Negative prompt:" not in text
)


@given(prompt=ORDINARY, negative=some.just("") | ORDINARY, model=WORDS.map(str.strip).filter(bool))
@example("a, b\nthen: c (d:1.2) [e]", 'say "no"', 'odd, "name": x')
@QUICK
def test_a1111_reads_prompts_and_pairs(tmp_path, prompt, negative, model):
    path = saved(tmp_path, replace(SETTINGS, prompt=prompt, negative=negative), replace(PROVENANCE, model=model))
    found = read_as_a1111(Image.open(path).info["parameters"])
    assert found == (
        prompt,
        negative,
        {
            "Steps": "20",
            "Sampler": "DPM++ 2M",
            "CFG scale": "4.5",
            "Seed": "7",
            "Size": "16x24",
            "Model hash": HASH[:10],
            "Model": model,
            "Version": "ldm 0.1.0",
        },
    )


def test_the_line_of_pairs_is_that_of_the_documentation():
    settings = GenerationSettings("a", guidance=3.0, seed=1, image="x.png", strength=0.75)
    text = a1111_parameters(settings, replace(PROVENANCE, width=40, height=40))
    assert text == (
        "a\nNegative prompt: \nSteps: 30, Sampler: DPM++ 2M, CFG scale: 3, Seed: 1, Size: 40x40, Model hash: 0123456789, "
        "Model: a model, Denoising strength: 0.75, Version: ldm 0.1.0"
    )
    assert "Sampler: DDIM, " in a1111_parameters(settings, replace(PROVENANCE, scheduler="ddim"))
    assert "Sampler: ddpm, " in a1111_parameters(settings, replace(PROVENANCE, scheduler="ddpm"))


def test_comfyui_finds_where_the_parts_begin():
    text = a1111_parameters(replace(SETTINGS, negative=""), PROVENANCE)
    steps = text.rindex("\nSteps:")
    assert text[text.rindex("\nNegative prompt:", 0, steps) + 18 : steps].strip() == ""


def test_a_prompt_beyond_latin_letters_stands_in_an_international_chunk(tmp_path):
    for prompt, kind in (("un été", b"tEXt"), ("赤い輪 🎨", b"iTXt")):
        path = saved(tmp_path, replace(SETTINGS, prompt=prompt))
        assert Image.open(path).info["parameters"].startswith(prompt + "\n")
        assert next(found for found, data in chunks(path) if data.startswith(b"parameters\0")) == kind


@pytest.mark.parametrize(("mask", "kind"), [(None, "trained"), ("mask.png", "compositeWithTrained")])
def test_the_mark_of_generated_media_is_xmp_that_parses(tmp_path, mask, kind):
    path = saved(tmp_path, replace(SETTINGS, image=mask, mask=mask))
    packet = ElementTree.fromstring(Image.open(path).info["XML:com.adobe.xmp"].lstrip("\ufeff"))
    (found,) = packet.iter("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    want = "trainedAlgorithmicMedia" if kind == "trained" else "compositeWithTrainedAlgorithmicMedia"
    assert found.text == f"http://cv.iptc.org/newscodes/digitalsourcetype/{want}"


# ---- files from anyone


def test_what_is_no_image_of_ours_is_refused_in_one_line(tmp_path):
    assert "No such file" in refused(tmp_path / "none.png")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "text.png").write_text("a red ring")
    IMAGE.save(tmp_path / "x.jpg")
    for name in ("text.png", "x.jpg"):
        assert "is not a whole PNG" in refused(tmp_path / name)
    IMAGE.save(tmp_path / "other.png")
    assert "holds no settings of ldm" in refused(tmp_path / "other.png")


def test_a_file_cut_or_changed_anywhere_is_refused(tmp_path):
    data = saved(tmp_path).read_bytes()
    for length in (0, 20, len(data) // 4, len(data) // 2, len(data) - 20, len(data) - 5):
        (tmp_path / "cut.png").write_bytes(data[:length])
        refused(tmp_path / "cut.png")
    middle = len(data) // 2
    (tmp_path / "flipped.png").write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    refused(tmp_path / "flipped.png")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "{}", '{"settings": {"prompt": "a"}}'),
        "[" * 100_000,
        '{"settings": {"prompt": "a", "guidance": NaN}, "provenance": {}}',
        '{"settings": {"prompt": "a", "guidance": 1' + "0" * 400 + '}, "provenance": {}}',
        '{"settings": {"prompt": "a", "guidance": 1e999}, "provenance": {}}',
        '{"settings": {"prompt": "' + "a" * (1 << 20) + '"}, "provenance": {}}',
    ],
)
def test_a_broken_chunk_is_refused_in_one_line(tmp_path, text):
    refused(with_chunk(tmp_path / "x.png", text))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("settings", "prompt", 3),
        ("settings", "steps", "__import__('os')"),
        ("settings", "seed", -1),
        ("settings", "seed", True),
        ("settings", "scheduler", ["ddim"] * 10_000),
        ("settings", "guidance_rule", "x" * 100_000),
        ("settings", "y" * 100_000, 1),
        ("provenance", "model_hash", "zz"),
        ("provenance", "model_hash", 5),
        ("provenance", "device", "x" * 1000),
        ("provenance", "width", 0),
        ("provenance", "tiled", "yes"),
        ("provenance", "extra", "x"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_one_line(tmp_path, part, name, value):
    refused(changed(saved(tmp_path), lambda content: content[part].update({name: value})))


def test_a_compressed_chunk_cannot_fill_the_memory(tmp_path):
    chunk = b"ldm\0\0" + zlib.compress(b" " * (2 << 20))
    data = saved(tmp_path, metadata=False).read_bytes()
    whole = struct.pack(">I", len(chunk)) + b"zTXt" + chunk + struct.pack(">I", zlib.crc32(b"zTXt" + chunk))
    (tmp_path / "bomb.png").write_bytes(data[:33] + whole + data[33:])
    refused(tmp_path / "bomb.png")


def chunks(path):
    """(kind, content) of every chunk, read without Pillow."""
    data, at = path.read_bytes(), 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += length + 12


# ---- where it comes from


@pytest.fixture(scope="module")
def saved_pipeline(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "shapes"
    make_pipeline().save_pretrained(folder)
    return folder


def test_the_hash_follows_the_model_and_nothing_else(tmp_path, monkeypatch):
    model = tmp_path / "model"
    write_json(model / "model_index.json", {"_class_name": "x", "tokenizer": ["transformers", "x"], "none": [None, None]})
    write_json(model / "tokenizer" / "tokenizer.json", {})
    first = model_hash(model)
    (model / "README.md").write_text("a card")
    (model / "metrics").mkdir()
    write_json(model / "metrics" / "metrics.json", {})
    assert model_hash(model) == first and len(first) == 64
    write_json(model / "tokenizer" / "tokenizer.json", {"a": 1})
    second = model_hash(model)
    (model / "tokenizer" / "vocabulary.txt").write_text("a")
    assert len({first, second, model_hash(model)}) == 3
    moved = model.rename(tmp_path / "moved")
    (moved / "tokenizer" / "vocabulary.txt").unlink()
    assert model_hash(moved) == second
    monkeypatch.setattr("ldm.inference.metadata.sha256_file", None)
    assert model_hash(moved / ".." / "moved") == second  # nothing is read again


def test_provenance_says_what_draws(saved_pipeline):
    pipeline = open_pipeline(saved_pipeline)
    found = provenance_of(pipeline, saved_pipeline)
    assert (found.model, found.model_hash) == ("shapes", model_hash(saved_pipeline))
    assert (found.scheduler, found.sampler) == ("euler", "FlowMatchEulerDiscreteScheduler")
    assert (found.dtype, found.width) == ("float32", None) and found.device.startswith(pipeline.device.type)
    pipeline.scheduler = make_scheduler("dpm++2m-sde", *pipeline.diffusion)
    pipeline.vae.enable_tiling()
    again = provenance_of(pipeline, saved_pipeline)
    assert again == replace(found, scheduler="dpm++2m-sde", sampler="DPMSolverMultistepScheduler", tiled=True)


def test_an_image_is_drawn_again_bit_for_bit(saved_pipeline, tmp_path):
    ancestral = {"scheduler": "euler-ancestral", "guidance_rescale": 0.5, "guidance_interval": (0.2, 1.0)}
    wanted = [
        GenerationSettings("a red ring", seed=3, steps=2),
        GenerationSettings("a\nblue, star", "blur", 4, 3, 5.0, "apg", width=32, height=24),
        GenerationSettings("a ring", seed=5, steps=3, **ancestral),
    ]
    pipeline = open_pipeline(saved_pipeline)
    for number, one, image, _ in ImageGenerator(pipeline).generate(wanted):
        save_png(image, tmp_path / f"{number}.png", one, provenance_of(pipeline, saved_pipeline))
    pipeline = open_pipeline(saved_pipeline)
    for number in range(len(wanted)):
        one, provenance = read_png(tmp_path / f"{number}.png")
        ((_, _, again, _),) = ImageGenerator(pipeline).generate([one])
        image = Image.open(tmp_path / f"{number}.png")
        assert np.array_equal(np.asarray(image), np.asarray(again)) and image.size == (provenance.width, provenance.height)
        assert len(np.unique(np.asarray(image))) > 50 and provenance.model_hash == model_hash(saved_pipeline)


@pytest.mark.parametrize(
    "diffusion", [(RectifiedFlow(), Velocity()), (VariancePreserving(), V()), (VarianceExploding(), Preconditioned())]
)
def test_a_scheduler_knows_its_name(diffusion):
    for name in samplers_for(*diffusion):
        assert sampler_name(make_scheduler(name, *diffusion)) == name
    assert sampler_name(DPMSolverMultistepScheduler()) == "dpm++2m"
    assert sampler_name(cast(Scheduler, PNDMScheduler())) == "PNDMScheduler"
