"""Several processes export together: the bytes are those of one process, whichever of them is late or dies.

torchrun itself runs once; the other tests give its environment to forks that start at once, see ``warm.py``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from ldm.data.manifest import IMAGE_SHARDS, MANIFEST_NAME, Manifest
from ldm.data.writer import ShardWriter, encode_png
from ldm.latents.claims import WORK_NAME
from ldm.models.autoencoder import AutoencoderConfig

from .test_export_kill import WORDS, contents
from .warm import Fork, fork

ROOT = Path(__file__).parents[2]
SIZES = (5, 1, 8, 3, 6)
LIMIT_SECONDS = 300
NAMES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}


class Files(NamedTuple):
    """Image shards by their number, and what one process exports from them."""

    folder: Path
    text_encoder: str
    shards: dict[int, Path]
    whole: dict[int, dict[str, Any]]

    def arguments(self, count: int, out: Path) -> list[str]:
        # batches of one, so that a process does not claim all shards ahead
        given = {"autoencoder": self.folder / "autoencoder", "text-encoder": self.text_encoder, "shards": self.shards[count]}
        given |= {"out": out, "threads": 1, "batch-size": 1, "max-bad-share": 0.1}
        return ["latents", "export", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]

    def start(self, count: int, out: Path, rank: int = 0, world_size: int = 1, by: str = "torchrun", hold: str = "") -> Fork:
        """``hold``: before the file of this name is renamed to it, wait for ``go`` beside ``out``."""
        environment = dict(zip(NAMES[by], map(str, (rank, world_size, rank, world_size)), strict=True))
        log = Path(f"{out}-{rank}.log")
        return fork(log, self.arguments(count, out), environment, step=("before", hold), act="hold")


def write(folder: Path, sizes: tuple[int, ...]) -> Path:
    """Captioned shards of so many images; the third of all is not an image."""
    folder.mkdir()
    entries, keys = [], iter(range(sum(sizes)))
    for shard, size in enumerate(sizes):
        with ShardWriter(folder, "x", first_index=shard) as writer:
            for _, key in zip(range(size), keys, strict=False):
                draw = np.random.default_rng(key)
                image = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                caption = " ".join(random.Random(key).choices(WORDS, k=2 + key % 9))
                writer.write(f"{key:02d}", {"png": b"none" if key == 2 else encode_png(image), "txt": caption.encode()})
        entries += writer.entries
    Manifest(IMAGE_SHARDS, tuple(entries)).save(folder)
    return folder


@pytest.fixture(scope="module")
def files(tiny_text_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """1, 3 and 5 shards, and the export of each by one undisturbed process."""
    folder = tmp_path_factory.mktemp("export")
    AutoencoderConfig([8, 16], 4, 1, 4, False, 16).build().save_pretrained(folder / "autoencoder")
    sizes = {1: (11,), 3: SIZES[:3], 5: SIZES}
    files = Files(folder, tiny_text_encoder, {count: write(folder / f"shards{count}", sizes[count]) for count in sizes}, {})
    for count in sizes:
        out = folder / f"whole{count}"
        succeed(files.start(count, out))
        files.whole[count] = bytes_and_places(out)
        assert len(files.whole[count]) == count + 3  # with the manifest, the null text and the quarantine
    return files


def until(happens: Any) -> None:
    """Wait for it, for a limited time."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def succeed(*ranks: Fork) -> None:
    for code, said in [rank.end() for rank in ranks]:
        assert code == 0, said


def bytes_and_places(out: Path) -> dict[str, Any]:
    """Every file's bytes; the manifest with the places that it names, which are relative to its folder, resolved."""
    manifest = json.loads((out / MANIFEST_NAME).read_bytes())
    for named in (manifest, *manifest["text_encoders"]):
        for key in {"source_shards", "folder"} & named.keys():
            named[key] = str((out / named[key]).resolve())
    return contents(out) | {MANIFEST_NAME: manifest}


def is_same(files: Files, count: int, out: Path) -> bool:
    return bytes_and_places(out) == files.whole[count] and not (out / WORK_NAME).exists()


@pytest.mark.slow
def test_torchrun_gives_the_bytes_of_one_process(files: Files, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ldm"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, *files.arguments(3, out)], env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert is_same(files, 3, out)
    # only one of them prints
    assert done.stdout.count(f"13 latents in 3 shards: {out}") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "world_size", "by"), [(1, 2, "torchrun"), (3, 2, "slurm"), (5, 2, "torchrun"), (5, 3, "torchrun")]
)
def test_any_number_of_processes_gives_the_same_bytes(
    files: Files, tmp_path: Path, count: int, world_size: int, by: str
) -> None:
    out = tmp_path / "out"
    succeed(*[files.start(count, out, rank, world_size, by) for rank in range(world_size)])
    assert is_same(files, count, out)


@pytest.mark.slow
def test_a_process_that_starts_after_the_end_is_done_at_once(files: Files, tmp_path: Path) -> None:
    """As on a node that starts late."""
    for rank in range(2):
        succeed(files.start(1, tmp_path / "out", rank, 2))
        assert is_same(files, 1, tmp_path / "out")


@pytest.mark.slow
def test_a_process_that_waits_while_another_finishes_is_done_too(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = files.start(3, out, 0, 2, hold="manifest.json")
    until((tmp_path / "held-manifest.json").exists)
    second = files.start(3, out, 1, 2)
    until((tmp_path / "waits-1").exists)
    (tmp_path / "go").touch()
    succeed(first, second)
    assert is_same(files, 3, out)


@pytest.mark.slow
def test_the_shard_of_a_dead_process_is_taken_over_by_the_living(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dying = files.start(5, out, 1, 2, hold="latents-00001.tar")
    until((tmp_path / "held-latents-00001.tar").exists)
    living = files.start(5, out, 0, 2)
    # it exports its own, then waits for the shard that the other one claimed
    until(lambda: {"00000.json", "00002.json", "00004.json"} <= {path.name for path in (out / WORK_NAME).iterdir()})
    assert not (out / WORK_NAME / "00001.json").exists() and [*out.glob(".latents-00001.tar.*.tmp")]
    dying.process.kill()
    assert dying.end()[0] == -signal.SIGKILL
    succeed(living)
    assert is_same(files, 5, out)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
def test_what_dead_processes_left_another_number_finishes(files: Files, tmp_path: Path, world_size: int) -> None:
    out = tmp_path / "out"
    dying = []
    # the first takes shards 1 and 3, which leaves 0, 2 and 4 to the second
    for rank, shard in ((1, 1), (0, 4)):
        dying.append(files.start(5, out, rank, 2, hold=f"latents-0000{shard}.tar"))
        until((tmp_path / f"held-latents-0000{shard}.tar").exists)
    for rank in dying:
        rank.process.kill()
        assert rank.end()[0] == -signal.SIGKILL
    assert len([*out.glob(".*.tmp")]) == 2
    assert sorted(path.name for path in out.glob("*.tar")) == ["latents-00000.tar", "latents-00002.tar"]
    stand = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    succeed(*[files.start(5, out, rank, world_size) for rank in range(world_size)])
    assert is_same(files, 5, out)
    assert {path: path.stat().st_mtime_ns for path in stand} == stand  # made once
