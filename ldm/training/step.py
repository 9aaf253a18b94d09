"""The end of a training step: one exchange between the processes, and values that the host reads a step later.

A GPU computes behind the program that feeds it. A program that asks for a value waits until the GPU has computed it, and then
the GPU waits for the program. A step therefore asks for nothing: whether its loss and gradients are finite is decided on the
device, where the optimiser leaves the weights as they are if they are not (``found_inf``, as torch's ``GradScaler`` does it),
and the host reads the step's values in the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.training.fsdp import local_tensor


class Request(StrEnum):
    """What one process may ask of all."""

    STOP = "stop"
    CHECKPOINT = "checkpoint"
    END_OF_TIME = "end of time"


class Update:
    """What one optimiser does at the end of a step with the gradients that are there."""

    def __init__(
        self,
        network: str,
        optimiser: Optimizer,
        schedule: LRScheduler,
        parameters: Iterable[nn.Parameter],
        max_norm: float,
        loss: str,
    ):
        """
        Args:
            network: its name in messages.
            optimiser, schedule: each is stepped once.
            parameters: that the optimiser updates.
            max_norm: gradients of a larger norm are scaled down to it.
            loss: the name of its loss among the step's metrics.
        """
        self.network, self.optimiser, self.schedule, self.loss = network, optimiser, schedule, loss
        self.parameters, self.max_norm = [each for each in parameters if each.grad is not None], max_norm
        gradients = [each.grad for each in self.parameters if each.grad is not None]
        local = [local_tensor(gradient) for gradient in gradients]
        self.sharded = any(mine is not gradient for mine, gradient in zip(local, gradients, strict=True))
        self._norm = nn.utils.get_total_norm(local)  # of this process's gradients, or of its shards of them

    def summand(self) -> Tensor:
        """What the processes take the mean of, for :meth:`norm`."""
        return self._norm.square() * dist.get_world_size() if self.sharded else self._norm

    def norm(self, mean: Tensor) -> Tensor:
        """The norm of all gradients, from the mean of every process's :meth:`summand`."""
        return mean.sqrt() if self.sharded else self._norm  # which DDP has made the same on all

    def apply(self, norm: Tensor, void: Tensor) -> None:
        """Clip the gradients of this ``norm``, step the optimiser and its schedule.

        Where ``void`` is 1 (else 0, fp32), the optimiser changes neither weights nor its state.
        """
        nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, norm)
        optimiser = self.optimiser.optimizer if isinstance(self.optimiser, LightningOptimizer) else self.optimiser
        if getattr(optimiser, "_step_supports_amp_scaling", False):  # as torch's GradScaler asks
            optimiser.found_inf = void  # pyright: ignore[reportAttributeAccessIssue]
            self.optimiser.step()
            del optimiser.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        else:  # the host decides, and waits for the device
            if void:
                self.optimiser.zero_grad()  # without a gradient, an optimiser changes nothing
            self.optimiser.step()
        self.schedule.step()


class Readback:
    """Values on their way from the device to the host. Reading them a step later finds them there."""

    def __init__(self, values: Tensor):
        self._values, self._copied = values, None
        if values.device.type == "cuda":
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Tensor:
        """The values on the CPU, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.cpu()


@dataclass
class Report:
    """What a step leaves for the host to read.

    Attributes:
        step: its number, from 0.
        draws: of its batch on this process, (B, 2).
        metrics: names of the first values.
        networks: of its updates, in order; whether each is void is in the next values. The rest are the requests.
        numbers: of the host, to be logged with the metrics.
        values: on their way.
    """

    step: int
    draws: np.ndarray
    metrics: Sequence[str]
    networks: Sequence[str]
    numbers: dict[str, float]
    values: Readback

    def read(self) -> tuple[dict[str, Tensor], list[bool], set[Request]]:
        """All that is to be logged, by name and on the CPU; whether each update is void; what processes have asked for."""
        values = self.values.read()
        metrics, voids, asked = values.tensor_split([len(self.metrics), len(self.metrics) + len(self.networks)])
        logged = dict(zip(self.metrics, metrics, strict=True))
        logged |= {name: torch.tensor(number) for name, number in self.numbers.items()}
        requests = {request for request, share in zip(Request, asked.tolist(), strict=False) if share > 0}
        return logged, [void > 0 for void in voids.tolist()], requests


def to_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host on the device, in fp32, without waiting for it."""
    return torch.tensor(values, dtype=torch.float32, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in place; one collective operation."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
