"""Guidance: rules that combine the conditional and the null prediction of a denoiser.

The scale ``w`` is diffusers': ``null + w·(cond − null)``, neutral at 1. Papers that write ``(1 + w')·cond − w'·null`` (Ho &
Salimans 2022, arXiv 2207.12598) mean w' = w − 1.

A :class:`Guidance` is a rule; rules nest, as in ``Interval(Rescale(ClassifierFree(5.0)), low=0.3, high=0.8)``.
:class:`GuidedDenoiser` applies one to the network's predictions for a batch of captions, with any sampler. Autoguidance is any
rule with a weaker network for the null prediction. No image depends on the others in its batch.

The rules agree with ``diffusers.guiders``, as the tests check. Those are not used because they count solver steps instead of
taking t, need their state set from outside at every step, and act on the raw prediction alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition, concatenate, denoise, encode_condition
from ldm.diffusion.path import ProbabilityPath, expand
from ldm.diffusion.prediction import Prediction
from ldm.errors import UsageError

if TYPE_CHECKING:
    from ldm.models.dit import EncodedText


class Conversion(NamedTuple):
    """Between a prediction y and x0 of a model, given the network's input (scaled by the path) and t (B,)."""

    path: ProbabilityPath
    prediction: Prediction

    def to_x0(self, network_input: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """The x0 that y implies."""
        return self.prediction.endpoints(self.path, self._x_t(network_input, t), y, t).x0

    def from_x0(self, network_input: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The y of an x0, for t > 0, where x_t contains noise."""
        eps = (self._x_t(network_input, t) - expand(self.path.alpha(t), x0) * x0) / expand(self.path.sigma(t), x0)
        return self.prediction.target(self.path, x0, eps, t)

    def _x_t(self, network_input: Tensor, t: Tensor) -> Tensor:
        return network_input / expand(self.path.input_scale(t), network_input)


# combine(conditional, null, network input, t) -> guided: all (B, C, H, W) but t (B,)
Combine = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Guidance(ABC):
    """A rule that combines the prediction for the captions (conditional) and one to move away from (null)."""

    @abstractmethod
    def guides(self, t: Tensor) -> bool:
        """Whether to guide at t (B,), one time for the whole batch; if not, the result is the conditional prediction."""

    @abstractmethod
    def combiner(self, conversion: Conversion | None = None) -> Combine:
        """The function that applies the rule in one sampling run, where :meth:`guides` is true; it may keep state."""


def require_finite(owner: Guidance, *names: str) -> None:
    """Raise UsageError for an attribute of a rule that is not a finite number."""
    for name in names:
        value = getattr(owner, name)
        if not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise UsageError(f"{type(owner).__name__}: {name} is {value!r}; give a finite number")


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """``null + scale·(conditional − null)`` (Ho & Salimans 2022, arXiv 2207.12598); the same on x0, eps, v or velocity."""

    scale: float

    def __post_init__(self) -> None:
        require_finite(self, "scale")

    def guides(self, t: Tensor) -> bool:
        return self.scale != 1

    def combiner(self, conversion: Conversion | None = None) -> Combine:
        return lambda conditional, null, x_t, t: null + self.scale * (conditional - null)


@dataclass(frozen=True)
class ZeroStar(Guidance):
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): the null prediction is first scaled, per image, to the least-squares fit
    of the conditional one, s* = ⟨cond, null⟩ / ‖null‖². Acts on the raw prediction and is meant for velocities.

    Args:
        scale: w.
        zero_init_steps: number of guided calls at the start of a run that return 0, since velocities at pure noise are learned
            badly.
    """

    scale: float
    zero_init_steps: int = 0

    def __post_init__(self) -> None:
        require_finite(self, "scale", "zero_init_steps")

    def guides(self, t: Tensor) -> bool:
        return self.scale != 1

    def combiner(self, conversion: Conversion | None = None) -> Combine:
        calls = 0

        def combine(conditional: Tensor, null: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls <= self.zero_init_steps:
                return torch.zeros_like(conditional)
            null = null * (inner_product(conditional, null) / (inner_product(null, null) + 1e-8))
            return null + self.scale * (conditional - null)

        return combine


@dataclass(frozen=True)
class AdaptiveProjected(Guidance):
    """APG (Sadat et al. 2024, arXiv 2410.02416): ``conditional + (scale − 1)·update``. The update is conditional − null with
    momentum and a bounded norm; its component parallel to the conditional prediction, which saturates colours, is damped.

    Defined on x0; acts on the raw prediction if no conversion is given.

    Args:
        scale: w.
        parallel: weight of the component parallel to the conditional prediction (the paper's eta); 1 keeps all of it.
        norm_threshold: maximum L2 norm of an image's update (the paper's r); scale it with the square root of the number of
            latent values. 0 for no bound.
        momentum: weight of the earlier updates of the run (the paper's beta), in (−1, 1); negative values move away from them.
    """

    scale: float
    parallel: float = 0.0
    norm_threshold: float = 15.0
    momentum: float = -0.5

    def __post_init__(self) -> None:
        require_finite(self, "scale", "parallel", "norm_threshold", "momentum")
        if not -1 < self.momentum < 1:
            raise UsageError(f"AdaptiveProjected: momentum is {self.momentum:g}; give a number between -1 and 1")

    def guides(self, t: Tensor) -> bool:
        return self.scale != 1

    def combiner(self, conversion: Conversion | None = None) -> Combine:
        running: Tensor | float = 0.0

        def update(conditional: Tensor, null: Tensor) -> Tensor:
            nonlocal running
            running = (conditional - null) + self.momentum * running
            bounded = running
            if self.norm_threshold > 0:
                norm = inner_product(running, running).sqrt()
                bounded = running * (self.norm_threshold / norm.clamp(min=self.norm_threshold))
            along = inner_product(bounded, conditional) / inner_product(conditional, conditional).clamp(min=1e-12)
            return bounded - (1 - self.parallel) * along * conditional

        def combine(conditional: Tensor, null: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
            if conversion is None:
                return conditional + (self.scale - 1) * update(conditional, null)
            x0 = conversion.to_x0(x_t, conditional, t)
            x0 = x0 + (self.scale - 1) * update(x0, conversion.to_x0(x_t, null, t))
            return conversion.from_x0(x_t, x0, t)

        return combine


@dataclass(frozen=True)
class Rescale(Guidance):
    """Give the guided prediction the standard deviation of the conditional one, per image (Lin et al. 2023, arXiv
    2305.08891, section 3.4), against over-exposure at large scales; acts on the raw prediction.

    Args:
        inner: the rule whose result is rescaled.
        amount: the paper's phi, from 0 (no rescaling) to 1.
    """

    inner: Guidance
    amount: float = 0.7

    def __post_init__(self) -> None:
        require_finite(self, "amount")
        if not 0 <= self.amount <= 1:
            raise UsageError(f"Rescale: amount is {self.amount:g}; give a number from 0 to 1")

    def guides(self, t: Tensor) -> bool:
        return self.inner.guides(t)

    def combiner(self, conversion: Conversion | None = None) -> Combine:
        inner = self.inner.combiner(conversion)

        def combine(conditional: Tensor, null: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
            guided = inner(conditional, null, x_t, t)
            # clamped: an untrained network predicts 0 everywhere
            ratio = deviation(conditional) / deviation(guided).clamp(min=1e-6)
            return guided * (self.amount * ratio + (1 - self.amount))

        return combine


@dataclass(frozen=True)
class Interval(Guidance):
    """Guide only for low < t ≤ high (Kynkäänniemi et al. 2024, arXiv 2404.07724); elsewhere only the conditional prediction is
    computed, at half the cost.

    The paper bounds the noise level sigma for data of standard deviation sigma_data: on rectified flow, with latents of
    standard deviation 1, the same signal-to-noise ratio is t = sigma / (sigma + sigma_data).

    Args:
        inner: the rule inside the interval.
        low, high: times, 0 (data) to 1 (noise).
    """

    inner: Guidance
    low: float
    high: float

    def __post_init__(self) -> None:
        require_finite(self, "low", "high")
        if not 0 <= self.low < self.high <= 1:
            raise UsageError(f"Interval: low is {self.low:g} and high {self.high:g}; give 0 <= low < high <= 1")

    def guides(self, t: Tensor) -> bool:
        return self.inner.guides(t) and bool(((self.low < t) & (t <= self.high)).any())

    def combiner(self, conversion: Conversion | None = None) -> Combine:
        return self.inner.combiner(conversion)


def inner_product(first: Tensor, second: Tensor) -> Tensor:
    """Per image: (B, …) -> (B, 1, …)."""
    return (first * second).sum(tuple(range(1, first.ndim)), keepdim=True)


def deviation(prediction: Tensor) -> Tensor:
    """Standard deviation of each image's values, all channels together: (B, …) -> (B, 1, …)."""
    return prediction.std(tuple(range(1, prediction.ndim)), keepdim=True)


class GuidedDenoiser:
    """A guided denoiser for one batch of captions and one sampling run; it computes both predictions in one call."""

    def __init__(
        self,
        denoiser: nn.Module,
        condition: Condition,
        null: Condition,
        guidance: Guidance,
        conversion: Conversion | None = None,
        weak: nn.Module | None = None,
    ):
        """
        Args:
            condition: of the captions, B rows.
            null: of the empty caption or a negative prompt, B rows. Where it is ``condition`` itself and there is no ``weak``,
                as of an unconditional model, both predictions are one, and computed once.
            conversion: for rules that are defined on x0; without it they act on the raw prediction.
            weak: a weaker checkpoint of the model (same path, prediction and text encoder) for the null prediction. With
                ``null=condition`` this is autoguidance (Karras et al. 2024, arXiv 2406.02507).
        """
        self.denoiser, self.weak, self.guidance = denoiser, weak, guidance
        self.condition, self.null = condition, null
        self.combine = guidance.combiner(conversion)

    # Encoded once, at the first call that needs them.

    @cached_property
    def _conditional(self) -> Condition | EncodedText:
        return encode_condition(self.denoiser, self.condition)

    @cached_property
    def _both(self) -> Condition | EncodedText:
        return encode_condition(self.denoiser, concatenate(self.null, self.condition))

    @cached_property
    def _weak_null(self) -> Condition | EncodedText:
        assert self.weak is not None
        return encode_condition(self.weak, self.null)

    def __call__(self, x_t: Tensor, timestep: Tensor, t: Tensor) -> Tensor:
        """Guided prediction (B, C, H, W), float32.

        Args:
            x_t: (B, C, H, W), scaled by the path's ``input_scale(t)``.
            timestep: (B,), the path's ``network_time(t)``.
            t: (B,) in [0, 1], the same in all rows.
        """
        if not self.guidance.guides(t):
            return denoise(self.denoiser, x_t, timestep, self._conditional).float()
        if self.weak is None and self.null is self.condition:
            null = conditional = denoise(self.denoiser, x_t, timestep, self._conditional).float()
        elif self.weak is None:
            both = denoise(self.denoiser, torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), self._both)
            null, conditional = both.float().chunk(2)
        else:
            null = denoise(self.weak, x_t, timestep, self._weak_null).float()
            conditional = denoise(self.denoiser, x_t, timestep, self._conditional).float()
        return self.combine(conditional, null, x_t, t)
