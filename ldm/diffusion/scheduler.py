"""Which diffusers schedulers sample from a trained model, by name; all they need is derived from its path and prediction.

:data:`SAMPLERS` is the one table of them. What a model was trained with is saved beside its weights as in YAML (``class_path``
and ``init_args``), so that any other sampler can be derived later: ``make_scheduler("unipc", *pipeline.diffusion)``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol, cast

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
    UniPCMultistepScheduler,
)
from torch import Tensor

from ldm.diffusion.path import NUM_TRAIN_TIMESTEPS, ProbabilityPath, RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import X0, Epsilon, Preconditioned, Prediction, V, Velocity
from ldm.diffusion.timesteps import ResolutionShift, TimestepSampler
from ldm.errors import UsageError


class Scheduler(Protocol):
    """What all schedulers of diffusers have; their common base class declares none of it."""

    timesteps: Tensor

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def set_timesteps(self) -> Callable[..., Any]: ...
    @property
    def step(self) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class SamplerSpec:
    """One row of :data:`SAMPLERS`.

    Attributes:
        a1111: its name in the text that A1111 writes into a PNG.
        schedulers: the class of diffusers for each path that it can follow.
        settings: of the scheduler's config: what distinguishes it from other samplers of the same class.
        adds_noise: its steps add random noise.
        invertible: its steps are those that :func:`ldm.diffusion.editing.invert` follows backwards.
        takes: on a :class:`VariancePreserving` path, the predictions that its scheduler takes as they are. Others are converted
            to V; on the other paths every prediction is converted to that of :data:`WANTED`.
        needs_signal: on a :class:`VariancePreserving` path, it cannot start where alpha is 0.
    """

    a1111: str
    schedulers: Mapping[type[ProbabilityPath], type]
    settings: dict[str, Any] = field(default_factory=dict)
    adds_noise: bool = False
    invertible: bool = False
    takes: tuple[type[Prediction], ...] = (Epsilon, X0, V)
    needs_signal: bool = False

    @property
    def takes_eta(self) -> bool:
        """Whether its steps add as much noise as an option ``eta`` says, from 0 to 1."""
        return any("eta" in inspect.signature(kind.step).parameters for kind in self.schedulers.values())


_DPM_SOLVER = {
    VariancePreserving: DPMSolverMultistepScheduler,
    RectifiedFlow: DPMSolverMultistepScheduler,
    VarianceExploding: EDMDPMSolverMultistepScheduler,
}
# Heun averages slopes over sigma / alpha, in which the first step from almost pure noise is thousands long. A1111 has no DDPM.
SAMPLERS: dict[str, SamplerSpec] = {
    "ddim": SamplerSpec("DDIM", {VariancePreserving: DDIMScheduler}, invertible=True),
    "ddpm": SamplerSpec("ddpm", {VariancePreserving: DDPMScheduler}, adds_noise=True),
    "euler": SamplerSpec(
        "Euler",
        {
            VariancePreserving: EulerDiscreteScheduler,
            RectifiedFlow: FlowMatchEulerDiscreteScheduler,
            VarianceExploding: EDMEulerScheduler,
        },
        invertible=True,
    ),
    "euler-ancestral": SamplerSpec(
        "Euler a",
        {VariancePreserving: EulerAncestralDiscreteScheduler, RectifiedFlow: LTXEulerAncestralRFScheduler},
        adds_noise=True,
        takes=(Epsilon, V),
    ),
    "heun": SamplerSpec(
        "Heun",
        {VariancePreserving: HeunDiscreteScheduler, RectifiedFlow: FlowMatchHeunDiscreteScheduler},
        needs_signal=True,
    ),
    "dpm++2m": SamplerSpec("DPM++ 2M", _DPM_SOLVER),
    "dpm++2m-sde": SamplerSpec("DPM++ 2M SDE", _DPM_SOLVER, {"algorithm_type": "sde-dpmsolver++"}, adds_noise=True),
    "unipc": SamplerSpec("UniPC", {VariancePreserving: UniPCMultistepScheduler, RectifiedFlow: UniPCMultistepScheduler}),
}
# the sampler that a pipeline is saved with
DEFAULTS: dict[type[ProbabilityPath], str] = {VariancePreserving: "ddim", RectifiedFlow: "euler", VarianceExploding: "dpm++2m"}
# what the schedulers of a path take as the model's output; those of VariancePreserving say so in their config
WANTED: dict[type[ProbabilityPath], type[Prediction]] = {RectifiedFlow: Velocity, VarianceExploding: Preconditioned}
PREDICTION_TYPES: dict[str, type[Prediction]] = {
    "epsilon": Epsilon,
    "sample": X0,
    "v_prediction": V,
    "flow_prediction": Velocity,
}
# x0 = (x_t − sigma·eps) / alpha: an error in eps comes out sigma / alpha times as large, 2 % of it 40 times the data
LEAST_SIGNAL = 5e-4


class Diffusion(NamedTuple):
    """What a model was trained with, and what its samplers are derived from."""

    path: ProbabilityPath
    prediction: Prediction


def samplers_for(path: ProbabilityPath, prediction: Prediction) -> list[str]:
    """The names :func:`make_scheduler` takes for a model, the default first. Raises UsageError where no scheduler can start
    from the path's noise, or none follows the path."""
    return list(_samplers(path, prediction))


