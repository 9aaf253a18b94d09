"""``kill -9``, a full disk and bad input for a real ``ldm latents export``.

No partial shard is ever visible, and the final bytes are those of an undisturbed run. Most processes are forks that start at
once, see ``warm.py``.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest, tar_paths
from ldm.data.writer import ShardWriter, encode_png
from ldm.latents.claims import WORK_NAME

from .warm import Fork, fork

# kills a random while after: the start, the first bytes of a shard, this process's first complete shard, the last shard of all
MOMENTS = ["start"] * 2 + ["bytes"] * 3 + ["shard"] * 3 + ["last"] * 2
COLD = "bytes"  # the first kill at this moment is of a real command line
LIMIT_SECONDS = 300
SIZES = (26, 15, 30, 4, 23, 19, 29, 21)
SHAPES = ((32, 32), (24, 40), (40, 24))  # several chunks in each shard, so that writing takes a while
WORDS = ("red", "tiny", "ring", "cross", "above", "a", "dark", "green", "background", "star")


class Files(NamedTuple):
    """The inputs of one test's exports."""

    folder: Path
    autoencoder: Path
    text_encoder: str
    shards: Path

    def arguments(self, out: Path, *more: str) -> list[str]:
        given = {"autoencoder": self.autoencoder, "text-encoder": self.text_encoder, "shards": self.shards}
        given |= {"out": out, "threads": 1}
        return ["latents", "export", *(part for name, value in given.items() for part in (f"--{name}", str(value))), *more]

    def start(self, out: Path, *more: str, **how: Any) -> Fork:
        return fork(self.folder / "log", self.arguments(out, *more), **how)

    def run(self, out: Path, *more: str, **how: Any) -> tuple[int, list[str]]:
        """Its exit code and the lines of its output."""
        code, said = self.start(out, *more, **how).end()
        return code, said.splitlines()


