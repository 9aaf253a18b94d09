import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ldm.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import X0, Epsilon, Preconditioned, Score, V, Velocity
from ldm.diffusion.weighting import EDM, MinSNR, VelocityError
from ldm.errors import UsageError

PATHS = [
    RectifiedFlow(),
    VariancePreserving("linear"),
    VariancePreserving("squaredcos_cap_v2", True),
    VarianceExploding(0.01, 50, 0.5),
]
PREDICTIONS = [Epsilon(), Score(), X0(), V(), Velocity(), Preconditioned()]
TIMES = torch.linspace(0.02, 0.98, 31, dtype=torch.float64)
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)


def name(value):
    return type(value).__name__


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_has_the_published_forms(schedule, gamma):
    path, weighting = VariancePreserving(schedule), MinSNR(gamma)
    steps = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(**path.scheduler_config), steps)
    clipped, t = snr.clamp(max=gamma), (steps + 1) / 1000
    # the last steps of the cosine have ᾱ of 1e-9 in float32
    torch.testing.assert_close(weighting(path, X0(), t), clipped, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(weighting(path, Epsilon(), t), clipped / snr, rtol=1e-3, atol=0)
    torch.testing.assert_close(weighting(path, V(), t), clipped / (snr + 1), rtol=1e-3, atol=1e-9)


def test_min_snr_on_the_flow_velocity_and_on_edm():
    t = TIMES
    expected = torch.minimum((1 - t) ** 2, 5 * t**2)
    torch.testing.assert_close(MinSNR()(RectifiedFlow(), Velocity(), t), expected)
    path = VarianceExploding(sigma_data=0.5)
    sigma = path.sigma(t)
    c_out_squared = (sigma * 0.5) ** 2 / (sigma**2 + 0.25)
    expected = torch.minimum(sigma**-2, torch.tensor(5.0)) * c_out_squared
    torch.testing.assert_close(MinSNR()(path, Preconditioned(), t), expected)


@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_the_weight_of_edm_is_one_for_its_prediction(spread):
    path = VarianceExploding(sigma_data=spread)
    t = torch.linspace(0, 1, 31, dtype=torch.float64)
    torch.testing.assert_close(EDM()(path, Preconditioned(), t), torch.ones_like(t))
    sigma = path.sigma(t)
    published = (sigma**2 + spread**2) / (sigma * spread) ** 2
    torch.testing.assert_close(EDM()(path, X0(), t), published)


@pytest.mark.parametrize("weighting", [MinSNR(), EDM(), VelocityError()], ids=name)
@pytest.mark.parametrize("path", PATHS, ids=name)
def test_the_weighted_error_is_that_of_the_data_for_any_prediction(path, weighting):
    x0, eps, guess = torch.randn(3, len(TIMES), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = path.sample(x0, eps, TIMES)
    guessed_eps = (x_t - path.alpha(TIMES)[:, None] * guess) / path.sigma(TIMES)[:, None]
    of_the_data = weighting(path, X0(), TIMES) * (guess - x0).square().mean(1)
    for prediction in PREDICTIONS:
        error = prediction.target(path, guess, guessed_eps, TIMES) - prediction.target(path, x0, eps, TIMES)
        torch.testing.assert_close(weighting(path, prediction, TIMES) * error.square().mean(1), of_the_data)


@pytest.mark.parametrize("weighting", [MinSNR(), EDM(), VelocityError()], ids=name)
@pytest.mark.parametrize("path", PATHS, ids=name)
def test_weights_are_finite_at_both_ends_where_the_system_is_regular(path, weighting):
    for prediction in (V(), Velocity(), Preconditioned()):
        assert weighting(path, prediction, ENDS).isfinite().all()
    assert weighting(path, Epsilon(), ENDS[:1]).isfinite().all() and weighting(path, X0(), ENDS[1:]).isfinite().all()


def test_the_velocity_has_weight_one_and_the_data_that_of_jit():
    path, weighting = RectifiedFlow(), VelocityError()
    torch.testing.assert_close(weighting(path, X0(), TIMES), TIMES.clamp(min=0.05) ** -2)
    for path in PATHS[:3]:
        later = TIMES[path.sigma(TIMES) > 0.05]
        torch.testing.assert_close(weighting(path, Velocity(), later), torch.ones_like(later))


def test_an_impossible_gamma_is_refused():
    with pytest.raises(UsageError, match="MinSNR: gamma is 0; give a number greater than 0"):
        MinSNR(0)
