"""Tiny runs of both stages in real processes, from the shipped recipes."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """The command in its own process group, which :func:`finish` ends; callbacks of this folder can be imported by name."""
    return subprocess.Popen(
        command,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]), "PYTHONFAULTHANDLER": "1"}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    """Exit status and output; a process that does not end in time is killed with its children, and the test fails with their
    stacks."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # torchrun's processes have their own sessions
        subprocess.run(["pkill", "-ABRT", "-P", str(process.pid)], check=False)
        time.sleep(2)
        subprocess.run(["pkill", "-9", "-P", str(process.pid)], check=False)
        os.killpg(process.pid, 9)
        said, _ = process.communicate()
        pytest.fail(f"still there after {seconds} s:\n{said[-20_000:]}")
    return process.returncode, said


def run(command: Sequence[str], seconds: float = 120, /, **environment: str) -> tuple[int, str]:
    """Start and finish."""
    return finish(start(command, **environment), seconds)
