"""What training costs: parameters, FLOPs, memory, and the time that processes spend on exchanging gradients.

FLOPs count a multiplication and an addition as two, as GPUs are sold by; Peebles & Xie (arXiv 2212.09748) count the pair as
one "Gflop". Utilisation (MFU) is PaLM's (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): the FLOPs that the mathematics
of a step asks for, over the device's peak. What gradient checkpointing and fused attention compute a second time is left out.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from ldm.training.base import TrainingModule

# -- parameters and memory -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """How many numbers of a network are trained, and how many are not."""

    trained: int
    frozen: int


def network_parameters(stage: nn.Module) -> dict[str, Parameters]:
    """Of each part of ``stage`` that has any, by its name, the largest first."""
    counted = {}
    for name, network in stage.named_children():
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        frozen = sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad)
        if trained or frozen:
            counted[name] = Parameters(trained, frozen)
    return dict(sorted(counted.items(), key=lambda item: -item[1].trained - item[1].frozen))


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that training holds from step to step on one process; activations come on top, and are measured."""

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
    bytes_each: int = 4,
    shards: int = 1,
    matrices: int = 0,
) -> StaticMemory:
    """What training holds: a weight, a gradient and AdamW's two moments for each trained parameter (Loshchilov & Hutter 2019,
    arXiv 1711.05101), and the averages.

    Mixed precision keeps all of these in fp32; its copies in 16 bits live as long as activations do.

    Args:
        trained, frozen: parameters.
        averaged: those of the network whose averages are kept.
        averages: how many of them.
        bytes_each: of every number: 4 for ``32-true`` and ``bf16-mixed``, 2 for ``bf16-true``.
        shards: processes that FSDP spreads all of it over.
        matrices: of the trained, those that Muon moves, by one moment.
    """
    numbers = (trained + frozen, trained, 2 * trained - matrices, averaged * averages)
    return StaticMemory(*(number * bytes_each / shards for number in numbers))


def stage_memory(stage: TrainingModule, shards: int = 1) -> StaticMemory:
    """:func:`static_memory` of a stage as it is: its networks, and the averages that it keeps."""
    parameters = list(network_parameters(stage).values())
    averaged = sum(parameter.numel() for parameter in stage.averaged().parameters())
    groups = (group for optimiser in stage.trainer.optimizers for group in optimiser.param_groups if group.get("muon"))
    return static_memory(
        sum(part.trained for part in parameters),
        sum(part.frozen for part in parameters),
        averaged,
        1 + len(stage.average.power),
        next(stage.averaged().parameters()).element_size(),
        shards,
        sum(matrix.numel() for group in groups for matrix in group["params"]),
    )


# -- FLOPs ---------------------------------------------------------------------------------------------------------------