def make_image(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(SHAPES[number % len(SHAPES)], Image.Resampling.BICUBIC)


def write(folder: Path, sizes: tuple[int, ...], spoilt: dict[int, Any] | None = None) -> Path:
    """Shards of so many images with two captions each; ``spoilt`` replaces the bytes of some."""
    folder.mkdir()
    entries, number = [], 0
    for shard, size in enumerate(sizes):
        with ShardWriter(folder, "x", samples_per_shard=None, first_index=shard) as writer:
            for number in range(number, number + size):  # noqa: B020
                png = encode_png(make_image(number))
                files = {"png": (spoilt or {}).get(number, bytes)(png)}
                choose = random.Random(number)
                captions = [" ".join(choose.choices(WORDS, k=choose.randrange(2, 9))), choose.choice(WORDS)]
                files["json"] = json.dumps({"captions": captions}).encode()
                writer.write(f"{number:03d}", files)
            number += 1
        entries += writer.entries
    Manifest(IMAGE_SHARDS, tuple(entries)).save(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def files(tiny_autoencoder, tiny_text_encoder: str, tmp_path: Path) -> Files:
    """Forty images in three shards."""
    tiny_autoencoder.save_pretrained(tmp_path / "autoencoder")
    return Files(tmp_path, tmp_path / "autoencoder", tiny_text_encoder, write(tmp_path / "shards", (16, 5, 19)))


def phase(out: Path, shards: int, unfinished: set[str]) -> str:
    """What a killed export was doing; ``unfinished``: temporary files of those killed before."""
    records = len([*(out / WORK_NAME).glob("[0-9]*.json")])
    tars = len(tar_paths(out)) if out.is_dir() else 0
    if (out / "manifest.json").is_file():
        return "after the manifest"
    if not (out / WORK_NAME / "request.json").is_file():
        return "before the claim"
    if records == shards:
        return "finish"
    if {path.name for path in out.glob(".latents*.tmp")} - unfinished:
        return "in a shard"
    return "between tar and record" if tars > records else "before a shard"


# small batches, so that the first bytes of a shard are written before all of it is computed
OPTIONS = ("--flip", "--captions", "all", "--batch-size", "4")


@pytest.mark.slow
def test_an_export_killed_at_any_moment_ends_with_the_same_bytes(files: Files, tmp_path: Path) -> None:
    files = files._replace(shards=write(tmp_path / "more", SIZES))
    draw, phases, round = random.Random(14), Counter(), 0
    moments = draw.sample(MOMENTS, len(MOMENTS))
    assert files.run(tmp_path / "whole", *OPTIONS)[0] == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) == len(SIZES) + 2  # with the manifest and the null text

    def seen(pattern: str) -> set[str]:
        return {path.name for path in out.glob(pattern)}

    out = tmp_path / "0"
    while True:
        records, unfinished = seen(f"{WORK_NAME}/0*.json"), seen(".latents*.tmp")
        killed = phases.total()
        moment = moments[killed] if killed < len(moments) else None
        if moment == COLD and moment not in moments[:killed]:
            command = [sys.executable, "-m", "ldm", *files.arguments(out, *OPTIONS)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        else:
            process = files.start(out, *OPTIONS).process

        def status() -> int | None:
            return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode  # noqa: B023

        if moment:
            deadline = time.monotonic() + LIMIT_SECONDS
            while moment != "start" and status() is None and time.monotonic() < deadline:
                made = seen(f"{WORK_NAME}/0*.json")
                if moment == "bytes" and seen(".latents*.tmp") - unfinished:
                    break
                # on a busy machine the temporary file may never be seen
                if len(made) == len(SIZES) if moment == "last" else made - records:
                    break
                time.sleep(0.01)
            # the first one at once: whatever the machine's speed, one kill comes before any work
            if moment != "start" or moment in moments[:killed]:
                time.sleep(draw.uniform(0, 1 if moment == "start" else 0.03))
            process.kill()
        while status() is None:
            time.sleep(0.05)
            for path in tar_paths(out) if out.is_dir() else ():
                assert path.read_bytes() == whole[path.name]
        if status() == -signal.SIGKILL:
            phases[phase(out, len(SIZES), unfinished)] += 1
            for path in tar_paths(out) if out.is_dir() else ():
                assert path.read_bytes() == whole[path.name]
            continue
        assert status() == 0, (files.folder / "log").read_text()
        assert contents(out) == whole and not (out / WORK_NAME).exists()
        if phases.total() == len(moments):
            break
        round += 1
        out = tmp_path / f"{round}"
    print(dict(phases), f"in {round + 1} exports")
    assert len(phases) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("act", ["kill", "full"])
def test_an_export_stopped_at_every_step_ends_with_the_same_bytes(files: Files, tmp_path: Path, act: str) -> None:
    """Killed before and after every file gets its name, or with no room on the disk for it, one after another."""
    spoilt = {17: lambda png: png[: len(png) // 2]}
    files = files._replace(shards=write(tmp_path / "spoilt", (12, 8), spoilt))
    options = (*OPTIONS, "--max-bad-share", "0.1")
    assert files.run(tmp_path / "whole", *options)[0] == 0
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"
    assert sorted(whole) == [
        "latents-00000.tar",
        "latents-00001.tar",
        "manifest.json",
        "null_text.safetensors",
        "quarantine.jsonl",
    ]
    steps = ["request.json", "latents-00000.tar", "00000.json", "latents-00001.tar", "00001.json", "null_text.safetensors"]
    for name in (*steps, "manifest.json"):
        for when in ("before", "after") if act == "kill" else ("before",):
            code, said = files.run(out, *options, step=(when, name), act=act)
            if act == "kill":
                assert code == -signal.SIGKILL, (when, name)
            else:
                assert code == 1 and said[-1].startswith(f"ldm: {out} cannot be written (No space left on device); "), said
                assert not [*out.glob(".*.tmp")]
            for path in tar_paths(out):
                assert path.read_bytes() == whole[path.name]
            assert (out / "manifest.json").exists() == ((when, name) == ("after", "manifest.json"))
    assert files.run(out, *options)[0] == 0
    assert contents(out) == whole and not (out / WORK_NAME).exists()


@pytest.mark.slow
def test_no_room_for_one_shard_leaves_the_others_whole(files: Files, tmp_path: Path) -> None:
    """The system itself refuses to let a file grow."""
    assert files.run(tmp_path / "whole")[0] == 0
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"
    sizes = sorted(len(data) for name, data in whole.items() if name.endswith(".tar"))
    code, said = files.run(out, file_size=sizes[-1] - 1)
    assert code == 1
    assert [line for line in said if not line.startswith("exporting latents: ")] == [
        f"ldm: {out} cannot be written (File too large); fix that and run the same command again to resume"
    ]
    stand = {path.name: path.stat().st_mtime_ns for path in tar_paths(out)}
    assert [*stand] == ["latents-00000.tar", "latents-00001.tar"] and not [*out.glob(".*.tmp")]
    assert files.run(out)[0] == 0
    assert contents(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in stand} == stand


@pytest.mark.slow
def test_images_that_cannot_be_decoded_are_named_once_and_counted(files: Files, tmp_path: Path) -> None:
    spoilt = {3: lambda png: png[: len(png) // 2], 17: lambda png: bytes(len(png)), 30: lambda png: b""}
    files = files._replace(shards=write(tmp_path / "spoilt", (16, 5, 19), spoilt))
    out = tmp_path / "out"
    code, said = files.run(out, "--max-bad-share", "0.1")
    assert code == 0, said
    manifest = Manifest.load(out, LATENT_SHARDS)
    assert [entry.samples for entry in manifest.shards] == [15, 4, 18]
    assert manifest.samples + manifest.extra["quarantined"] == Manifest.load(files.shards).samples == 40
    records = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(record["shard"], record["key"]) for record in records] == [
        (str(files.shards / f"x-0000{shard}.tar"), key) for shard, key in enumerate(("003", "017", "030"))
    ]
    assert any(line.startswith("3 ") and f"could not be used; {out / 'quarantine.jsonl'} says why" in line for line in said)
    assert f"37 latents in 3 shards: {out}" in said
    for record in records:
        assert sum(record["key"] in line and line.startswith("skipped") for line in said) == 1, said
