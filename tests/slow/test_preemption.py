"""Runs that are asked to stop: they save within a step, print one line, exit with 143, leave no process, and can be resumed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ldm.runs.checkpoints.files import latest_checkpoint, load_checkpoint
from ldm.runs.layout import RunFolder
from tests.tiny import TinyRuns

from .conftest import run

AT = 3  # the step after which signals are sent
LEARNT = AT + 1  # the step after which several processes stop: they learn it from the vector of the next step, which is logged
SECONDS = 30.0  # limit for a run that is asked to stop
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def last_checkpoint(out: Path) -> dict[str, Any]:
    return load_checkpoint(latest_checkpoint(RunFolder(out).checkpoints_folder))


def injected(callback: str, **arguments: object) -> list[str]:
    """A callback as options."""
    options = [item for name, value in arguments.items() for item in (f"--trainer.callbacks.{name}", str(value))]
    return ["--trainer.callbacks+", callback, *options]


def signal_at(number: int, rank: int) -> list[str]:
    return injected("injected.SignalAt", steps=[AT], number=int(number), rank=rank)


def stops(command: list[str], out: Path, rank: int, step: int, /, **environment: str) -> tuple[int, str]:
    """Exit status and output of a run in which ``rank`` is asked to stop; it must end in time, after ``step``.

    It has ended when no process holds its output.
    """
    status, said = run(command, **environment)
    over, asked = time.time(), out / f"signalled-{rank}-{AT}"
    assert asked.exists() and over - asked.stat().st_mtime < SECONDS, said
    (line,) = (line for line in said.splitlines() if line.startswith("ldm: ") and not line.startswith("ldm: saving"))
    assert line.startswith(f"ldm: stopped at step {step} as asked; ") and "--resume latest" in line
    assert last_checkpoint(out)["global_step"] == step
    return status, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "stage", "rank", "number"),
    [("torchrun", "autoencoder", 1, signal.SIGTERM), ("--trainer.devices", "denoiser", 0, signal.SIGUSR1)],
)
def test_two_processes_stop_together_whichever_is_asked_and_whoever_starts_them(
    tiny_runs: TinyRuns, tmp_path: Path, launcher: str, stage: str, rank: int, number: int
) -> None:
    out = tmp_path / "run"
    command = tiny_runs.command(stage, out, *signal_at(number, rank), steps=10_000)
    if launcher == "torchrun":  # which exits with 1 and prints the status of its processes
        status, said = stops(tiny_runs.torchrun(command), out, rank, LEARNT)
        assert status == 1 and said.count("exitcode  : 143") == 2, said
    else:
        status, said = stops([*command, *TWO], out, rank, LEARNT)
        assert status == 143, said


@pytest.mark.slow
def test_a_signal_of_slurm_to_every_process_requeues_the_job_which_then_resumes(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    """Loader processes receive it, too."""
    out, asked, scontrol = tmp_path / "run", tmp_path / "asked", tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    signals = injected("injected.SignalGroup", step=AT)
    command = [*tiny_runs.command("denoiser", out, "--data.workers", "1", steps=AT + 3), "--resume", "latest"]
    status, said = stops(tiny_runs.torchrun([*command, *signals]), out, 0, LEARNT, **slurm)
    assert status == 1 and said.count("exitcode  : 143") == 2, said
    assert said.count("SLURM job 77 is requeued") == 1 and asked.read_text() == "requeue 77\n"
    # the same command again, as SLURM runs it
    status, said = run(tiny_runs.torchrun([*command, *signals]), **slurm)
    assert status == 0 and (out / "pipeline").is_dir(), said
    assert last_checkpoint(out)["global_step"] == AT + 3


@pytest.mark.slow
def test_ctrl_c_in_a_validation_saves_and_stops(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = tiny_runs.command("autoencoder", out, *injected("injected.SignalInValidation"), validate_every=AT)
    status, said = stops(command, out, 0, AT)
    assert status == 130 and "ldm: saving; press Ctrl-C again to stop now\n" in said, said
    assert last_checkpoint(out)["callbacks"]["Checkpoints"]["owes_validation"]


@pytest.mark.slow
def test_ctrl_c_twice_stops_at_once(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    out = tmp_path / "run"
    twice = injected("injected.SignalInValidation", times=2)
    status, said = run(tiny_runs.command("autoencoder", out, *twice, validate_every=AT))
    assert status == 130 and said.endswith("ldm: interrupted\n") and "Traceback" not in said, said
    assert not (RunFolder(out).checkpoints_folder).exists()
