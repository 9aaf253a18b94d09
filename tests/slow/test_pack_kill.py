"""``kill -9`` of a real ``ldm shards pack``: no partial shard is ever to be seen, and the bytes are those of a quiet run."""

import hashlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ldm.data.manifest import tar_paths
from ldm.data.pack.journal import JOURNAL_NAME
from ldm.data.pack.packer import pack
from ldm.data.shards import ShardReader

KILLS = 6
OPTIONS = {"size": 96, "shard_size": "300KB"}


@pytest.fixture
def src(tmp_path):
    """240 captioned images of 640 px, a few seconds' work; every eighth of them cannot be used."""
    src = tmp_path / "src"
    src.mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        noise = Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        noise.resize((800, 640), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.jpg", quality=95)
    (tmp_path / "7.jpg").write_bytes(b"no image")
    for number in range(240):
        (src / f"{number:03d}.jpg").symlink_to(tmp_path / f"{number % 8}.jpg")
        (src / f"{number:03d}.txt").write_text(f"image number {number}")
    return src


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def look(out, seen):
    """Every shard that can be seen opens whole, and never changes."""
    for path in tar_paths(out) if out.exists() else ():
        hashed = sha256(path)
        assert seen.setdefault(path.name, hashed) == hashed
        with ShardReader(path) as reader:
            assert reader.damage is None and len(reader) > 0


@pytest.mark.slow
def test_a_pack_killed_at_any_moment_ends_with_the_same_bytes(src, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    result = pack(src, whole, **OPTIONS)
    assert (result.packed, result.quarantined, result.found) == (210, 30, 240) and len(result.manifest.shards) > 10
    command = [sys.executable, "-m", "ldm", "shards", "pack", src, out]
    command += [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    moments, seen, killed = random.Random(0), {}, 0
    while True:
        journal = out / JOURNAL_NAME
        lines = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        if killed < KILLS:
            # from the first new shard on, or before there is any
            until = lines + (killed > 0)
            while process.poll() is None and (not journal.exists() or len(journal.read_bytes().splitlines()) <= until):
                time.sleep(0.01)
            for _ in range(moments.randrange(4)):
                look(out, seen)
                time.sleep(moments.uniform(0, 0.05))
            process.kill()
            killed += process.wait() == -signal.SIGKILL
        while process.poll() is None:
            look(out, seen)
            time.sleep(0.01)
        look(out, seen)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert not (out / "manifest.json").exists()
    assert killed == KILLS, "the pack was over before it could be killed: give it more to do"
    final = {path.name: path.read_bytes() for path in out.iterdir()}
    assert final == {path.name: path.read_bytes() for path in whole.iterdir()}
    assert seen == {path.name: sha256(path) for path in tar_paths(out)}