class StepFlops:
    """Counts the FLOPs of what runs inside it, forward and backward, on this process; it changes nothing of what is computed.

    An optimiser's own are not among them (Muon has some): they are the same whatever the batch.

    Blocks that ``torch.compile`` would compile run uncompiled inside. Products count (matrices, convolutions, attention), by
    torch's own formulas; all else is free. torch's ``FlopCounterMode`` itself fails where gradients are asked for with
    ``torch.autograd.grad``, as in stage one.

    Attributes:
        forward: counted outside of backward passes, frozen networks included.
        backward: counted inside of them, less what gradient checkpointing and fused attention compute again.
    """

    def __init__(self) -> None:
        self.forward = self.backward = 0.0
        self._again = 0  # depth of modules called within a backward pass: gradient checkpointing
        self._in_optimiser = 0  # depth of optimiser steps; one may call another's

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def __enter__(self) -> StepFlops:
        self._entered = ExitStack()
        for hook in (
            register_module_forward_pre_hook(self._enter_module),
            # checkpointing leaves by an exception as soon as it has what it needs
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimiser),
            register_optimizer_step_post_hook(self._leave_optimiser),
        ):
            self._entered.callback(hook.remove)
        self._entered.enter_context(_Products(self._tally))
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)

    def _tally(self, operation: str, flops: int) -> None:
        if self._in_optimiser:
            return
        if not _in_backward():
            self.forward += flops
        elif not self._again:
            # the formula of attention has five products, of which the first makes the logits again
            self.backward += flops * 4 / 5 if "attention" in operation and "backward" in operation else flops

    def _enter_module(self, module: nn.Module, arguments: Any) -> None:
        self._again += _in_backward()

    def _leave_module(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._again -= _in_backward()

    def _enter_optimiser(self, optimiser: Optimizer, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._in_optimiser += 1
        closure = named.get("closure")
        if closure is None:
            return arguments, named

        def counted() -> Any:  # Lightning hands forward and backward to the optimiser
            self._in_optimiser -= 1
            try:
                return closure()
            finally:
                self._in_optimiser += 1

        return arguments, named | {"closure": counted}

    def _leave_optimiser(self, optimiser: Optimizer, arguments: tuple, named: dict[str, Any]) -> None:
        self._in_optimiser -= 1


class _Products(TorchDispatchMode):
    """Tells ``tally`` of every operation that torch has a formula for: its name and its FLOPs."""

    def __init__(self, tally: Callable[[str, int], None]):
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named, formula = named or {}, flop_registry.get(function.overloadpacket)
        if formula is None:
            with self:  # what it is made of may be products
                result = function.decompose(*arguments, **named)
            return function(*arguments, **named) if result is NotImplemented else result
        result = function(*arguments, **named)
        self.tally(str(function), formula(*arguments, **named, out_val=result))
        return result


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


# Dense products of tensor cores, FLOP/s, from NVIDIA's data sheets of H200 and H100 NVL, which print twice as much, "with
# sparsity". Lightning 2.6's table has the doubled ones, and does not know an "NVIDIA H200".
DENSE_PEAKS = {
    "h200 nvl": {"bf16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},
    "h200": {"bf16": 989.5e12, "tf32": 494.5e12, "fp32": 67e12},
    "h100 nvl": {"bf16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a GPU is sold with for dense products in a trainer's ``precision``; None for CPUs and unknown GPUs."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    kind = "bf16" if "16" in precision else "tf32" if tf32 else "fp32"
    name = torch.cuda.get_device_name(device).lower()
    for chip, peaks in DENSE_PEAKS.items():
        if chip in name:
            return peaks[kind]
    dtype = torch.float32 if kind != "bf16" else torch.bfloat16 if "bf16" in precision else torch.float16
    return get_available_flops(device, dtype)


# -- many processes ------------------------------------------------------------------------------------------------------


def exchanged_bytes(parameter_bytes: float, processes: int, sharded: bool = False) -> float:
    """What each process sends in a step.

    DDP: a ring all-reduce of the gradients, 2·(N − 1)/N of their bytes (Patarasu & Yuan 2009, doi 10.1016/j.jpdc.2008.09.002).
    FSDP: the weights are gathered for the forward and again for the backward pass, and the gradients scattered: 3·(N − 1)/N
    (Rajbhandari et al. 2020, arXiv 1910.02054, section 7; Zhao et al. 2023, arXiv 2304.11277).

    Args:
        parameter_bytes: of the trained parameters' gradients, as they are sent: 4 each in fp32.
        processes: N.
        sharded: FSDP.
    """
    return (3 if sharded else 2) * (processes - 1) / processes * parameter_bytes


def expected_step_seconds(
    compute_seconds: float,
    gradient_bytes: float,
    processes: int,
    bytes_per_second: float,
    overlap: float = 0.0,
    sharded: bool = False,
) -> float:
    """Seconds of a step on N processes, each with its own batch: computing, and what of the exchange it does not hide.

    Args:
        compute_seconds: of the step on one process alone.
        gradient_bytes, processes, sharded: see :func:`exchanged_bytes`.
        bytes_per_second: that a process sends at; of the slowest link of the ring.
        overlap: share of the exchange that goes on behind the backward pass, 0 to 1; no more than it lasts is hidden, which
            is taken to be two thirds of ``compute_seconds``.
    """
    exchange = exchanged_bytes(gradient_bytes, processes, sharded) / bytes_per_second
    return compute_seconds + exchange - min(overlap * exchange, compute_seconds * 2 / 3)


def expected_efficiency(
    compute_seconds: float,
    gradient_bytes: float,
    processes: int,
    bytes_per_second: float,
    overlap: float = 0.0,
    sharded: bool = False,
) -> float:
    """Throughput on N processes over N times that of one, 0 to 1; arguments as :func:`expected_step_seconds`."""
    return compute_seconds / expected_step_seconds(
        compute_seconds, gradient_bytes, processes, bytes_per_second, overlap, sharded
    )


# -- memory, measured ----------------------------------------------------------------------------------------------------


class PeakMemory:
    """The most memory in use since :meth:`reset`: what a GPU has allocated, or on a CPU what the process keeps resident.

    Without Linux's /proc there is no reset: it is then the most since the process began.
    """

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def what(self) -> str:
        """What is measured, in words."""
        return "allocated on the GPU" if self.device.type == "cuda" else "resident in the process, Python and libraries too"

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
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on a Mac

    def limit(self) -> int:
        """Bytes that :meth:`peak` could come to, as far as the machine goes."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return free + torch.cuda.memory_reserved(self.device)
        if not PROCESS.is_file():
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min([_bytes(Path("/proc/meminfo"), "MemAvailable") + _bytes(PROCESS, "VmRSS"), *_control_group_limits()])


PROCESS = Path("/proc/self/status")


def _bytes(file: Path, name: str) -> int:
    """Of an entry such as ``VmHWM:  1234 kB``."""
    return next(int(line.split()[1]) * 1024 for line in file.read_text().splitlines() if line.startswith(f"{name}:"))


def _control_group_limits() -> list[int]:
    """What a container or a job of SLURM may have; none on a machine of one's own."""
    files = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    return [int(text) for file in files if file.is_file() and (text := file.read_text().strip()).isdigit()]
