"""Which sampler is derived from which model, and what is refused."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from ldm.diffusion.path import ProbabilityPath, RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import X0, Epsilon, Preconditioned, Score, V, Velocity
from ldm.diffusion.scheduler import (
    check_scheduler,
    diffusion_config,
    diffusion_from,
    diffusion_of,
    make_scheduler,
    matching_scheduler,
    samplers_for,
)
from ldm.errors import UsageError

PRESERVING = ["ddim", "ddpm", "euler", "euler-ancestral", "heun", "dpm++2m", "dpm++2m-sde", "unipc"]
FLOW = ["euler", "euler-ancestral", "heun", "dpm++2m", "dpm++2m-sde", "unipc"]
EXPLODING = ["dpm++2m", "euler", "dpm++2m-sde"]
MODELS = [
    (VariancePreserving(), Epsilon(), PRESERVING),
    (VariancePreserving("linear"), X0(), PRESERVING),
    (VariancePreserving("linear"), Velocity(), PRESERVING),
    # Heun's steps in sigma / alpha have no end to begin from
    (VariancePreserving("squaredcos_cap_v2"), V(), [name for name in PRESERVING if name != "heun"]),
    (VariancePreserving(zero_terminal_snr=True), V(), [name for name in PRESERVING if name != "heun"]),
    (RectifiedFlow(), Velocity(), FLOW),
    (RectifiedFlow(), X0(), FLOW),
    (VarianceExploding(sigma_max=50.0, sigma_data=0.5), Preconditioned(), EXPLODING),
    (VarianceExploding(), Epsilon(), EXPLODING),
    (VarianceExploding(), Score(), EXPLODING),
]


@pytest.mark.parametrize("path, prediction, names", MODELS)
def test_every_sampler_of_a_model_fits_it_and_comes_back_from_its_own_config(path, prediction, names):
    assert samplers_for(path, prediction) == names
    assert matching_scheduler(path, prediction).config == make_scheduler(names[0], path, prediction).config
    for name in names:
        scheduler = make_scheduler(name, path, prediction)
        check_scheduler(scheduler, path, prediction)
        again = type(scheduler).from_config(json.loads(scheduler.to_json_string()))
        check_scheduler(again, path, prediction)
        assert type(diffusion_of(again).path) is type(path)


@pytest.mark.parametrize("path", [VariancePreserving(), VariancePreserving("linear")])
def test_all_schedulers_of_a_schedule_have_its_betas(path):
    """HeunDiscreteScheduler's defaults are those of another schedule."""
    expected = DDPMScheduler(**path.scheduler_config).alphas_cumprod
    for name in samplers_for(path, V()):
        assert torch.equal(make_scheduler(name, path, V()).alphas_cumprod, expected), name


@pytest.mark.parametrize(
    "path, prediction, name, kind, config",
    [
        (VariancePreserving(), Epsilon(), "ddim", DDIMScheduler, {"prediction_type": "epsilon", "clip_sample": False}),
        (VariancePreserving(), X0(), "ddpm", DDPMScheduler, {"prediction_type": "sample", "timestep_spacing": "trailing"}),
        (VariancePreserving(), X0(), "euler-ancestral", None, {"prediction_type": "v_prediction"}),
        (VariancePreserving("linear", True), V(), "euler", EulerDiscreteScheduler, {"rescale_betas_zero_snr": True}),
        (VariancePreserving(), V(), "dpm++2m", DPMSolverMultistepScheduler, {"use_flow_sigmas": False}),
        (RectifiedFlow(), X0(), "unipc", UniPCMultistepScheduler, {"prediction_type": "flow_prediction"}),
        (RectifiedFlow(), Velocity(), "dpm++2m-sde", None, {"use_flow_sigmas": True, "algorithm_type": "sde-dpmsolver++"}),
        (VarianceExploding(0.01, 50.0, 0.7), V(), "euler", EDMEulerScheduler, {"sigma_max": 50.0, "sigma_data": 0.7}),
    ],
)
def test_what_a_user_must_not_know_is_derived(path, prediction, name, kind, config):
    scheduler = make_scheduler(name, path, prediction)
    assert kind is None or type(scheduler) is kind
    assert config.items() <= dict(scheduler.config).items()


