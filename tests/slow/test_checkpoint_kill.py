"""Checkpoints under kill -9, on a full disk, and with a flipped byte."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from ldm.runs.checkpoints.files import checkpoint_summary, latest_checkpoint, load_checkpoint
from ldm.runs.layout import checkpoints_in, step_of
from tests.tiny import TinyRuns

from . import warm
from .conftest import run

pytestmark = pytest.mark.slow
KILLS = 30


def test_after_thirty_kills_during_saves_there_is_always_a_whole_checkpoint(tmp_path: Path) -> None:
    """Not older than the last one whose save returned, with TMPDIR on another file system."""
    memory = Path("/dev/shm")
    assert memory.stat().st_dev != tmp_path.stat().st_dev
    saver = Path(__file__).with_name("checkpoint_saver.py")
    status, said = run([sys.executable, str(saver), str(tmp_path), str(KILLS), "0"], 300, TMPDIR=str(memory))
    assert status == 0, said
    assert int(said.split()[-1]) >= KILLS // 6, "too few of the kills fell into a write"


def test_both_processes_end_with_the_same_error_if_the_first_cannot_write(tmp_path: Path) -> None:
    script = Path(__file__).with_name("checkpoint_ranks.py")
    status, said = warm.run([sys.executable, str(script), str(tmp_path)], tmp_path, processes=2)
    assert status == 0, said
    for background in (False, True):
        lines = [line for line in said.splitlines() if f", background {background}: " in line]
        assert sorted(line[:6] for line in lines) == ["rank 0", "rank 1"], said
        assert len({line[6:] for line in lines}) == 1 and "could not be written (File too large" in lines[0], said
        # in the background another write may have been under way
        assert step_of(latest_checkpoint(tmp_path / f"background-{background}" / "checkpoints")) >= 3 - background


def test_a_full_disk_stops_both_processes_and_the_run_resumes_from_the_last_whole_checkpoint(
    tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    limit = {"class_path": "tests.slow.injected.LimitFileSize", "init_args": {"step": 7}}
    saving = ("--checkpoints.every_steps", "2")
    command = tiny_runs.command("denoiser", tmp_path / "run", *saving, "--trainer.callbacks", json.dumps([limit]))
    status, said = run(tiny_runs.torchrun(command), 180)
    assert status == 1, said
    lines = [line for line in said.splitlines() if line.startswith("ldm: ")]
    assert lines and all("step=00000008.ckpt could not be written (File too large, it takes " in line for line in lines), said
    assert "Traceback (most recent call last)" not in said.split("ldm: ")[0]
    assert [step_of(path) for path in checkpoints_in(folder)] == [4, 6]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]

    newest = latest_checkpoint(folder)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    command = tiny_runs.command("denoiser", tmp_path / "run", *saving, "--resume", "latest")
    status, said = warm.run(command, tmp_path)
    assert status == 0, said
    assert f"{newest} is broken" in said and "trying the one before" in said
    assert [step_of(path) for path in checkpoints_in(folder)] == [6, 8]
    assert os.readlink(folder / "last.ckpt") == "step=00000008.ckpt"
    # a real checkpoint holds weights and plain values alone, and its summary is complete
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint.keys() == load_checkpoint(folder / "last.ckpt").keys()
    said = checkpoint_summary(checkpoint)
    for part in ("step 8", "learning rate ", "averaged over 8 steps", "samples of it consumed", "random states of 1 process"):
        assert part in said
