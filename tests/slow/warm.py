"""Processes that start quickly: forks of a server that has done the imports, which take longer than a tiny run."""

from __future__ import annotations

import multiprocessing
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lightning.fabric.plugins.environments.lightning import find_free_network_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "pytest",
        "ldm.cli",
        "ldm.data.check",
        "ldm.latents.export",
        "ldm.training.autoencoder",
        "ldm.training.denoiser",
        "ldm.runs.fit",
    ]
)

DDP = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


class Fork(NamedTuple):
    """A process and its log."""

    process: Any
    log: Path

    def end(self, seconds: float = 300) -> tuple[int, str]:
        """Exit status (negative: the signal that ended it) and output; a hang fails the test."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"hangs:\n{self.log.read_text()[-3000:]}")
        return self.process.exitcode, self.log.read_text()


def fork(
    log: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None, daemon: bool = True, **how: Any
) -> Fork:
    """Run ``ldm``, or a script, with these arguments; ``how`` goes to ``main`` of ``forked.py``.

    ``daemon``: the process ends with the tests, and cannot start processes.
    """
    request = {"log": str(log), "arguments": list(arguments), "environment": dict(environment or {}), **how}
    # by path: a fork cannot import from tests, which are not a package
    forked = str(Path(__file__).with_name("forked.py"))
    process = _context.Process(target=runpy.run_path, args=(forked, {"REQUEST": request}, "forked"), daemon=daemon)
    process.start()
    return Fork(process, log)


def run(command: Sequence[str], folder: Path, processes: int = 1, seconds: float = 300) -> tuple[int, str]:
    """``python -m ldm …`` or ``python SCRIPT …`` on ``processes`` processes in torchrun's environment: the worst exit status,
    and all output.

    ``folder``: for the logs. A process that takes longer than ``seconds`` fails the test.
    """
    port = find_free_network_port()
    script, arguments = (None, command[3:]) if command[1] == "-m" else (command[1], command[2:])
    forks = []
    for rank in range(processes):
        torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        torchrun |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
        environment = {name: str(value) for name, value in torchrun.items()} if processes > 1 else {}
        # no daemon: it may have loader processes
        forks.append(fork(folder / f"{rank}.log", arguments, environment, daemon=False, script=script))
    try:
        ends = [each.end(seconds) for each in forks]
    finally:
        for each in forks:  # if one hangs the others may too
            each.process.kill()
    return max((status for status, _ in ends), key=abs), "".join(said for _, said in ends)