def make_scheduler(name: str, path: ProbabilityPath, prediction: Prediction, **options: Any) -> Any:
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
        raise UsageError(f"no sampler {name!r} for {_text(path, prediction)}; choose one of: {', '.join(named)}")
    kind, spec = named[name], SAMPLERS[name]
    allowed = inspect.signature(kind.__init__).parameters
    derived = {key: value for key, value in (spec.settings | _derived(spec, path, prediction)).items() if key in allowed}
    # from the noisiest step down, whatever the number of steps (Lin et al. 2023, arXiv 2305.08891)
    default = {"timestep_spacing": "trailing"} if "timestep_spacing" in allowed else {}
    eta = options.pop("eta", 0.0) if spec.takes_eta else 0.0
    if not 0 <= eta <= 1:
        raise UsageError(f"eta of the sampler {name} is {eta:g}; give a number from 0 to 1")
    free = [key for key in allowed if key not in derived and key != "self"] + ["eta"] * spec.takes_eta
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


def matching_scheduler(path: ProbabilityPath, prediction: Prediction) -> Any:
    """The scheduler that the saved pipeline samples with. Raises UsageError for a pairing that no scheduler serves."""
    return make_scheduler(samplers_for(path, prediction)[0], path, prediction)


def sampler_name(scheduler: Scheduler) -> str:
    """The name that makes this scheduler; its class where none does."""
    fitting = [
        (len(spec.settings), name)
        for name, spec in SAMPLERS.items()
        if type(scheduler) in spec.schedulers.values() and spec.settings.items() <= scheduler.config.items()
    ]
    return max(fitting, default=(0, type(scheduler).__name__))[1]


def scheduler_from(config: dict[str, Any]) -> Any:
    """The scheduler of a config that diffusers saved. Raises UsageError for one that is not of :data:`SAMPLERS`."""
    kinds = {kind.__name__: kind for spec in SAMPLERS.values() for kind in spec.schedulers.values()}
    if (name := config.get("_class_name")) not in kinds:
        raise UsageError(f"the scheduler {name!r} is none of: {', '.join(sorted(kinds))}; name another one")
    # refused before a table of any length is made
    if (number := config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)) != NUM_TRAIN_TIMESTEPS:
        raise UsageError(f"the scheduler's num_train_timesteps is {str(number)[:20]}; give {NUM_TRAIN_TIMESTEPS}")
    return kinds[name].from_config(config)


def adds_noise(scheduler: Scheduler) -> bool:
    """Whether its steps add random noise, by its kind or by the options of its config."""
    spec, config = SAMPLERS.get(sampler_name(scheduler)), scheduler.config
    stochastic = config.get("eta", 0) > 0 or config.get("algorithm_type", "").startswith("sde")
    return stochastic or (spec is not None and spec.adds_noise)


