"""Which diffusers schedulers sample from a trained model, by name; all they need is derived from its path and prediction.

What a model was trained with is kept in words (``class_path`` and ``init_args``, as in YAML) beside the saved weights, so
that any other sampler can be derived later: ``make_scheduler("unipc", *pipeline.diffusion)``.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from ldm.diffusion.path import NUM_TRAIN_TIMESTEPS, ProbabilityPath, RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import X0, Epsilon, Preconditioned, Prediction, V, Velocity
from ldm.errors import UsageError

SDE = {"algorithm_type": "sde-dpmsolver++"}
# name -> class and what sets it apart; the first of a path is what its pipelines are saved with
SAMPLERS: dict[type[ProbabilityPath], dict[str, tuple[type[SchedulerMixin], dict[str, str]]]] = {
    VariancePreserving: {
        "ddim": (DDIMScheduler, {}),
        "ddpm": (DDPMScheduler, {}),
        "euler": (EulerDiscreteScheduler, {}),
        "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
        "heun": (HeunDiscreteScheduler, {}),
        "dpm++2m": (DPMSolverMultistepScheduler, {}),
        "dpm++2m-sde": (DPMSolverMultistepScheduler, SDE),
        "unipc": (UniPCMultistepScheduler, {}),
    },
    RectifiedFlow: {
        "euler": (FlowMatchEulerDiscreteScheduler, {}),
        "euler-ancestral": (LTXEulerAncestralRFScheduler, {}),
        "heun": (FlowMatchHeunDiscreteScheduler, {}),
        "dpm++2m": (DPMSolverMultistepScheduler, {}),
        "dpm++2m-sde": (DPMSolverMultistepScheduler, SDE),
        "unipc": (UniPCMultistepScheduler, {}),
    },
    VarianceExploding: {
        "dpm++2m": (EDMDPMSolverMultistepScheduler, {}),
        "dpm++2m-sde": (EDMDPMSolverMultistepScheduler, SDE),
        "euler": (EDMEulerScheduler, {}),
    },
}
PREDICTION_TYPES = {"epsilon": Epsilon, "sample": X0, "v_prediction": V, "flow_prediction": Velocity}
# x0 = (x_t − sigma·eps) / alpha: an error in eps comes out sigma / alpha times as large, 2 % of it 40 times the data
LEAST_SIGNAL = 5e-4


class Diffusion(NamedTuple):
    """What a model was trained with, and what its samplers are derived from."""

    path: ProbabilityPath
    prediction: Prediction


def samplers_for(path: ProbabilityPath, prediction: Prediction) -> list[str]:
    """The names :func:`make_scheduler` takes for a model, the default first.

    Raises:
        UsageError: where no scheduler can start from the path's noise, or none walks the path.
    """
    return list(_samplers(path, prediction))


def make_scheduler(name: str, path: ProbabilityPath, prediction: Prediction, **options: Any) -> SchedulerMixin:
    """The scheduler of a name for a model.

    Args:
        name: one of :func:`samplers_for`.
        options: of the scheduler's own config where the model leaves a choice (``timestep_spacing``, ``use_karras_sigmas``,
            ``shift``, …); and ``eta`` of ``ddim``, from 0 (deterministic) to 1 (as much new noise as DDPM's own steps).

    Raises:
        UsageError: for a name or an option that does not fit; the message lists those that do.
    """
    named = _samplers(path, prediction)
    if name not in named:
        raise UsageError(f"no sampler {name!r} for {_words(path, prediction)}; choose one of: {', '.join(named)}")
    kind, apart = named[name]
    allowed = inspect.signature(kind.__init__).parameters
    derived = {key: value for key, value in (apart | _derived(kind, path, prediction)).items() if key in allowed}
    # from the noisiest step down, whatever the number of steps (Lin et al. 2023, arXiv 2305.08891)
    default = {"timestep_spacing": "trailing"} if "timestep_spacing" in allowed else {}
    eta = options.pop("eta", 0.0) if kind is DDIMScheduler else 0.0
    if not 0 <= eta <= 1:
        raise UsageError(f"eta of the sampler ddim is {eta:g}; give a number from 0 to 1")
    free = [key for key in allowed if key not in derived and key != "self"] + ["eta"] * (kind is DDIMScheduler)
    for key in options:
        if key not in free:
            raise UsageError(f"the sampler {name} has no option {key!r} of its own; choose from: {', '.join(free)}")
    try:
        scheduler = kind(**derived | default | options)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise UsageError(f"the sampler {name} cannot be made with {options}: {error}") from error
    if eta:
        scheduler.register_to_config(eta=eta)
    return scheduler


def matching_scheduler(path: ProbabilityPath, prediction: Prediction) -> SchedulerMixin:
    """The scheduler that the saved pipeline samples with.

    Raises:
        UsageError: for a pairing that no scheduler serves.
    """
    return make_scheduler(samplers_for(path, prediction)[0], path, prediction)


def check_scheduler(scheduler: SchedulerMixin, path: ProbabilityPath, prediction: Prediction) -> None:
    """Refuse a scheduler, whoever made it, that does not walk the path of the model.

    Raises:
        UsageError: naming what does not fit, and the samplers that do.
    """
    named, config, kind = _samplers(path, prediction), scheduler.config, type(scheduler)
    wrong = [f"{key}={config[key]!r}" for key, value in _demanded(path).items() if key in config and config[key] != value]
    if kind not in {served for served, _ in named.values()}:
        wrong = [f"the class {kind.__name__}"]
    elif isinstance(path, VariancePreserving) and not wrong:
        t = torch.arange(1, NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS
        found = scheduler.alphas_cumprod.double()
        if found.shape != t.shape or not torch.allclose(found, path.alpha(t).square(), rtol=0, atol=1e-4):
            wrong = ["its schedule of betas"]
        blind = {"epsilon"} if path.alpha(t[-1:]) < LEAST_SIGNAL else set()
        if config.prediction_type not in {"epsilon", "sample", "v_prediction"} - blind:
            wrong = [f"prediction_type={config.prediction_type!r}"]
    if wrong:
        raise UsageError(
            f"{kind.__name__} does not fit {_words(path, prediction)} ({', '.join(wrong)}); "
            f"set pipeline.scheduler = make_scheduler(name, *pipeline.diffusion) with one of: {', '.join(named)}"
        )


def wanted_prediction(scheduler: SchedulerMixin) -> Prediction:
    """What a scheduler's ``step`` takes as the model's output."""
    if isinstance(scheduler, (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)):
        return Preconditioned()  # they call it "epsilon"
    kind = PREDICTION_TYPES.get(scheduler.config.get("prediction_type", "flow_prediction"))
    if kind is None:
        raise UsageError(f"{type(scheduler).__name__} wants {scheduler.config.prediction_type!r}, which no model predicts")
    return kind()


def diffusion_config(path: ProbabilityPath, prediction: Prediction) -> dict[str, dict[str, Any]]:
    """Path and prediction as JSON, in the words of the YAML that chose them; see :func:`diffusion_from`."""
    return {"path": _describe(path), "prediction": _describe(prediction)}


def diffusion_from(description: dict[str, dict[str, Any]]) -> Diffusion:
    """Path and prediction of what :func:`diffusion_config` gave; only classes of modules that are imported are made.

    Raises:
        UsageError: for anything else.
    """
    try:
        return Diffusion(_make(description["path"], ProbabilityPath), _make(description["prediction"], Prediction))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"diffusion of model_index.json cannot be read ({type(error).__name__}: {error}); restore it"
        ) from error


def diffusion_of(scheduler: SchedulerMixin) -> Diffusion:
    """Path and prediction that a scheduler was derived from: for pipelines that do not say.

    Raises:
        UsageError: where the scheduler is none of ours.
    """
    config, prediction = scheduler.config, wanted_prediction(scheduler)
    if isinstance(prediction, Preconditioned):
        diffusion = Diffusion(VarianceExploding(config.sigma_min, config.sigma_max, config.sigma_data), prediction)
    elif "beta_schedule" not in config or config.get("use_flow_sigmas"):
        diffusion = Diffusion(RectifiedFlow(), prediction)
    else:
        zero_terminal_snr = config.get("rescale_betas_zero_snr", False)
        diffusion = Diffusion(VariancePreserving(config.beta_schedule, zero_terminal_snr), prediction)
    check_scheduler(scheduler, *diffusion)
    return diffusion


def _samplers(path: ProbabilityPath, prediction: Prediction) -> dict[str, tuple[type[SchedulerMixin], dict[str, str]]]:
    """The path's part of the table."""
    named = next((named for kind, named in SAMPLERS.items() if isinstance(path, kind)), None)
    if named is None:
        served = ", ".join(kind.__name__ for kind in SAMPLERS)
        raise UsageError(f"no scheduler of diffusers walks {type(path).__name__}; set model.path to one of: {served}")
    one = torch.ones(1, dtype=torch.float64)
    lengths = [torch.hypot(*pair) for pair in ((path.alpha(one), path.sigma(one)), prediction.coefficients(path, one))]
    if not prediction.determinant(path, one).abs() > LEAST_SIGNAL * lengths[0] * lengths[1]:
        raise UsageError(
            f"{type(prediction).__name__} says nothing of the image where {_words(path)} begins (alpha = 0); set "
            "model.prediction to V, Sample or Velocity"
            + (", or the schedule to a plain linear or scaled_linear" if isinstance(path, VariancePreserving) else "")
        )
    # it averages slopes over sigma / alpha, in which the first step from almost pure noise is thousands long
    without = {HeunDiscreteScheduler} if path.alpha(one) < LEAST_SIGNAL else set()
    return {name: entry for name, entry in named.items() if entry[0] not in without}


def _demanded(path: ProbabilityPath) -> dict[str, Any]:
    """What a scheduler's config must say, where it has a say, to walk a path."""
    if isinstance(path, VarianceExploding):
        sigmas = {key: getattr(path, key) for key in ("sigma_min", "sigma_max", "sigma_data")}
        return {"prediction_type": "epsilon", "thresholding": False, **sigmas}
    # latents are not bounded by 1; noise anew at every step would forget what is known of the image
    common = {"clip_sample": False, "thresholding": False, "stochastic_sampling": False}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    apart = flow if isinstance(path, RectifiedFlow) else {"use_flow_sigmas": False}
    return common | apart | {"num_train_timesteps": NUM_TRAIN_TIMESTEPS}


def _derived(kind: type[SchedulerMixin], path: ProbabilityPath, prediction: Prediction) -> dict[str, Any]:
    """The part of a scheduler's config that the model decides."""
    derived = _demanded(path)
    if not isinstance(path, VariancePreserving):
        return derived
    # in full, as HeunDiscreteScheduler's own defaults are not those of the others
    betas = DDPMScheduler(**path.scheduler_config).config
    derived |= path.scheduler_config | {"beta_start": betas.beta_start, "beta_end": betas.beta_end}
    # the network's own where the scheduler takes it; v is never blind
    own = next((key for key, value in PREDICTION_TYPES.items() if value is type(prediction)), "flow_prediction")
    not_taken = {"flow_prediction"} | ({"sample"} if kind is EulerAncestralDiscreteScheduler else set())
    return derived | {"prediction_type": "v_prediction" if own in not_taken else own}


def _words(path: ProbabilityPath, prediction: Prediction | None = None) -> str:
    """A model in a few words, for messages."""
    settings = ", ".join(f"{key}={value}" for key, value in _describe(path)["init_args"].items())
    return (f"{type(prediction).__name__} on " if prediction else "") + f"{type(path).__name__}({settings})"


def _describe(part: ProbabilityPath | Prediction) -> dict[str, Any]:
    kind = type(part)
    known = vars(part) | ({"schedule": part.scheduler_config["beta_schedule"]} if isinstance(part, VariancePreserving) else {})
    settings = {name: known[name] for name in inspect.signature(kind).parameters}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": settings}


def _make(description: dict[str, Any], base: type) -> Any:
    """Of a module that is imported already: a file that is read must not decide what code runs."""
    module, _, name = description["class_path"].rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        raise ValueError(f"{description['class_path']} is no {base.__name__}, or its module must be imported first")
    return kind(**description["init_args"])
