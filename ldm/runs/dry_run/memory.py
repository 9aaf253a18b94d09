"""Memory of training: what is held from step to step, computed from the parameters, and the peak, measured."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ldm.training.base import TrainingModule
from ldm.training.frozen_base import stored_bytes


def network_parameters(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Numbers of trained and of frozen parameters of each child of ``module`` that has any, by name, the largest first."""
    counted = {}
    for name, network in module.named_children():
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        counted[name] = trained, sum(parameter.numel() for parameter in network.parameters()) - trained
    return dict(sorted(((name, both) for name, both in counted.items() if any(both)), key=lambda item: -sum(item[1])))


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that one process holds from step to step. Activations come on top; they are measured."""

    weights: float
    gradients: float
    optimiser: float
    averages: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.averages


def static_memory(
    trained: int,
    frozen: int = 0,
    averaged: int = 0,
    averages: int = 1,
    shards: int = 1,
    matrices: int = 0,
    eight_bit: int = 0,
    saved: int = 0,
) -> StaticMemory:
    """Weights, gradients, the moments of AdamW (two a parameter, Loshchilov & Hutter 2019, arXiv 1711.05101) and averages.

    All of these are fp32 but for ``saved``, in mixed precision too; its 16-bit copies live as long as activations do.

    Args:
        trained, frozen: numbers of parameters.
        averaged: parameters of the network whose averages are kept.
        averages: how many averages.
        shards: processes that FSDP shards all of it over.
        matrices: trained parameters that Muon updates; it keeps one moment of each.
        eight_bit: trained parameters whose moments have 8 bits, and an fp32 scale for each 256.
        saved: bytes that frozen parameters have less than in fp32.
    """
    moments = 2 * trained - matrices - 2 * eight_bit * (3 / 4 - 1 / 256)
    numbers = (trained + frozen - saved / 4, trained, moments, averaged * averages)
    return StaticMemory(*(4 * number / shards for number in numbers))


def module_memory(module: TrainingModule, shards: int = 1) -> StaticMemory:
    """:func:`static_memory` of a training module with its optimisers and averages."""
    trained, frozen = map(sum, zip(*network_parameters(module).values(), strict=True))
    saved = sum(4 * weight.numel() - stored_bytes(weight) for weight in module.parameters() if not weight.requires_grad)
    groups = [group for optimiser in module.trainer.optimizers for group in optimiser.param_groups]
    return static_memory(
        trained,
        frozen,
        averaged=sum(parameter.numel() for parameter in module.average.averaged),
        averages=0 if module.average.offload else 1 + len(module.average.power),
        shards=shards,
        matrices=sum(matrix.numel() for group in groups if group.get("muon") for matrix in group["params"]),
        saved=saved,
        eight_bit=sum(
            weight.numel() for group in groups if group.get("eight_bit") for weight in group["params"] if weight.numel() >= 4096
        ),
    )


PROCESS = Path("/proc/self/status")


class PeakMemory:
    """The peak since :meth:`reset`: bytes allocated on a GPU, or on a CPU the resident set of the process.

    Without Linux's /proc there is no reset, and the peak is that since the process started.
    """

    def __init__(self, device: torch.device):
        self.device, on_gpu = device, device.type == "cuda"
        #: what is measured, in words
        self.what = "allocated on the GPU" if on_gpu else "resident set of the process, with Python and its libraries"

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if PROCESS.is_file():
            return _bytes(PROCESS, "VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS

    def limit(self) -> int:
        """The largest peak in bytes that this machine allows."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return free + torch.cuda.memory_reserved(self.device)
        if not PROCESS.is_file():
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min([_bytes(Path("/proc/meminfo"), "MemAvailable") + _bytes(PROCESS, "VmRSS"), *_control_group_limits()])


def _bytes(file: Path, name: str) -> int:
    """The value of an entry such as ``VmHWM:  1234 kB``."""
    return next(int(line.split()[1]) * 1024 for line in file.read_text().splitlines() if line.startswith(f"{name}:"))


def _control_group_limits() -> list[int]:
    """Limits of a container or a SLURM job; elsewhere none."""
    files = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    return [int(text) for file in files if file.is_file() and (text := file.read_text().strip()).isdigit()]