def check_scheduler(scheduler: Scheduler, path: ProbabilityPath, prediction: Prediction) -> None:
    """Raise UsageError for a scheduler, whoever made it, that does not follow the path of the model; it lists those that do."""
    named, config, kind = _samplers(path, prediction), scheduler.config, type(scheduler)
    wrong = [f"{key}={config[key]!r}" for key, value in _demanded(path).items() if key in config and config[key] != value]
    if kind not in named.values():
        wrong = [f"the class {kind.__name__}"]
    elif isinstance(path, VariancePreserving) and not wrong:
        t = torch.arange(1, NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS
        found = cast(DDPMScheduler, scheduler).alphas_cumprod.double()  # as all of this path have
        if found.shape != t.shape or not torch.allclose(found, path.alpha(t).square(), rtol=0, atol=1e-4):
            wrong = ["its schedule of betas"]
        blind = {"epsilon"} if path.alpha(t[-1:]) < LEAST_SIGNAL else set()
        if config["prediction_type"] not in {"epsilon", "sample", "v_prediction"} - blind:
            wrong = [f"prediction_type={config['prediction_type']!r}"]
    if wrong:
        raise UsageError(
            f"{kind.__name__} does not fit {_text(path, prediction)} ({', '.join(wrong)}); "
            f"set pipeline.scheduler = make_scheduler(name, *pipeline.diffusion) with one of: {', '.join(named)}"
        )


def wanted_prediction(scheduler: Scheduler, path: ProbabilityPath) -> Prediction:
    """What a scheduler's ``step`` takes as the model's output."""
    for kind, wanted in WANTED.items():
        if isinstance(path, kind):
            return wanted()
    prediction_type = scheduler.config["prediction_type"]
    if prediction_type not in PREDICTION_TYPES:
        raise UsageError(f"{type(scheduler).__name__} wants {prediction_type!r}, which no model predicts")
    return PREDICTION_TYPES[prediction_type]()


def diffusion_config(
    path: ProbabilityPath, prediction: Prediction, timesteps: TimestepSampler | None = None
) -> dict[str, dict[str, Any]]:
    """Path and prediction as JSON, ``class_path`` and ``init_args`` as in YAML; see :func:`diffusion_from`.

    With the density of t in training that shifts by the size of latents, also its shift, where samplers follow it: on
    :class:`RectifiedFlow`; see :func:`resolution_shift_from`.
    """
    shift = getattr(timesteps, "resolution_shift", ResolutionShift())
    followed = isinstance(path, RectifiedFlow) and shift.base_side is not None
    described = {"path": describe(path), "prediction": describe(prediction)}
    return described | ({"resolution_shift": asdict(shift)} if followed else {})


def diffusion_from(description: dict[str, dict[str, Any]]) -> Diffusion:
    """Path and prediction of what :func:`diffusion_config` gave; only classes of modules that are imported are made. Raises
    UsageError for anything else."""
    try:
        return Diffusion(_make(description["path"], ProbabilityPath), _make(description["prediction"], Prediction))
    except (KeyError, TypeError, AttributeError, ValueError, NotImplementedError) as error:
        raise UsageError(
            f"diffusion of model_index.json cannot be read ({type(error).__name__}: {error}); restore it"
        ) from error


def resolution_shift_from(description: dict[str, dict[str, Any]]) -> ResolutionShift:
    """The shift of what :func:`diffusion_config` gave; none where it has none. Raises UsageError for what is no shift."""
    found = description.get("resolution_shift", {})
    try:
        return ResolutionShift(**found)
    except TypeError as error:
        raise UsageError(f"resolution_shift of model_index.json is {found!r}; restore it") from error


def diffusion_of(scheduler: Scheduler) -> Diffusion:
    """Path and prediction that a scheduler was derived from: for pipelines that do not say. Raises UsageError where the
    scheduler is not of :data:`SAMPLERS`."""
    config = scheduler.config
    if type(scheduler) in [spec.schedulers.get(VarianceExploding) for spec in SAMPLERS.values()]:
        path = VarianceExploding(config["sigma_min"], config["sigma_max"], config["sigma_data"])
    elif "beta_schedule" not in config or config.get("use_flow_sigmas"):
        path = RectifiedFlow()
    else:
        path = VariancePreserving(config["beta_schedule"], config.get("rescale_betas_zero_snr", False))
    diffusion = Diffusion(path, wanted_prediction(scheduler, path))
    check_scheduler(scheduler, *diffusion)
    return diffusion


def _samplers(path: ProbabilityPath, prediction: Prediction) -> dict[str, type]:
    """Name -> class of the schedulers for a model, the default first."""
    followed = next((kind for kind in DEFAULTS if isinstance(path, kind)), None)
    if followed is None:
        served = ", ".join(kind.__name__ for kind in DEFAULTS)
        raise UsageError(f"no scheduler of diffusers follows {type(path).__name__}; take one of these paths: {served}")
    one = torch.ones(1, dtype=torch.float64)
    lengths = [torch.hypot(*pair) for pair in ((path.alpha(one), path.sigma(one)), prediction.coefficients(path, one))]
    if not prediction.determinant(path, one).abs() > LEAST_SIGNAL * lengths[0] * lengths[1]:
        raise UsageError(
            f"{type(prediction).__name__} says nothing of the image where {_text(path)} begins (alpha = 0); predict V, X0 or "
            "Velocity" + (", or take a plain linear or scaled_linear schedule" if isinstance(path, VariancePreserving) else "")
        )
    blind = isinstance(path, VariancePreserving) and bool(path.alpha(one) < LEAST_SIGNAL)
    served = [name for name, spec in SAMPLERS.items() if followed in spec.schedulers and not (spec.needs_signal and blind)]
    served.sort(key=lambda name: name != DEFAULTS[followed])
    return {name: SAMPLERS[name].schedulers[followed] for name in served}


def _demanded(path: ProbabilityPath) -> dict[str, Any]:
    """What a scheduler's config must say, where it has a say, to follow a path."""
    if isinstance(path, VarianceExploding):
        sigmas = {key: getattr(path, key) for key in ("sigma_min", "sigma_max", "sigma_data")}
        return {"prediction_type": "epsilon", "thresholding": False, **sigmas}  # so they call Preconditioned
    # latents are not bounded by 1; new noise at every step would discard what is known of the image
    common = {"clip_sample": False, "thresholding": False, "stochastic_sampling": False}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    apart = flow if isinstance(path, RectifiedFlow) else {"use_flow_sigmas": False}
    return common | apart | {"num_train_timesteps": NUM_TRAIN_TIMESTEPS}


def _derived(spec: SamplerSpec, path: ProbabilityPath, prediction: Prediction) -> dict[str, Any]:
    """The part of a scheduler's config that the model decides."""
    derived = _demanded(path)
    if not isinstance(path, VariancePreserving):
        return derived
    # in full, as HeunDiscreteScheduler's own defaults are not those of the others
    betas = DDPMScheduler(**path.scheduler_config).config
    derived |= path.scheduler_config | {key: betas[key] for key in ("beta_start", "beta_end")}
    names = {kind: name for name, kind in PREDICTION_TYPES.items() if kind in spec.takes}
    return derived | {"prediction_type": names.get(type(prediction), "v_prediction")}  # V is defined at every alpha


def _text(path: ProbabilityPath, prediction: Prediction | None = None) -> str:
    """A model in a few words, for messages."""
    settings = ", ".join(f"{key}={value}" for key, value in describe(path)["init_args"].items())
    return (f"{type(prediction).__name__} on " if prediction else "") + f"{type(path).__name__}({settings})"


def describe(part: ProbabilityPath | Prediction) -> dict[str, Any]:
    """As JSON: ``class_path`` and ``init_args``."""
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
