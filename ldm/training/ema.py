"""Averages of the trained network, and of nothing else: an exponential one, and power-function ones of several lengths.

The power-function average of Karras et al. 2024 (arXiv 2312.02696, section 3.1) weighs step s of t in proportion to s^gamma, so
that it forgets the beginning at any length of training: average ← beta(t)·average + (1 − beta(t))·weights with beta(t) =
(1 − 1/t)^(gamma + 1). Its length is given as ``sigma_rel``, the standard deviation of the step that it averages over, relative
to t: at 0.1, five sixths of the weight lie on the last fifth of the steps. Kept at two lengths or more and stored now and then,
any other length can be had afterwards: :mod:`ldm.runs.posthoc_ema`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from diffusers.training_utils import EMAModel
from safetensors.torch import save
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.files import atomic_file
from ldm.training.fsdp import like, local, whole

# the folder of a run that power-function averages are stored in
SNAPSHOTS = "snapshots"
# that of the plain mean over all steps, gamma = 0
LONGEST_SIGMA_REL = 12**-0.5


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile of that relative standard deviation: the largest root of (gamma + 2)²·(gamma + 3)·sigma_rel²
    = gamma + 1.

    Raises:
        UsageError: for a length that no such average has.
    """
    if not 0 < sigma_rel <= LONGEST_SIGMA_REL:
        raise UsageError(
            f"sigma_rel is {sigma_rel:g}; give one above 0 and up to {LONGEST_SIGMA_REL:.3f}, the mean of all steps"
        )
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


@dataclass
class PowerAverages:
    """Power-function averages kept beside the exponential one.

    Attributes:
        sigma_rel: their lengths, relative to the training so far; two from 0.05 to 0.1 serve to make any other of later.
        snapshot_every: steps after which they are stored in the run's ``snapshots``, 4 bytes a weight each; and at the end.
        product: which of them is validated, previewed and exported (default: the exponential one).
    """

    sigma_rel: list[float] = field(default_factory=lambda: [0.05, 0.1])
    snapshot_every: int = 1000
    product: float | None = None

    def __post_init__(self) -> None:
        for length in self.sigma_rel:
            gamma_of(length)
        if not self.sigma_rel or len(set(self.sigma_rel)) < len(self.sigma_rel):
            raise UsageError(f"power_averages.sigma_rel is {self.sigma_rel}; give one or more, each once")
        if self.product is not None and self.product not in self.sigma_rel:
            raise UsageError(f"power_averages.product {self.product:g} is none of sigma_rel {self.sigma_rel}; give one")
        if self.snapshot_every < 1:
            raise UsageError(f"power_averages.snapshot_every is {self.snapshot_every}; give 1 or more")


class PowerEMA(EMAModel):
    """The power-function average of some parameters."""

    def __init__(self, parameters: Iterable[nn.Parameter], sigma_rel: float):
        super().__init__(parameters, foreach=True)
        self.gamma = gamma_of(sigma_rel)

    def get_decay(self, optimization_step: int) -> float:
        return (1 - 1 / optimization_step) ** (self.gamma + 1)


class Average:
    """Keeps the averages of one network's parameters; swaps the product's in for validation, previews and export.

    The decay of the exponential one follows (1 + n) / (10 + n) up to ``decay``, so that the first steps are forgotten soon.
    """

    def __init__(self, network: nn.Module, decay: float, power: PowerAverages | None = None):
        self.network = network
        self.exponential = EMAModel(self._parameters(), decay=decay, foreach=True)
        self.power = {length: PowerEMA(self._parameters(), length) for length in (power.sigma_rel if power else ())}
        self.snapshot_every = power.snapshot_every if power else None
        self.product = self.power[power.product] if power and power.product is not None else self.exponential

    def all(self) -> list[EMAModel]:
        """The exponential one, then the power-function ones."""
        return [self.exponential, *self.power.values()]

    def _parameters(self) -> list[Tensor]:
        """The network's, or of each what this process holds of it."""
        return [local(parameter) for parameter in self.network.parameters()]

    @property
    def step(self) -> int:
        """Updates so far."""
        return self.exponential.optimization_step

    def update(self) -> None:
        """After each optimiser step."""
        for ema in self.all():
            ema.step(self._parameters())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network carries its average inside this context, its trained weights again after it, come what may."""
        self.product.store(self._parameters())
        self.product.copy_to(self._parameters())
        try:
            yield
        finally:
            self.product.restore(self._parameters())

    def trained(self) -> list[Tensor] | None:
        """The trained parameters while the average stands in their place, else None."""
        stored = self.product.temp_stored_params
        return None if stored is None else self._as_parameters(stored)

    def _as_parameters(self, tensors: list[Tensor]) -> list[Tensor]:
        """Spread over the processes as the network's are."""
        return [like(tensor, parameter) for tensor, parameter in zip(tensors, self.network.parameters(), strict=True)]

    def write_snapshots(self, folder: Path, write: bool = True) -> None:
        """Store each power-function average in ``folder``: parameters by name, and the step and sigma_rel that they are of.

        All processes must ask, one of them to ``write``.
        """
        names = [name for name, _ in self.network.named_parameters()]
        for sigma_rel, ema in self.power.items():
            shadows = map(whole, self._as_parameters(ema.shadow_params))
            tensors = {name: shadow.contiguous() for name, shadow in zip(names, shadows, strict=True)}
            if not write:
                continue
            metadata = {"step": str(self.step), "sigma_rel": repr(sigma_rel)}
            with atomic_file(folder / f"step-{self.step:08d}-sigma-{sigma_rel:g}.safetensors") as file:
                file.write(save(tensors, metadata))

    def to(self, device: object) -> None:
        for ema in self.all():
            ema.to(device=device)

    def state_dict(self) -> dict:
        """The exponential average's, with the others under ``power_function``, by sigma_rel."""
        power = {repr(sigma_rel): ema.state_dict() for sigma_rel, ema in self.power.items()}
        return self.exponential.state_dict() | ({"power_function": power} if power else {})

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state. Raises :class:`UsageError` where it lacks an average: none can begin in the middle."""
        power = state.get("power_function", {})
        for sigma_rel, ema in self.power.items():
            if repr(sigma_rel) not in power:
                raise UsageError(
                    f"power_averages.sigma_rel has {sigma_rel:g}, but the checkpoint keeps {', '.join(power) or 'none'}: none "
                    "can begin in the middle of a training; leave it out, or make it of the others: ldm denoiser ema"
                )
            ema.load_state_dict(power[repr(sigma_rel)])
        self.exponential.load_state_dict({name: value for name, value in state.items() if name != "power_function"})
