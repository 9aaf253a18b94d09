"""Averages of the trained network's weights: an exponential one, and power-function ones of several lengths.

The power-function average (Karras et al. 2024, arXiv 2312.02696, section 3.1) gives step s of t a weight proportional to
s^gamma. However long the training, it forgets the beginning: average ← beta(t)·average + (1 − beta(t))·weights with
beta(t) = (1 − 1/t)^(gamma + 1). Its length ``sigma_rel`` is the standard deviation of the averaged step relative to t; at 0.1,
five sixths of the weight lie on the last fifth of the steps. From snapshots of two lengths or more an average of any other
length can be reconstructed after training (:mod:`ldm.runs.posthoc_ema`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.files import atomic_file
from ldm.training.fsdp import from_local, full_tensor, is_sharded, local_tensor

# folder in a run folder for snapshots of the power-function averages
SNAPSHOTS = "snapshots"
# sigma_rel of the mean over all steps, gamma = 0
LONGEST_SIGMA_REL = 12**-0.5


def gamma_of(sigma_rel: float) -> float:
    """The exponent that gives ``sigma_rel``: the largest root of (gamma + 2)²·(gamma + 3)·sigma_rel² = gamma + 1.

    Raises :class:`UsageError` if there is none.
    """
    if not 0 < sigma_rel <= LONGEST_SIGMA_REL:
        raise UsageError(
            f"sigma_rel is {sigma_rel:g}; give one above 0 and up to {LONGEST_SIGMA_REL:.3f}, the mean of all steps"
        )
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


@dataclass
class PowerAverages:
    """Power-function averages, kept in addition to the exponential one.

    Attributes:
        sigma_rel: their lengths relative to the training so far; two from 0.05 to 0.1 suffice to reconstruct others.
        snapshot_every: steps between snapshots, 4 bytes a weight and average; one more is written at the end.
        selected: the one to validate, preview and export (default: the exponential average).
    """

    sigma_rel: list[float] = field(default_factory=lambda: [0.05, 0.1])
    snapshot_every: int = 1000
    selected: float | None = None

    def __post_init__(self) -> None:
        for length in self.sigma_rel:
            gamma_of(length)
        if not self.sigma_rel or len(set(self.sigma_rel)) < len(self.sigma_rel):
            raise UsageError(f"sigma_rel is {self.sigma_rel}; give one or more lengths, each once")
        if self.selected is not None and self.selected not in self.sigma_rel:
            raise UsageError(f"selected is {self.selected:g}; give one of sigma_rel {self.sigma_rel}")
        if self.snapshot_every < 1:
            raise UsageError(f"snapshot_every is {self.snapshot_every}; give 1 or more")


class InPlaceEMA(EMAModel):
    """diffusers' average, updated in place by one operation, where diffusers' own takes a copy of all weights.

    It may be in the host's memory: then the weights' device updates it weight by weight, and the host waits only where that
    memory is not page-locked.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.9999):
        super().__init__(parameters, decay=decay, foreach=True)

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Update with ``parameters``; those that are frozen stay."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        pairs = [pair for pair in zip(self.shadow_params, parameters, strict=True) if pair[1].requires_grad]
        shadows, weights = [shadow for shadow, _ in pairs], [local_tensor(parameter) for _, parameter in pairs]
        if all(shadow.device == weight.device for shadow, weight in zip(shadows, weights, strict=True)):
            torch._foreach_lerp_(shadows, weights, 1 - self.cur_decay_value)
            return
        for shadow, weight in zip(shadows, weights, strict=True):
            on_device = shadow.to(weight.device, non_blocking=True)
            shadow.copy_(on_device.lerp_(weight, 1 - self.cur_decay_value), non_blocking=True)


class PowerEMA(InPlaceEMA):
    """A power-function average, with the interface of the exponential one."""

    def __init__(self, parameters: Iterable[nn.Parameter], sigma_rel: float):
        super().__init__(parameters)
        self.gamma = gamma_of(sigma_rel)

    def get_decay(self, optimization_step: int) -> float:
        return (1 - 1 / optimization_step) ** (self.gamma + 1)


