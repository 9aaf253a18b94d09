"""``kill -9``, a full disk and bad input for a real ``ldm latents export``.

No half shard is ever to be seen, and the bytes in the end are those of a quiet run.

Most of them are forks that start at once, see ``warm.py``.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.check import check_folder
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest, tar_paths
from ldm.data.writer import ShardWriter, encode_png
from ldm.latents.claims import WORK_NAME
from ldm.models.autoencoder import load_autoencoder

from .warm import Fork, fork

# a random while after: the start, the first piece of a shard, the first whole shard of this process, the last shard of all
MOMENTS = ["start"] * 5 + ["piece"] * 6 + ["shard"] * 6 + ["last"] * 3
COLD = ("start", "piece")  # the first kill at each is that of a real command line
LIMIT_SECONDS = 300
SIZES = (26, 15, 30, 4, 23, 19, 29, 21)
SHAPES = ((32, 32), (24, 40), (40, 24))  # several chunks in each shard: it is under way for a while
WORDS = ("red", "tiny", "ring", "cross", "above", "a", "dark", "green", "background", "star")


class Files(NamedTuple):
    """What the exports of one test work on."""

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
        """Its exit code, and the lines that it said."""
        code, said = self.start(out, *more, **how).end()
        return code, said.splitlines()


def make_image(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(SHAPES[number % len(SHAPES)], Image.Resampling.BICUBIC)


def write(folder: Path, sizes: tuple[int, ...], spoilt: dict[int, Any] | None = None, captioned: bool = True) -> Path:
    """Shards of so many images with two captions each; ``spoilt`` makes other bytes of those of some numbers."""
    folder.mkdir()
    entries, number = [], 0
    for shard, size in enumerate(sizes):
        with ShardWriter(folder, "x", samples_per_shard=None, first_index=shard) as writer:
            for number in range(number, number + size):  # noqa: B020
                png = encode_png(make_image(number))
                files = {"png": (spoilt or {}).get(number, bytes)(png)}
                choose = random.Random(number)
                captions = [" ".join(choose.choices(WORDS, k=choose.randrange(2, 9))), choose.choice(WORDS)]
                if captioned:
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


def phase(out: Path, shards: int) -> str:
    """What a dead export was at."""
    records = len([*(out / WORK_NAME).glob("[0-9]*.json")])
    tars = len(tar_paths(out)) if out.is_dir() else 0
    if (out / "manifest.json").is_file():
        return "behind the manifest"
    if not (out / WORK_NAME / "request.json").is_file():
        return "before the claim"
    if records == shards:
        return "finish"
    if [*out.glob(".latents*.tmp")]:
        return "in a shard"
    return "between tar and record" if tars > records else "before a shard"


# small batches: no shard is computed before its first piece is written
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
        if moment in COLD and moment not in moments[:killed]:
            process = subprocess.Popen(
                [sys.executable, "-m", "ldm", *files.arguments(out, *OPTIONS)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
            )
            running, starting = (lambda: process.poll() is None), 8  # noqa: B023
        else:
            process = files.start(out, *OPTIONS).process
            running, starting = process.is_alive, 1
        if moment:
            deadline = time.monotonic() + LIMIT_SECONDS
            while moment != "start" and running() and time.monotonic() < deadline:
                made = seen(f"{WORK_NAME}/0*.json")
                if moment == "piece" and seen(".latents*.tmp") - unfinished:
                    break
                # a busy machine may show no piece at all
                if len(made) == len(SIZES) if moment == "last" else made - records:
                    break
                time.sleep(0.01)
            time.sleep(draw.uniform(0, starting if moment == "start" else 0.03))
            process.kill()
        while running():
            time.sleep(0.05)
            for path in tar_paths(out) if out.is_dir() else ():
                assert path.read_bytes() == whole[path.name]
        code = process.exitcode if hasattr(process, "exitcode") else process.returncode
        if code == -signal.SIGKILL:
            phases[phase(out, len(SIZES))] += 1
            for path in tar_paths(out) if out.is_dir() else ():
                assert path.read_bytes() == whole[path.name]
            continue
        assert code == 0, (files.folder / "log").read_text()
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
def test_latents_that_are_not_finite_are_named_in_one_line(files: Files, tmp_path: Path) -> None:
    network = load_autoencoder(files.autoencoder)
    network.encoder.conv_in.bias.data[0] = float("nan")
    network.save_pretrained(tmp_path / "broken")
    code, (line,) = files._replace(autoencoder=tmp_path / "broken").run(tmp_path / "out")
    assert code == 1 and line.startswith(f"ldm: {files.shards / 'x-00000.tar'}: the latents of 000 are not finite; ")
    assert not tar_paths(tmp_path / "out") and not (tmp_path / "out" / "manifest.json").exists()


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


@pytest.mark.slow
@pytest.mark.parametrize("bad", [6, 110])
def test_a_shard_of_bad_images_alone_is_absent(files: Files, tmp_path: Path, bad: int) -> None:
    spoilt = {number: lambda png: b"none" for number in range(4, 4 + bad)}
    files = files._replace(shards=write(tmp_path / "spoilt", (4, bad, 5), spoilt))
    out = tmp_path / "out"
    code, said = files.run(out, "--max-bad-share", "1")
    assert code == 0, said
    manifest = Manifest.load(out, LATENT_SHARDS)
    assert [(entry.name, entry.samples) for entry in manifest.shards] == [("latents-00000.tar", 4), ("latents-00002.tar", 5)]
    assert manifest.extra["quarantined"] == bad == len((out / "quarantine.jsonl").read_text().splitlines())
    assert [path.name for path in tar_paths(out)] == [entry.name for entry in manifest.shards]
    problems, shards = check_folder(out, deep=True)
    assert not problems and [shard.good for shard in shards] == [4, 5]


@pytest.mark.slow
def test_nothing_to_export_is_said_in_one_line(files: Files, tmp_path: Path) -> None:
    none = {number: lambda png: b"none" for number in range(5)}
    spoilt = files._replace(shards=write(tmp_path / "spoilt", (2, 3), none))
    code, said = spoilt.run(tmp_path / "out", "--max-bad-share", "1")
    assert code == 1 and said[-1].startswith(f"ldm: {tmp_path / 'out'}: no sample could be used; ")
    bare = files._replace(shards=write(tmp_path / "bare", (2, 3), captioned=False))
    code, said = bare.run(tmp_path / "out2")
    assert code == 1 and "000 has no caption; " in said[-1] and [line[:5] for line in said].count("ldm: ") == 1
    manifest = Manifest.load(bare.shards)
    Manifest(IMAGE_SHARDS, manifest.shards, {"captioned": 0}).save(bare.shards)
    code, (line,) = bare.run(tmp_path / "out3")
    assert code == 2 and line.startswith(f"ldm: {bare.shards} has no captions; ") and not (tmp_path / "out3").exists()


@pytest.fixture
def others(files: Files, tmp_path: Path) -> Iterator[Files]:
    """The same with another autoencoder."""
    torch.manual_seed(1)
    network = load_autoencoder(files.autoencoder)
    network.encoder.conv_out.bias.data += 1
    network.save_pretrained(tmp_path / "other")
    return files._replace(autoencoder=tmp_path / "other")


@pytest.mark.slow
def test_a_folder_that_holds_something_else_is_left_as_it_is(files: Files, others: Files, tmp_path: Path) -> None:
    finished, unfinished, mine, file = (tmp_path / name for name in ("finished", "unfinished", "mine", "file"))
    assert files.run(finished)[0] == 0
    assert files.run(unfinished, step=("before", "latents-00001.tar"))[0] == -signal.SIGKILL
    mine.mkdir()
    (mine / "notes").write_text("mine")
    file.write_text("mine")

    def state() -> dict[Path, tuple[int, bytes]]:
        paths = [file, *(path for folder in (finished, unfinished, mine) for path in folder.rglob("*") if path.is_file())]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    before = state()
    for export, out, says in (
        (others, finished, "holds a finished export with other settings (autoencoder: "),
        (files, mine, "already holds other work"),
        (files, file, "already holds other work"),
        (others, unfinished, "holds an unfinished export with other settings (autoencoder: "),
    ):
        code, (line,) = export.run(out)
        assert code == 2 and line.startswith(f"ldm: {out} {says}"), line
        assert state() == before
    # the same again is done already
    assert files.run(finished)[0] == 0 and state() == before
    code, (line,) = files.run(unfinished, "--flip")
    assert code == 2 and "unfinished export with other settings (flips: False, not True)" in line
    assert state() == before
    assert files.run(unfinished)[0] == 0 and contents(unfinished) == contents(finished)
