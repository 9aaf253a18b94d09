"""From noise to data: a diffusers scheduler follows the path of a trained model, whatever that model predicts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
)
from torch import Tensor

from ldm.diffusion.path import ProbabilityPath, RectifiedFlow
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.scheduler import Scheduler, check_scheduler, wanted_prediction
from ldm.errors import LdmError, UsageError, first_line

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
# see set_timesteps
EVENLY_SPACED = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, LTXEulerAncestralRFScheduler)
MAX_STEPS = 10_000  # of schedulers that set no limit themselves: DDIM and DDPM take 1,000


@dataclass
class SamplerStep:
    """One function evaluation of the denoiser and the state after it.

    Attributes:
        number: of the evaluation, from 0.
        timestep: the network's time input, ().
        latents: the scheduler's state afterwards (B, …); sampling continues from what a caller assigns here.
        x0: the denoiser's prediction of the clean latents, (B, …).
    """

    number: int
    timestep: Tensor
    latents: Tensor
    x0: Tensor


class Sampler:
    """A scheduler prepared for a model and a number of steps: the time of each function evaluation, and how the model's
    prediction becomes what the scheduler wants. It may sample any number of times.

    The prediction ``y`` goes to the scheduler as ``p·x_t + q·y``: the 2×2 solve for x0 and eps and the target that the
    scheduler wants, in one; p = 0 and q = 1 where it wants what the network predicts.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        path: ProbabilityPath,
        prediction: Prediction,
        num_inference_steps: int,
        device: torch.device | str = "cpu",
        strength: float = 1.0,
        shift: float = 1.0,
    ):
        """
        Args:
            scheduler: as :func:`ldm.diffusion.scheduler.make_scheduler` gives it, or any that passes its check. A copy is used.
            path, prediction: what the denoiser was trained with.
            num_inference_steps: steps of the scheduler; ``heun`` evaluates the denoiser twice in each but the last.
            strength: share of the steps that is taken, the last ones, from a noised image (Meng et al. 2021, SDEdit, arXiv
                2108.01073); rounded down, as diffusers does. 1 is all of them, from noise alone.
            shift: of the noise levels, on top of the scheduler's own, by :func:`ldm.diffusion.timesteps.shift_time`; on
                :class:`RectifiedFlow` alone.

        Raises:
            UsageError: for a scheduler that does not fit the model, a number of steps it cannot take, or a strength that
                leaves none.
        """
        check_scheduler(scheduler, path, prediction)
        if type(num_inference_steps) is not int or num_inference_steps < 1:
            raise UsageError(f"num_inference_steps is {num_inference_steps!r}; give 1 or more")
        if num_inference_steps > MAX_STEPS:
            raise UsageError(f"num_inference_steps is {num_inference_steps}, above the limit of {MAX_STEPS:,}; lower it")
        if not (isinstance(strength, (int, float)) and 0 < strength <= 1):
            shown = f"{strength:g}" if isinstance(strength, float) else repr(strength)
            raise UsageError(f"strength is {shown}; give a number above 0 (the image as it is) and up to 1 (all anew)")
        scheduler = copy.deepcopy(scheduler)
        try:
            set_timesteps(scheduler, num_inference_steps, device, shift)
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # its config may hold anything
            raise UsageError(
                f"{type(scheduler).__name__} cannot take {num_inference_steps} steps: {first_line(error)}"
            ) from error
        set_begin_index = getattr(scheduler, "set_begin_index", None)
        if set_begin_index is None:
            # 1000 / steps may be rounded so that the trailing timesteps have one too many, -1
            scheduler.timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
        self.step_options: dict[str, Any] = {}
        if isinstance(scheduler, DDIMScheduler):
            respace(scheduler)
            self.step_options["eta"] = scheduler.config.get("eta", 0.0)
        # the scheduler's own noise levels: some round their timesteps to whole numbers
        t = path.time(_log_noise_to_signal(scheduler, path))
        # with zero terminal SNR diffusers' sigmas rise at first, but for every 4th or less
        if t.isnan().any() or (t.diff() > 1e-6).any():
            raise UsageError(
                f"{type(scheduler).__name__} does not lead down {type(path).__name__} in {num_inference_steps} steps as it is "
                "set; take fewer, and leave its sigmas plain"
            )
        order = getattr(scheduler, "order", 1)  # evaluations per step
        steps = (len(t) + order - 1) // order
        taken = int(strength * steps + 1e-6)  # 0.29 · 100 is a little less than 29
        if not taken:
            raise UsageError(
                f"strength {strength:g} of {steps} steps leaves none; give a strength of {1 / steps:.2g} or more, or more steps"
            )
        first = (steps - taken) * order
        if set_begin_index is not None:
            set_begin_index(first)  # otherwise it looks its timestep up, which rounding may have made two of
        self.scheduler, self.shift = scheduler, shift
        self.timesteps, t = scheduler.timesteps[first:], t[first:]
        self.from_noise = first == 0
        wanted = wanted_prediction(scheduler, path)
        (c, d), (c_wanted, d_wanted) = prediction.coefficients(path, t), wanted.coefficients(path, t)
        determinant = prediction.determinant(path, t)
        self.from_x_t = ((c_wanted * d - d_wanted * c) / determinant / path.input_scale(t)).tolist()
        self.from_network = (wanted.determinant(path, t) / determinant).tolist()
        self.converts = type(wanted) is not type(prediction)
        self.alpha, self.sigma = path.alpha(t).tolist(), path.sigma(t).tolist()
        self.input_scale = path.input_scale(t).tolist()
        self.x0_from_input = (d / determinant / path.input_scale(t)).tolist()
        self.x0_from_network = (-path.sigma(t) / determinant).tolist()
        # flow schedulers have neither this nor a scale: their noise has unit variance
        self.init_noise_sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
        self.counts_over_alpha = self.init_noise_sigma > 1
        self.t = t.to(device, torch.float32)
        self.network_times = path.network_time(t).to(device, torch.float32)
        self.takes_generator = "generator" in inspect.signature(scheduler.step).parameters

    def __len__(self) -> int:
        """Function evaluations of the denoiser."""
        return len(self.t)

    def __call__(
        self, denoiser: Denoiser, noise: Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Tensor:
        """The latents after the last of :meth:`steps`."""
        latents = noise
        for step in self.steps(denoiser, noise, generator):
            latents = step.latents
        return latents

    def steps(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        x0: Tensor | None = None,
    ) -> Iterator[SamplerStep]:
        """Sample step by step; the last step's latents are the result.

        Args:
            denoiser: called with the path's input_scale(t)·x_t (B, …), its network_time(t) (B,) and t (B,), as
                :class:`ldm.diffusion.guidance.GuidedDenoiser` is.
            noise: of unit variance, (B, …).
            generator: of the noise that some samplers add at every step; one, or one per row, which then does not depend on
                the batch it is in.
            x0: latents of the image to start from, like ``noise``; needed where the strength is below 1.

        Raises:
            LdmError: when the denoiser's prediction is not finite; names the step.
        """
        scheduler: Any = copy.deepcopy(self.scheduler)  # multistep schedulers keep the predictions of a run
        options = self.step_options | ({"generator": generator} if self.takes_generator else {})
        scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        if self.from_noise:
            latents = noise * self.init_noise_sigma
        else:
            assert x0 is not None, "a strength below 1 needs x0"
            latents = self.noised(x0, noise, 0)
        for number, timestep in enumerate(self.timesteps):
            scaled = scale(latents, timestep)
            y = self._predict(denoiser, scaled, number)
            predicted_x0 = self.x0_from_input[number] * scaled + self.x0_from_network[number] * y
            if self.converts:
                y = self.from_x_t[number] * scaled + self.from_network[number] * y
            latents = scheduler.step(y, timestep, latents, return_dict=False, **options)[0]
            step = SamplerStep(number, self.network_times[number], latents, predicted_x0)
            yield step
            latents = step.latents

    def noised(self, x0: Tensor, eps: Tensor, number: int) -> Tensor:
        """The scheduler's state before evaluation ``number`` for data ``x0`` and noise ``eps`` (B, …); in the end the data.

        By the path's own alpha and sigma: schedulers' ``add_noise`` rounds the timestep, or knows another path.
        """
        if number == len(self):
            return x0
        x_t = self.alpha[number] * x0 + self.sigma[number] * eps
        return x_t / self.alpha[number] if self.counts_over_alpha else x_t

    def noise_of(self, x_t: Tensor) -> Tensor:
        """The ``noise`` from which sampling with all steps starts at ``x_t`` (B, …)."""
        return x_t / (self.alpha[0] if self.counts_over_alpha else 1.0) / self.init_noise_sigma

    def denoised(self, denoiser: Denoiser, x_t: Tensor, number: int) -> Tensor:
        """The denoiser's x0 of ``x_t`` (B, …) at the time of evaluation ``number``."""
        scaled = self.input_scale[number] * x_t
        return self.x0_from_input[number] * scaled + self.x0_from_network[number] * self._predict(denoiser, scaled, number)

    def _predict(self, denoiser: Denoiser, scaled: Tensor, number: int) -> Tensor:
        network_time, t = (times[number].expand(len(scaled)) for times in (self.network_times, self.t))
        y = denoiser(scaled, network_time, t).to(scaled.dtype)
        if not y.isfinite().all():
            raise LdmError(
                f"the denoiser's prediction is not finite at step {number + 1} of {len(self)} (t = {self.t[number]:.3g}); "
                "lower the guidance scale, or sample in float32"
            )
        return y


def set_timesteps(scheduler: Any, num_inference_steps: int, device: torch.device | str, shift: float = 1.0) -> None:
    """diffusers' own, but for three flow schedulers, whose sigmas end …, 0.001, 0: their last step moves by a thousandth. They
    get sigmas evenly spaced from 1 to 0, as diffusers' pipelines of flow models pass them, then shifted as their config says.

    Args:
        shift: of a flow scheduler, which its config's is multiplied by.
    """
    if shift != 1 and not isinstance(scheduler, EVENLY_SPACED):
        scheduler.register_to_config(flow_shift=shift * scheduler.config.flow_shift)
    scheduler.set_timesteps(num_inference_steps, device=device)
    if not isinstance(scheduler, EVENLY_SPACED):
        return
    # of the three only this one takes sigmas and shifts them
    shift *= scheduler.config.get("shift", 1.0)
    euler: Any = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift)
    even = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
    euler.set_timesteps(num_inference_steps, device=device, sigmas=even)
    # shifting may round a 1 up, where log(1 - sigma) is no number
    sigmas, timesteps = euler.sigmas.clamp(max=1), euler.timesteps.clamp(max=euler.config.num_train_timesteps)
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):  # two evaluations at each level but the first and the end
        first, rest = timesteps.tensor_split([1])
        timesteps = torch.cat([first, rest.repeat_interleave(2)])
        first, rest, last = sigmas.tensor_split([1, -1])
        sigmas = torch.cat([first, rest.repeat_interleave(2), last])
    scheduler.timesteps, scheduler.sigmas = timesteps, sigmas


