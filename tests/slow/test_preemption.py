"""Runs that are asked to stop: they save within a step, say so once, leave with 143 and no process behind, and can go on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from ldm.runs.checkpoints.files import latest_checkpoint, load_checkpoint
from ldm.runs.layout import RunFolder

from .conftest import TinyRuns, run

AT = 3  # the step after which signals are sent
SECONDS = 30.0  # that a run which is asked to stop may take
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def injected(callback: str, **arguments: object) -> list[str]:
    """A callback as options."""
    options = [item for name, value in arguments.items() for item in (f"--trainer.callbacks.{name}", str(value))]
    return ["--trainer.callbacks+", callback, *options]


def signal_at(number: int, rank: int) -> list[str]:
    return injected("injected.SignalAt", steps=[AT], number=int(number), rank=rank)


def stops(command: list[str], out: Path, rank: int, /, **environment: str) -> tuple[int, str]:
    """Exit status and what was said of a run in which ``rank`` is asked to stop; it must be over in time.

    Over is when nobody holds its output any more: when no process is left.
    """
    status, said = run(command, **environment)
    over, asked = time.time(), out / f"signalled-{rank}-{AT}"
    assert asked.exists() and over - asked.stat().st_mtime < SECONDS, said
    (line,) = (line for line in said.splitlines() if line.startswith("ldm: ") and not line.startswith("ldm: saving"))
    assert line.startswith(f"ldm: stopped at step {AT} as asked; ") and "--resume latest" in line
    assert load_checkpoint(latest_checkpoint(RunFolder(out).checkpoints_folder))["global_step"] == AT
    return status, said


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rank"), [("denoiser", 0), ("autoencoder", 1)])
def test_two_processes_stop_together_whichever_of_them_is_asked(
    tiny_runs: TinyRuns, tmp_path: Path, stage: str, rank: int
) -> None:
    out = tmp_path / "run"
    command = tiny_runs.command(stage, out, *signal_at(signal.SIGTERM, rank), steps=10_000)
    status, said = stops(tiny_runs.torchrun(command), out, rank)
    # torchrun's own status is 1; it tells those of the processes
    assert status == 1 and said.count("exitcode  : 143") == 2, said


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rank", "number"), [("denoiser", 1, signal.SIGTERM), ("autoencoder", 0, signal.SIGUSR1)])
def test_so_they_do_where_the_command_starts_two_by_itself(
    tiny_runs: TinyRuns, tmp_path: Path, stage: str, rank: int, number: int
) -> None:
    out = tmp_path / "run"
    command = tiny_runs.command(stage, out, *signal_at(number, rank), *TWO, steps=10_000)
    status, said = stops(command, out, rank)
    assert status == 143, said


@pytest.mark.slow
def test_a_cluster_that_asks_every_process_queues_the_job_again_and_it_goes_on(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    """Those of the loader are asked, too."""
    out, asked, scontrol = tmp_path / "run", tmp_path / "asked", tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    signals = injected("injected_faults.SignalGroup", step=AT)
    command = [*tiny_runs.command("denoiser", out, "--data.workers", "1", steps=AT + 2), "--resume", "latest"]
    status, said = stops(tiny_runs.torchrun([*command, *signals]), out, 0, **slurm)
    assert status == 1 and said.count("exitcode  : 143") == 2, said
    assert said.count("SLURM job 77 is requeued") == 1 and asked.read_text() == "requeue 77\n"
    # the very same command again, as SLURM gives it
    status, said = run(tiny_runs.torchrun([*command, *signals]), **slurm)
    assert status == 0 and (out / "pipeline").is_dir(), said
    assert load_checkpoint(latest_checkpoint(RunFolder(out).checkpoints_folder))["global_step"] == AT + 2


@pytest.mark.slow
def test_ctrl_c_in_a_validation_saves_and_stops(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = tiny_runs.command("autoencoder", out, *injected("injected_faults.SignalInValidation"), validate_every=AT)
    status, said = stops(command, out, 0)
    assert status == 130 and "ldm: saving; press Ctrl-C again to stop now\n" in said, said
    assert load_checkpoint(latest_checkpoint(RunFolder(out).checkpoints_folder))["callbacks"]["Checkpoints"]["owes_validation"]


@pytest.mark.slow
def test_ctrl_c_twice_stops_at_once(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    out = tmp_path / "run"
    twice = injected("injected_faults.SignalInValidation", times=2)
    status, said = run(tiny_runs.command("autoencoder", out, *twice, validate_every=AT))
    assert status == 130 and said.endswith("ldm: interrupted\n") and "Traceback" not in said, said
    assert not (RunFolder(out).checkpoints_folder).exists()
