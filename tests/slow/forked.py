"""One command line in a fork, see :func:`fork` of ``warm.py``."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path


def main(
    log: str,
    arguments: list[str],
    environment: dict[str, str],
    step: tuple[str, str] = ("", ""),
    act: str = "kill",
    file_size: int | None = None,
) -> None:
    """
    Args:
        log: the file for all that it says.
        arguments: of the command line.
        environment: what torchrun or SLURM would set.
        step: ("before" or "after", a file's name): to act before or after that file gets its name.
        act: "kill" -9; "full": the disk has no room; "hold": wait for ``go`` to be beside the log, and make ``held-`` that
            name there. Whenever this process waits for others, it makes ``waits-`` its rank there.
        file_size: no file may grow larger, in bytes.
    """
    import torch

    from ldm.cli import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as where nothing is forked
    if "MASTER_PORT" in environment:
        torch.set_num_threads(1)  # torchrun says so to OpenMP, which is loaded here already
    folder, replace, sleep = Path(log).parent, os.replace, time.sleep

    def replace_or_act(source: Path, target: Path) -> None:
        for when in ("before", "after"):
            if step == (when, Path(target).name):
                if act == "full":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if act == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                (folder / f"held-{step[1]}").touch()
                while not (folder / "go").exists():
                    sleep(0.01)
            if when == "before":
                replace(source, target)

    def wait(seconds: float) -> None:
        (folder / f"waits-{environment.get('RANK')}").touch()
        sleep(seconds)

    if step[1]:
        os.replace = replace_or_act
    if act == "hold":
        time.sleep = wait
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    main(arguments)


if __name__ == "forked":
    main(**globals()["REQUEST"])
