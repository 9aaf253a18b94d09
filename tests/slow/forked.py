"""Runs one command line, of ``ldm`` or of a script, in a fork; see :func:`fork` of ``warm.py``."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path


def main(
    log: str,
    arguments: list[str],
    environment: dict[str, str],
    step: tuple[str, str] = ("", ""),
    act: str = "kill",
    file_size: int | None = None,
    script: str | None = None,
) -> None:
    """
    Args:
        log: file for all output.
        arguments: of the command line.
        environment: the variables of torchrun or SLURM.
        step: ("before" or "after", a file's name): when to act: before or after a file is renamed to this name.
        act: "kill" with -9; "full": the disk is full; "hold": create ``held-NAME`` beside the log and wait for ``go`` there.
            A held process that waits for others creates ``waits-RANK`` there.
        file_size: limit of the size of files, in bytes.
        script: path of a Python file to run in the place of ``ldm``, in the log's folder.
    """
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from ldm.cli import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environment
    setattr(rank_zero_only, "rank", int(environment.get("RANK", 0)))  # noqa: B010  Lightning reads the variables at import
    multiprocessing.set_start_method("fork", force=True)  # for loader processes, as in a run that is not forked
    if "MASTER_PORT" in environment:
        torch.set_num_threads(1)  # as torchrun does by a variable, which is too late for OpenMP here
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
    if script is None:
        return main(arguments)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    sys.path[:0] = [str(Path(script).parent)]
    runpy.run_path(script, run_name="__main__")


if __name__ == "forked":
    main(**globals()["REQUEST"])
