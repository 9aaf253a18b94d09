"""Runs in which a process is lost, hangs, stalls or runs out of memory: the others end in time with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import TinyRuns

from .conftest import run
from .test_preemption import AT, TWO, injected, last_checkpoint, signal_at

LOST = f"ldm: a process of this run has gone or does not answer, as seen at step {AT} on rank 0: "


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_one_line_and_a_checkpoint_stays(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    killed = [*signal_at(9, rank=1), "--checkpoints.every_steps", "2"]
    command = tiny_runs.command("denoiser", tmp_path / "run", *killed, steps=10_000)
    status, said = run(tiny_runs.torchrun(command))
    assert status == 1 and said.count(LOST) == 1 and "--resume latest" in said, said
    assert last_checkpoint(tmp_path / "run")["global_step"] == 2


@pytest.mark.slow
def test_out_of_memory_on_one_process_names_the_settings_and_ends_both(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    fault = injected("injected.RunOutOfMemory", step=AT, rank=1)
    command = tiny_runs.command("autoencoder", tmp_path / "run", *fault, *TWO, steps=10_000)
    status, said = run(command)
    assert status == 1 and f"ldm: out of memory at step {AT} on rank 1: lower data.batch_size; raise model.accumulate" in said
    assert said.count(LOST) == 1 and "Traceback" not in said, said


@pytest.mark.slow
def test_a_process_that_hangs_is_killed_after_the_timeout(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    fault = injected("injected.Hang", step=AT, rank=1)
    limit = ["--trainer.strategy", "lightning.pytorch.strategies.DDPStrategy", "--trainer.strategy.timeout", "0:00:30"]
    command = tiny_runs.command("denoiser", tmp_path / "run", *fault, "--trainer.devices", "2", *limit, steps=10_000)
    status, said = run(command, 180)
    assert status == 1 and said.count(LOST) == 1 and "Timed out waiting" in said, said


@pytest.mark.slow
def test_a_loader_that_stalls_on_one_process_is_named_and_ends_both(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    fault = [*injected("injected.StallReading", step=AT, rank=1), "--data.max_wait_seconds", "3"]
    command = tiny_runs.command("denoiser", tmp_path / "run", *fault, steps=10_000)
    status, said = run(tiny_runs.torchrun(command))
    assert status == 1 and "ldm: the loader of rank 1 has stalled: no batch for 3 s, to be read from " in said, said
    assert "latents-0000" in said and "a process of this run has gone" in said, said