class Average:
    """The averages of one network's parameters; the selected one replaces them for validation, previews and export.

    The decay of the exponential average is min(``decay``, (1 + n) / (10 + n)) at step n, which forgets the first steps soon.
    """

    def __init__(self, network: nn.Module, decay: float, power: PowerAverages | None = None, offload: bool = False):
        """``offload``: keep the averages in the host's memory, whatever device the network is on."""
        if offload and is_sharded(network):
            raise UsageError(
                "averages of sharded weights are sharded too, and cannot be offloaded; set offload_average to false"
            )
        self.network, self.offload = network, offload
        self.exponential = InPlaceEMA(self._parameters(), decay)
        self.power = {length: PowerEMA(self._parameters(), length) for length in (power.sigma_rel if power else ())}
        self.snapshot_every = power.snapshot_every if power else None
        self.selected = self.power[power.selected] if power and power.selected is not None else self.exponential

    def all(self) -> list[InPlaceEMA]:
        """The exponential average, then the power-function averages."""
        return [self.exponential, *self.power.values()]

    def _averaged(self) -> dict[str, nn.Parameter]:
        """The averaged parameters by name: the network's or, where it has an adapter that is trained, those of that alone."""
        adapted = bool(getattr(self.network, "peft_config", None))
        named = self.network.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad or not adapted}

    @property
    def names(self) -> list[str]:
        """Names of the averaged parameters, in the order of their averages."""
        return [*self._averaged()]

    @property
    def averaged(self) -> list[nn.Parameter]:
        """The averaged parameters of the network, in that order."""
        return [*self._averaged().values()]

    def _parameters(self) -> list[nn.Parameter]:
        """The averaged parameters; when sharded, this process's shards."""
        # diffusers' EMAModel is annotated for parameters, and works on any tensor
        return cast("list[nn.Parameter]", [local_tensor(parameter) for parameter in self.averaged])

    @property
    def step(self) -> int:
        """Updates so far."""
        return self.exponential.optimization_step

    def update(self) -> None:
        """After each optimiser step."""
        for ema in self.all():
            ema.step(self.averaged)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the network's weights are the selected average; afterwards they are the trained ones again."""
        self.selected.store(self._parameters())
        self.selected.copy_to(self._parameters())
        try:
            yield
        finally:
            self.selected.restore(self._parameters())

    def trained(self) -> list[Tensor] | None:
        """The trained parameters while the average is applied, else None."""
        stored = self.selected.temp_stored_params
        return None if stored is None else self._sharded(stored)

    def _sharded(self, tensors: list[Tensor]) -> list[Tensor]:
        """This process's shards as tensors sharded like the network's parameters."""
        return [from_local(tensor, parameter) for tensor, parameter in zip(tensors, self.averaged, strict=True)]

    def _wait(self) -> None:
        """Before the host reads offloaded averages: wait until the device has written them."""
        device = next(self.network.parameters()).device
        if self.offload and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def write_snapshots(self, folder: Path, write: bool = True) -> None:
        """Write each power-function average into ``folder``, parameters by name, with its step and sigma_rel as metadata.

        A collective operation; one process passes ``write``.
        """
        self._wait()
        for sigma_rel, ema in self.power.items():
            shadows = map(full_tensor, self._sharded(ema.shadow_params))
            tensors = {name: shadow.contiguous() for name, shadow in zip(self.names, shadows, strict=True)}
            if not write:
                continue
            metadata = {"step": str(self.step), "sigma_rel": repr(sigma_rel)}
            with atomic_file(folder / f"step-{self.step:08d}-sigma-{sigma_rel:g}.safetensors") as file:
                file.write(save(tensors, metadata))

    def to(self, device: torch.device) -> None:
        """Move the averages to the network's ``device``, offloaded ones to memory that it can copy from by itself."""
        for ema in self.all():
            ema.to(device="cpu" if self.offload else device)
            if self.offload and device.type == "cuda":
                ema.pin_memory()

    def state_dict(self) -> dict[str, Any]:
        """The state of the exponential average; those of the others are in its ``power_function``, by sigma_rel."""
        self._wait()
        power = {repr(sigma_rel): ema.state_dict() for sigma_rel, ema in self.power.items()}
        return self.exponential.state_dict() | ({"power_function": power} if power else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state, with this average's own ``decay``.

        Raises :class:`UsageError` if it lacks an average: none can begin in mid-training.
        """
        power = state.get("power_function", {})
        for sigma_rel, ema in self.power.items():
            if repr(sigma_rel) not in power:
                raise UsageError(
                    f"sigma_rel has {sigma_rel:g}, but the checkpoint has averages of {', '.join(power) or 'none'}, and none "
                    "can begin in mid-training; remove it, or reconstruct it afterwards: ldm denoiser ema"
                )
            ema.load_state_dict(power[repr(sigma_rel)])
        decay = self.exponential.decay
        self.exponential.load_state_dict({name: value for name, value in state.items() if name != "power_function"})
        self.exponential.decay = decay
        shapes = [parameter.shape for parameter in self._parameters()]
        if any([shadow.shape for shadow in ema.shadow_params] != shapes for ema in self.all()):
            raise UsageError("the checkpoint has averages of another network; give the config that it was trained with")
