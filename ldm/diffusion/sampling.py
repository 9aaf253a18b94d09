"""From noise to data: a diffusers scheduler walks the path of a trained model, whatever that model predicts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

from ldm.diffusion.path import Path, RectifiedFlow
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.scheduler import check_scheduler, wanted_prediction
from ldm.errors import LdmError, UsageError, first_line

OnStep = Callable[[int, Tensor, Tensor], Tensor]


class Sampler:
    """One walk of a scheduler, prepared: where each call of the denoiser stands on the model's path, and what is made of it.

    The denoiser's answer ``y`` goes to the scheduler as ``p·x_t + q·y``: the 2×2 solve for x0 and eps and the target that the
    scheduler wants, in one; p = 0 and q = 1 where it wants what the network predicts.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        path: Path,
        prediction: Prediction,
        num_inference_steps: int,
        device: torch.device | str = "cpu",
    ):
        """
        Args:
            scheduler: as :func:`ldm.diffusion.scheduler.make_scheduler` gives it, or any that passes its check.
            path, prediction: what the denoiser was trained with.
            num_inference_steps: steps of the scheduler; ``heun`` calls the denoiser twice in each but the last.

        Raises:
            UsageError: for a scheduler that does not fit the model, or a number of steps it cannot take.
        """
        check_scheduler(scheduler, path, prediction)
        if num_inference_steps < 1:
            raise UsageError(f"num_inference_steps is {num_inference_steps}; give 1 or more")
        try:
            scheduler.set_timesteps(num_inference_steps, device=device)
        except ValueError as error:
            raise UsageError(
                f"{type(scheduler).__name__} cannot take {num_inference_steps} steps: {first_line(error)}"
            ) from error
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # otherwise it looks its first timestep up, which rounding may have made two of
        else:
            # 1000 / steps may be rounded so that the trailing timesteps have one too many, -1
            scheduler.timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
        self.scheduler = respaced(scheduler) if isinstance(scheduler, DDIMScheduler) else scheduler
        # the scheduler's own noise levels: some round their timesteps to whole numbers
        t = path.time(_log_noise_to_signal(self.scheduler, path))
        # with zero terminal SNR diffusers' sigmas rise at first, but for every 4th or less
        if t.isnan().any() or (t.diff() > 1e-6).any():
            raise UsageError(
                f"{type(scheduler).__name__} does not lead down {type(path).__name__} in {num_inference_steps} steps as it is "
                "set; take fewer, and leave its sigmas plain"
            )
        wanted = wanted_prediction(scheduler)
        (c, d), (c_wanted, d_wanted) = prediction.coefficients(path, t), wanted.coefficients(path, t)
        determinant = prediction.determinant(path, t)
        self.from_x_t = ((c_wanted * d - d_wanted * c) / determinant / path.input_scale(t)).tolist()
        self.from_network = (wanted.determinant(path, t) / determinant).tolist()
        self.converts = type(wanted) is not type(prediction)
        self.t = t.to(device, torch.float32)
        self.network_times = path.network_time(t).to(device, torch.float32)
        self.step_options = {"eta": scheduler.config.get("eta", 0.0)} if isinstance(scheduler, DDIMScheduler) else {}
        self.draws_noise = "generator" in inspect.signature(scheduler.step).parameters

    def __len__(self) -> int:
        """Calls of the denoiser."""
        return len(self.t)

    def __call__(
        self,
        denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
        noise: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Latents like ``noise``.

        Args:
            denoiser: called with the path's input_scale(t)·x_t (B, …), its network_time(t) (B,) and t (B,), as
                :class:`ldm.diffusion.guidance.GuidedDenoiser` is.
            noise: of unit variance, (B, …).
            generator: of the noise that some samplers add at every step; one, or one per row, which then does not depend on
                the batch it is in.
            on_step: called with the number of the call, its timestep and the latents after it; gives the latents to go on with.

        Raises:
            LdmError: when the denoiser's answer is not finite; names the step.
        """
        scheduler, options = self.scheduler, dict(self.step_options)
        if self.draws_noise:
            options["generator"] = generator
        # flow schedulers have neither: their noise has unit variance, and their path needs no scaling
        latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        for step, timestep in enumerate(scheduler.timesteps):
            scaled = scale(latents, timestep)
            network_time, t = (times[step].expand(len(latents)) for times in (self.network_times, self.t))
            y = denoiser(scaled, network_time, t).to(latents.dtype)
            if not y.isfinite().all():
                raise LdmError(
                    f"the denoiser's answer is not finite at step {step + 1} of {len(self)} (t = {self.t[step]:.3g}); "
                    "lower the guidance scale, or sample in float32"
                )
            if self.converts:
                y = self.from_x_t[step] * scaled + self.from_network[step] * y
            latents = scheduler.step(y, timestep, latents, return_dict=False, **options)[0]
            if on_step is not None:
                latents = on_step(step, self.network_times[step], latents)
        return latents


def respaced(scheduler: DDIMScheduler) -> DDIMScheduler:
    """A copy that knows only the timesteps it visits, numbered without gaps.

    diffusers' own steps ``num_train_timesteps // num_inference_steps`` down whatever the spacing, past the next timestep or
    short of it: with ``trailing`` and 7, 15, 28 … steps it never arrives at the data, with ``linspace`` never where it says.
    """
    visited = scheduler.timesteps.cpu()
    made = copy.copy(scheduler)
    made.register_to_config(num_train_timesteps=len(visited))
    made.num_inference_steps = len(visited)
    made.alphas_cumprod = scheduler.alphas_cumprod[visited.flip(0)]
    made.timesteps = torch.arange(len(visited) - 1, -1, -1, device=scheduler.timesteps.device)
    return made


def _log_noise_to_signal(scheduler: SchedulerMixin, path: Path) -> Tensor:
    """ln(sigma / alpha) at each call of the denoiser, (calls,) float64 on the CPU."""
    if not hasattr(scheduler, "sigmas"):
        alpha_bar = scheduler.alphas_cumprod.cpu()[scheduler.timesteps.cpu()].double()
        return ((1 - alpha_bar) / alpha_bar).log() / 2
    sigmas = scheduler.sigmas[: len(scheduler.timesteps)].cpu().double()
    # of the straight path it is sigma itself that they count, of the others sigma / alpha
    return sigmas.logit() if isinstance(path, RectifiedFlow) else sigmas.log()