def one_line(error):
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    return str(error.value)


def test_a_name_of_another_path_is_refused_with_those_of_this_one():
    with pytest.raises(UsageError) as error:
        make_scheduler("ddim", RectifiedFlow(), Velocity())
    assert one_line(error) == ("no sampler 'ddim' for Velocity on RectifiedFlow(); choose one of: " + ", ".join(FLOW))


def test_options_are_those_the_model_leaves_open():
    made = make_scheduler("ddim", VariancePreserving(), V(), timestep_spacing="leading", eta=0.5)
    assert made.config.timestep_spacing == "leading" and made.config.eta == 0.5
    assert make_scheduler("euler", RectifiedFlow(), Velocity(), shift=3.0).config.shift == 3.0
    for options, why in (
        ({"prediction_type": "epsilon"}, "the sampler ddim has no option 'prediction_type' of its own; choose from: .*, eta"),
        ({"speed": 3}, "no option 'speed'"),
        ({"eta": 1.5}, "eta of the sampler ddim is 1.5; give a number from 0 to 1"),
    ):
        with pytest.raises(UsageError, match=why) as error:
            make_scheduler("ddim", VariancePreserving(), V(), **options)
        one_line(error)
    with pytest.raises(UsageError, match="the sampler ddpm has no option 'eta'"):
        make_scheduler("ddpm", VariancePreserving(), V(), eta=0.5)
    with pytest.raises(UsageError, match="the sampler heun cannot be made with"):
        make_scheduler("heun", VariancePreserving(), V(), use_karras_sigmas=True, use_exponential_sigmas=True)


@pytest.mark.parametrize(
    "path, prediction, fix",
    [
        (VariancePreserving("squaredcos_cap_v2"), Epsilon(), "predict V, X0 or Velocity, or take a plain linear"),
        (VariancePreserving(zero_terminal_snr=True), Score(), "predict V, X0 or Velocity, or take a plain linear"),
        (RectifiedFlow(), Epsilon(), "predict V, X0 or Velocity"),
    ],
)
def test_noise_alone_is_refused_where_the_path_begins_without_any_data(path, prediction, fix):
    with pytest.raises(
        UsageError, match=rf"{type(prediction).__name__} says nothing of the image .* \(alpha = 0\).*{fix}"
    ) as error:
        matching_scheduler(path, prediction)
    one_line(error)


class Elsewhere(ProbabilityPath):
    alpha = sigma = derivatives = time = network_time = lambda *_: None  # pyright: ignore[reportAssignmentType]  never called


def test_a_path_that_no_scheduler_walks_is_refused_with_those_that_are():
    with pytest.raises(UsageError, match=r"follows Elsewhere; .* VariancePreserving, RectifiedFlow, Variance") as error:
        samplers_for(Elsewhere(), V())
    one_line(error)


FROM_DDIM = matching_scheduler(VariancePreserving(), V()).config
ZERO_SNR = VariancePreserving(zero_terminal_snr=True)
FROM_ZERO = matching_scheduler(ZERO_SNR, V()).config
FROM_FLOW = matching_scheduler(RectifiedFlow(), Velocity()).config
FROM_EDM = matching_scheduler(VarianceExploding(), Preconditioned()).config


@pytest.mark.parametrize("kind", [DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler])
def test_a_scheduler_made_from_the_pipeline_s_own_fits(kind):
    check_scheduler(kind.from_config(FROM_DDIM), VariancePreserving(), V())


