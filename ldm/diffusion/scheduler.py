"""Which diffusers scheduler samples from a model trained with a given path and prediction."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from ldm.diffusion.path import NUM_TRAIN_TIMESTEPS, Path, RectifiedFlow, VariancePreserving
from ldm.diffusion.prediction import Epsilon, Prediction, Sample, V, Velocity
from ldm.errors import UsageError

LEAST_ALPHA_FOR_EPSILON = 1e-3
DDIM_PREDICTIONS = {Epsilon: "epsilon", Sample: "sample", V: "v_prediction"}


def matching_scheduler(path: Path, prediction: Prediction) -> SchedulerMixin:
    """The scheduler that the saved pipeline samples with.

    Raises:
        UsageError: for a pairing that no scheduler serves; the message lists those that are served.
    """
    if isinstance(path, RectifiedFlow) and isinstance(prediction, Velocity):
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
    if isinstance(path, VariancePreserving) and type(prediction) in DDIM_PREDICTIONS:
        # x0 = (x_t − sigma·eps) / alpha: at the first step an error of 2 % in eps would be magnified alpha⁻¹-fold
        if isinstance(prediction, Epsilon) and path.alpha(torch.ones(1)) < LEAST_ALPHA_FOR_EPSILON:
            raise UsageError(
                f"Epsilon says nothing of the picture where the schedule {path.scheduler_config['beta_schedule']} begins "
                "(alpha = 0); set model.prediction to V or Sample, or the schedule to linear or scaled_linear"
            )
        return DDIMScheduler(
            **path.scheduler_config,
            prediction_type=DDIM_PREDICTIONS[type(prediction)],
            clip_sample=False,  # latents are not bounded by 1
            set_alpha_to_one=True,  # the path ends at the data itself: alpha(0) = 1
            timestep_spacing="trailing",  # starts at the noisiest step whatever the number of steps (Lin et al. 2023)
        )
    raise UsageError(
        f"no scheduler samples from {type(prediction).__name__} on {type(path).__name__}; "
        "set model.prediction to Velocity with RectifiedFlow, or to Epsilon, Sample or V with VariancePreserving"
    )