def respace(scheduler: DDIMScheduler) -> None:
    """Keep only the timesteps that it visits, numbered without gaps.

    diffusers' own steps ``num_train_timesteps // num_inference_steps`` down whatever the spacing, past the next timestep or
    short of it: with ``trailing`` and 7, 15, 28 … steps it never arrives at the data, with ``linspace`` never where it says.
    """
    visited = scheduler.timesteps.cpu()
    scheduler.register_to_config(num_train_timesteps=len(visited))
    scheduler.num_inference_steps = len(visited)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod[visited.flip(0)]
    scheduler.timesteps = torch.arange(len(visited) - 1, -1, -1, device=scheduler.timesteps.device)


def _log_noise_to_signal(scheduler: Scheduler, path: ProbabilityPath) -> Tensor:
    """ln(sigma / alpha) at each evaluation of the denoiser, (evaluations,) float64 on the CPU."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        alpha_bar = cast(DDPMScheduler, scheduler).alphas_cumprod.cpu()[scheduler.timesteps.cpu()].double()
        return ((1 - alpha_bar) / alpha_bar).log() / 2
    sigmas = sigmas[: len(scheduler.timesteps)].cpu().double()
    # of the straight path it is sigma itself that they count, of the others sigma / alpha
    return sigmas.logit() if isinstance(path, RectifiedFlow) else sigmas.log()
