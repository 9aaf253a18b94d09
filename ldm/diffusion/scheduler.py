"""Which diffusers scheduler samples from a model trained with a given path and prediction."""

from __future__ import annotations

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from ldm.diffusion.path import NUM_TRAIN_TIMESTEPS, Path, RectifiedFlow, VariancePreserving
from ldm.diffusion.prediction import Epsilon, Prediction, Sample, V, Velocity
from ldm.errors import UsageError

DDIM_PREDICTIONS = {Epsilon: "epsilon", Sample: "sample", V: "v_prediction"}


def matching_scheduler(path: Path, prediction: Prediction) -> SchedulerMixin:
    """The scheduler that the saved pipeline samples with.

    Raises:
        UsageError: for a pairing that no scheduler serves; the message lists those that are served.
    """
    if isinstance(path, RectifiedFlow) and isinstance(prediction, Velocity):
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
    if isinstance(path, VariancePreserving) and type(prediction) in DDIM_PREDICTIONS:
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
