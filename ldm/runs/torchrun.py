"""Many processes on one machine: a command that asks for N devices runs itself under torchrun, unless a launcher such as
torchrun or SLURM has started it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment, LSFEnvironment, MPIEnvironment, SLURMEnvironment

from ldm.errors import LdmError, UsageError

# Time for the checkpoint of a run that is asked to stop, before torchrun kills it; torchrun's default is 30.
SHUTDOWN_SECONDS = 600
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


class ProcessFailed(LdmError):
    """One of the processes failed, and has printed why."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def processes_asked(trainer: Any) -> int:
    """Processes a machine that a ``trainer`` section asks for."""
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:
        devices = [name for name in devices.split(",") if name.strip()]
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if str(devices).isdigit():
        return int(devices)
    # auto, or -1: all devices
    return max(torch.cuda.device_count(), 1) if trainer.accelerator in ("auto", "gpu", "cuda") else 1


def run_under_torchrun(words: Sequence[str], trainer: Any) -> None:
    """Run ``ldm WORDS`` under torchrun and exit, if it takes several processes and no launcher has started them.

    Raises:
        SystemExit: with 0; or with 143 or 130 for a run that was asked to stop and has saved.
        ProcessFailed: with the status of the first process that failed.
        UsageError: for several machines, with the command for each of them.
    """
    launchers = (SLURMEnvironment, LSFEnvironment, MPIEnvironment)
    if LightningEnvironment().creates_processes_externally or any(each.detect() for each in launchers):
        return
    processes = processes_asked(trainer)
    nodes = int(trainer.num_nodes)
    if nodes > 1:
        raise UsageError(
            f"trainer.num_nodes is {nodes}; start this on each machine: torchrun --nnodes {nodes} --nproc-per-node {processes} "
            f"--rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 -m ldm {shlex.join(words)}"
        )
    if processes > 1:
        raise SystemExit(_launch(words, processes))


def _launch(words: Sequence[str], processes: int) -> int:
    """The exit status: 0, 143 or 130."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun's default is one thread a process
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    options = run.parse_args(["--standalone", "--nproc-per-node", str(processes), "-m", "ldm", *words])
    if hasattr(options, "signals_to_handle"):  # not in all versions of torch
        options.signals_to_handle = SIGNALS
    handlers = {number: signal.getsignal(number) for number in map(signal.Signals.__getitem__, SIGNALS.split(","))}
    logging.disable(logging.ERROR)  # the processes print their errors; torchrun would repeat them in many lines
    try:
        run.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        if status in (128 + signal.SIGTERM, 128 + signal.SIGINT):
            return status
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        raise ProcessFailed(f"process {rank} of {processes} {how}; see its message above", max(status, 1)) from None
    except SignalException as error:  # forwarded to the processes, which have saved
        return 128 + (signal.SIGINT if error.sigval == signal.SIGINT else signal.SIGTERM)
    finally:
        logging.disable(logging.NOTSET)
        _kill_children()
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


def _kill_children() -> None:
    """Kill what is left if a second signal came while torchrun waited."""
    for listed in Path("/proc/self/task").glob("*/children"):
        for child in map(int, listed.read_text().split()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(child) == child:  # the leader of a group, as torchrun's processes are
                    os.killpg(child, signal.SIGKILL)
