"""Hostile requests: numbers, names, prompt files, configs and tables that nobody means, each refused in one line or served."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from .conftest import faults_of

NUMBERS = ("0", "-1", "nan", "inf", "-inf", "1e308", "1e400", "1" * 30, "9" * 5000, "0.5", "", " ", "x", "1,2", "0x10", "1_0")
NAMES = (
    "",
    ".",
    "/",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "a" * 300,
    "a\nb",
    "\x1b]0;title\x07",
    "\udcff",
    "nul\0byte",
    "--",
    "~",
    "😀" * 80,
)

# a command that would succeed, with a place for the option's value
OPTIONS = {
    "sample": ["sample", "pipeline", "a ring", "--out", "new", "--steps", "1"],
    "interpolate": ["interpolate", "pipeline", "a ring", "a star", "--out", "new", "--frames", "2", "--steps", "1"],
    "export": [
        "latents",
        "export",
        "--autoencoder",
        "autoencoder",
        "--shards",
        "shards",
        "--out",
        "new",
        "--text-encoder",
        "minilm",
    ],
    "shapes": ["shards", "shapes", "new", "--count", "2", "--size", "32"],
    "pack": ["shards", "pack", "photos", "new", "--size", "32"],
    "fit": ["denoiser", "fit", "--config", "runs/denoiser/logs/config.yaml", "--out", "new"],
    "fit one": ["autoencoder", "fit", "--config", "runs/autoencoder/logs/config.yaml", "--out", "new"],
}
FLAGS = {
    "sample": ["--steps", "--guidance", "--seed", "--count", "--width", "--height", "--batch-size", "--rescale"],
    "interpolate": ["--frames", "--fps", "--steps"],
    "export": ["--batch-size", "--shard-size", "--workers"],
    "shapes": ["--count", "--size", "--seed", "--shard-size"],
    "pack": ["--size", "--shard-size", "--workers", "--min-size"],
    "fit": [
        "--trainer.max_steps", "--trainer.val_check_interval", "--trainer.devices", "--trainer.accumulate_grad_batches",
        "--trainer.gradient_clip_val", "--trainer.log_every_n_steps", "--trainer.accelerator", "--trainer.precision",
        "--data.batch_size", "--data.workers", "--data.validation_samples", "--model.optimiser.learning_rate",
        "--model.denoiser.init_args.width", "--model.denoiser.init_args.num_layers", "--model.seed", "--seed_everything",
    ],
    "fit one": [
        "--trainer.max_steps", "--trainer.val_check_interval", "--trainer.accumulate_grad_batches",
        "--trainer.gradient_clip_val", "--data.image_size", "--data.batch_size",
        "--model.autoencoder.layers_per_block", "--model.autoencoder.latent_channels",
        "--model.adversary.start",
    ],
}  # fmt: skip
PARTS = {
    "sample": ("pipeline",),
    "interpolate": ("pipeline",),
    "export": ("autoencoder", "shards"),
    "shapes": (),
    "pack": (),
    "fit": ("runs", "latents", "autoencoder"),
    "fit one": ("runs", "shards"),
}


def photos(folder: Path) -> None:
    (folder / "photos").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 0, 0)).save(folder / f"photos/{number}.png")
        (folder / f"photos/{number}.txt").write_text(f"red number {number}")


@pytest.mark.parametrize("command", OPTIONS)
def test_numbers_that_nobody_means(command: str, here: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    chance, wrong = random.Random(command), []
    for flag in FLAGS[command]:
        for value in chance.sample(NUMBERS, 2 if "fit" in command else 4):
            folder = here(*PARTS[command])
            if command == "pack":
                photos(folder)
            faults = faults_of([*OPTIONS[command], f"{flag}={value}"], capsys, folder / "new")
            wrong += [f"{flag}={value[:40]}: {fault}" for fault in faults]
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("command", OPTIONS)
def test_names_that_nobody_means(command: str, here: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for name in NAMES:
        for place in [
            number
            for number, word in enumerate(OPTIONS[command])
            if word in ("new", "pipeline", "photos", "shards", "autoencoder")
        ]:
            folder = here(*PARTS[command])
            if command == "pack":
                photos(folder)
            arguments = [*OPTIONS[command][:place], name, *OPTIONS[command][place + 1 :]]
            if place < 2 and OPTIONS[command][place] in ("shards", "autoencoder"):
                continue  # the command's own name
            wrong += [f"{arguments!r:.120}: {fault}" for fault in faults_of(arguments, capsys)]
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


PROMPT_FILES = {
    "many.jsonl": '{"prompt": "a ring", "count": 10000000}\n',
    "steps.jsonl": '{"prompt": "a ring", "steps": 1000000000000000}\n',
    "types.jsonl": '{"prompt": ["a"], "seed": {}}\n',
    "nan.jsonl": '{"prompt": "a ring", "guidance": NaN}\n',
    "digits.jsonl": '{"prompt": "a ring", "seed": ' + "9" * 5000 + "}\n",
    "deep.jsonl": "[" * 100_000 + "\n",
    "null.jsonl": "null\n",
    "image.jsonl": '{"prompt": "a ring", "image": "/dev/zero"}\n',
    "latin.txt": "caf\xe9\n",
    "nul.txt": "a\0b\n",
    "escape.txt": "a ring \x1b]0;title\x07\n",
    "long.txt": "a ring " * 100_000 + "\n",
    "empty.txt": "",
    "blank.txt": "\n\n\n",
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompt_files(name: str, here: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = here("pipeline")
    (folder / name).write_bytes(PROMPT_FILES[name].encode("latin-1"))
    arguments = ["sample", "pipeline", "--prompts", name, "--out", "new", "--steps", "1"]
    assert faults_of(arguments, capsys) == []


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n" for before, after in pairwise("abcdefghij")
)
CONFIGS = {
    "bomb": BOMB,
    "cycle": "model: &m\n  denoiser: *m\n",
    "list": "- 1\n- 2\n",
    "text": "just text\n",
    "empty": "",
    "null sections": "model: null\ndata: null\ntrainer: null\n",
    "python tag": "model: !!python/object/apply:os.system ['touch owned']\n",
    "class": "model:\n  denoiser:\n    class_path: os.system\n    init_args: {command: touch owned}\n",
    "class of another kind": "model:\n  denoiser:\n    class_path: pathlib.Path\n",
    "no class": "model:\n  denoiser:\n    class_path: [1]\n",
    "date": "trainer:\n  max_steps: 2020-01-01\n",
    "binary": "trainer: !!binary aGVsbG8=\n",
    "nul": "trainer:\n  max_steps: 1\0\n",
    "deep": "[" * 3000,
    "deep keys": "".join(f"{' ' * level}a:\n" for level in range(500)),
    "duplicate": "trainer: {max_steps: 1}\ntrainer: {max_steps: 2}\n",
    "unknown": "optimizer: {lr: 1}\n",
    "number keys": "1: 2\n3: 4\n",
    "tab": "trainer:\n\tmax_steps: 1\n",
    "digits": f"trainer:\n  max_steps: {'9' * 5000}\n",
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_configs(stage: str, name: str, here: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = here("runs", "latents", "autoencoder", "shards")
    (folder / "hostile.yaml").write_text(CONFIGS[name])
    arguments = [stage, "fit", "--config", f"runs/{stage}/logs/config.yaml", "--config", "hostile.yaml", "--out", "new"]
    assert faults_of(arguments, capsys, None if name in ("empty", "duplicate") else folder / "new") == []
    assert not (folder / "owned").exists()


TABLES = {
    "cells.csv": "file,caption\n0.png,a red ring, on a table\n1.png,fine\n",
    "quote.csv": 'file,caption\n0.png,"open\n1.png,swallowed\n',
    "paths.csv": "file,caption\n../../../etc/passwd,a\n/dev/zero,b\n0.png,fine\n",
    "escape.csv": "file,caption\n\x1b]0;title\x07.png,a\n0.png,fine\n",
    "nul.csv": "file,caption\n0.png,a\0b\n1.png,fine\n",
    "types.jsonl": '{"file": 1, "caption": []}\n{"file": "0.png", "caption": {"a": 1}}\nnull\n[1]\n',
    "digits.jsonl": '{"file": "0.png", "caption": ' + "9" * 5000 + "}\n",
    "deep.jsonl": "[" * 100_000 + "\n",
    "empty.csv": "",
    "noise.parquet": "PAR1 and nothing else PAR1",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, here: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = here()
    photos(folder)
    (folder / "photos" / name).write_text(TABLES[name])
    assert faults_of(["shards", "pack", "photos", "new", "--size", "32", "--captions", f"photos/{name}"], capsys) == []


def test_files_in_a_folder_that_is_packed(here: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = here()
    photos(folder)
    os.mkfifo(folder / "photos/pipe.png")
    (folder / "photos/zero.png").symlink_to("/dev/zero")
    (folder / "photos/loop").symlink_to(".")
    (folder / "photos/eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with open(os.fsencode(folder / "photos") + b"/\xff.png", "wb") as file:
        file.write((folder / "photos/0.png").read_bytes())
    (folder / "photos/\x1b]0;title\x07.png").write_bytes((folder / "photos/0.png").read_bytes())
    with open(folder / "photos/sparse.png", "wb") as file:
        file.truncate(2**40)
    assert faults_of(["shards", "pack", "photos", "new", "--size", "32"], capsys) == []
