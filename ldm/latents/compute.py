"""The process, device, cores and precision of an export, and the versions of its libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Literal, NamedTuple

import torch

from ldm.errors import UsageError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("ldm", "torch", "diffusers", "transformers", "safetensors")

Dtype = Literal["float16", "float32"]
Precision = Literal["fp32", "bf16", "fp16"]


class Process(NamedTuple):
    """The rank of this process and the number of processes, as torchrun or SLURM set them."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Process:
        """From the environment; a single process where neither launcher started it."""
        for names in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            # SLURM gives each task its own cores: one process shares them
            ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
        ):
            if all(name in os.environ for name in names[:3]):
                return cls(*(int(os.environ.get(name, 1)) for name in names))
        return cls(0, 1, 0, 1)

    def device(self) -> torch.device:
        """The GPU of this process, or the CPU on a machine without GPUs."""
        count = torch.cuda.device_count()
        return torch.device("cuda", self.local_rank % count) if count else torch.device("cpu")

    @property
    def cores(self) -> int:
        """CPU cores for this process: those that may be used, divided among the processes of the machine."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(cores // self.local_world_size, 1)


def versions() -> dict[str, str]:
    """Versions of the libraries that determine the bytes of latents."""
    return {package: version(package) for package in PACKAGES}


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run each torch operation in its calling thread alone.

    Results then do not depend on the number of cores to the last bit, and each thread computes a batch of its own, which at
    these sizes is faster than all cores on one batch.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: torch.device, precision: Precision) -> torch.autocast | nullcontext:
    """Autocast for the thread that enters it; nothing for fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, PRECISIONS[precision])


def require_precision(device: torch.device, precision: Precision) -> None:
    """Raise :class:`UsageError` for a precision that the device lacks."""
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("precision fp16 needs a GPU; give fp32, or bf16 where the CPU supports it")