@pytest.mark.parametrize(
    "scheduler, path, why",
    [
        (DDIMScheduler.from_config(FROM_FLOW), RectifiedFlow(), "the class DDIMScheduler"),
        (DPMSolverMultistepScheduler.from_config(FROM_FLOW), RectifiedFlow(), "use_flow_sigmas=False"),
        (FlowMatchEulerDiscreteScheduler.from_config(FROM_DDIM), VariancePreserving(), "the class FlowMatchEulerDiscrete"),
        (EDMEulerScheduler.from_config(FROM_DDIM), VariancePreserving(), "the class EDMEulerScheduler"),
        (PNDMScheduler.from_config(FROM_DDIM), VariancePreserving(), "the class PNDMScheduler"),
        (DDPMScheduler.from_config(FROM_DDIM), VariancePreserving("linear"), "its schedule of betas"),
        (DDPMScheduler.from_config(FROM_DDIM, num_train_timesteps=500), VariancePreserving(), "num_train_timesteps=500"),
        (DDIMScheduler.from_config(FROM_DDIM, clip_sample=True), VariancePreserving(), "clip_sample=True"),
        (EulerDiscreteScheduler.from_config(FROM_DDIM), VarianceExploding(), "the class EulerDiscreteScheduler"),
        (EDMDPMSolverMultistepScheduler.from_config(FROM_EDM), VarianceExploding(sigma_max=50.0), "sigma_max=80.0"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), RectifiedFlow(), "prediction_type='epsilon'"),
        (DDPMScheduler.from_config(FROM_ZERO, prediction_type="epsilon"), ZERO_SNR, "prediction_type='epsilon'"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), RectifiedFlow(), "stochastic_sampling=True"),
    ],
)
def test_a_scheduler_that_walks_another_path_is_refused_with_those_that_fit(scheduler, path, why):
    with pytest.raises(UsageError) as error:
        check_scheduler(scheduler, path, V())
    message = one_line(error)
    assert why in message and message.endswith(", ".join(samplers_for(path, V())))


@pytest.mark.parametrize("path, prediction, names", MODELS)
def test_what_a_model_was_trained_with_is_kept_in_words(path, prediction, names):
    words = json.loads(json.dumps(diffusion_config(path, prediction)))
    again = diffusion_from(words)
    assert type(again.prediction) is type(prediction) and type(again.path) is type(path)
    assert diffusion_config(*again) == words
    t = torch.rand(5, dtype=torch.float64)
    assert torch.equal(again.path.sigma(t), path.sigma(t))
    assert matching_scheduler(*again).config == matching_scheduler(path, prediction).config


def test_the_words_are_those_of_the_yaml():
    assert diffusion_config(VariancePreserving("linear", True), V()) == {
        "path": {
            "class_path": "ldm.diffusion.path.VariancePreserving",
            "init_args": {"schedule": "linear", "zero_terminal_snr": True},
        },
        "prediction": {"class_path": "ldm.diffusion.prediction.V", "init_args": {}},
    }


@pytest.mark.parametrize(
    "path",
    [
        {"class_path": "os.system", "init_args": {"command": "true"}},
        {"class_path": "ldm.diffusion.path.torch", "init_args": {}},
        {"class_path": "ldm.diffusion.path.Path", "init_args": {}},
        {"class_path": "ldm.diffusion.path.Nowhere", "init_args": {}},
        {"class_path": "ldm.diffusion.prediction.V", "init_args": {}},
        {"class_path": "ldm.diffusion.path.RectifiedFlow", "init_args": {"speed": 1}},
        {"class_path": "ldm.diffusion.path.RectifiedFlow"},
        {"class_path": "ldm.diffusion.path.VariancePreserving", "init_args": {"schedule": "steep"}},
        {"class_path": "ldm.diffusion.path.VarianceExploding", "init_args": {"sigma_max": "much"}},
        {"class_path": "ldm.diffusion.path.ProbabilityPath", "init_args": {}},
        None,
    ],
)
def test_words_that_name_anything_else_are_refused_and_nothing_is_imported(path):
    with pytest.raises(UsageError, match=r"diffusion of model_index.json cannot be read \(") as error:
        diffusion_from({"path": path, "prediction": {"class_path": "ldm.diffusion.prediction.V", "init_args": {}}})
    one_line(error)
