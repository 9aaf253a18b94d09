from typing import cast

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler

from ldm.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import X0, Epsilon, Preconditioned, Score, V, Velocity

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PRESERVING = [VariancePreserving(schedule, zero) for zero in (False, True) for schedule in SCHEDULES]
ZERO_SNR = PRESERVING[3:]
EXPLODING = [VarianceExploding(), VarianceExploding(0.01, 50, 0.5)]
PATHS = [RectifiedFlow(), *PRESERVING, *EXPLODING]
PREDICTIONS = [Epsilon(), Score(), X0(), V(), Velocity(), Preconditioned()]


def named(value):
    if isinstance(value, VariancePreserving):
        return value.scheduler_config["beta_schedule"] + "-zero-snr" * value.zero_terminal_snr
    return type(value).__name__


def data(count):
    return torch.randn(2, count, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def sides(value):
    """(B,) -> (B, 1, 1, 1)."""
    return value[:, None, None, None]


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
@pytest.mark.parametrize("path", PATHS, ids=named)
def test_endpoints_come_back_from_the_target(path, prediction):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    x0, eps = data(50)
    found = prediction.endpoints(path, path.sample(x0, eps, t), prediction.target(path, x0, eps, t), t)
    torch.testing.assert_close(found.x0, x0, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_endpoints_lie_on_the_path_for_any_output_of_the_network(path):
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    x_t, said = data(20)
    for prediction in PREDICTIONS:
        x0, eps = prediction.endpoints(path, x_t, said, t)
        torch.testing.assert_close(path.sample(x0, eps, t), x_t)
        torch.testing.assert_close(prediction.target(path, x0, eps, t), said)


SINGULAR = [(path, X0(), 0.0) for path in (RectifiedFlow(), *PRESERVING)]
SINGULAR += [(path, Score(), 0.0) for path in (RectifiedFlow(), *PRESERVING)]  # infinite there
SINGULAR += [(path, prediction, 1.0) for path in (RectifiedFlow(), *ZERO_SNR) for prediction in (Epsilon(), Score())]


@pytest.mark.parametrize("path, prediction, end", SINGULAR, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_system_is_refused(path, prediction, end, dtype):
    x = torch.zeros(2, 4, 1, 1, dtype=dtype)
    expected = f"^{named(prediction)} does not determine x0 and eps at t = {end:g} on {type(path).__name__}$"
    with pytest.raises(ValueError, match=expected):
        prediction.endpoints(path, x, x, torch.tensor([0.5, end], dtype=dtype))


REGULAR = [(path, prediction) for path in PATHS[:-2] for prediction in (V(), Velocity(), Preconditioned())]
REGULAR += [(path, prediction) for path in EXPLODING for prediction in PREDICTIONS]
REGULAR += [(path, Epsilon()) for path in PRESERVING[:3]]  # they stop short of alpha = 0


@pytest.mark.parametrize("path, prediction", REGULAR, ids=named)
def test_the_others_are_regular_at_both_ends(path, prediction):
    t = torch.tensor([0.0, 1.0] if not isinstance(prediction, Epsilon) else [1.0, 1.0], dtype=torch.float64)
    x0, eps = data(2)
    found = prediction.endpoints(path, path.sample(x0, eps, t), prediction.target(path, x0, eps, t), t)
    torch.testing.assert_close(found.x0, x0, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=1e-8)


def test_targets_by_name():
    t = torch.rand(8, dtype=torch.float64)
    x0, eps = data(8)
    path = PRESERVING[0]
    assert torch.equal(Epsilon().target(path, x0, eps, t), eps)
    assert torch.equal(X0().target(path, x0, eps, t), x0)
    assert torch.equal(Velocity().target(RectifiedFlow(), x0, eps, t), eps - x0)


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_the_score_is_the_gradient_of_the_log_density(path):
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    x0, eps = data(20)
    mean, sigma = sides(path.alpha(t)) * x0, sides(path.sigma(t))
    x_t = path.sample(x0, eps, t).requires_grad_()
    (gradient,) = torch.autograd.grad(torch.distributions.Normal(mean, sigma.expand_as(mean)).log_prob(x_t).sum(), x_t)
    torch.testing.assert_close(Score().target(path, x0, eps, t), gradient)


@pytest.mark.parametrize("path", PRESERVING, ids=named)
def test_v_is_the_velocity_of_diffusers(path):
    scheduler = DDPMScheduler(**path.scheduler_config)
    steps = torch.arange(0, 1000, 9)
    x0, eps = data(len(steps))
    ours = V().target(path, x0, eps, (steps + 1).double() / 1000)
    torch.testing.assert_close(ours, scheduler.get_velocity(x0, eps, cast(torch.IntTensor, steps)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_velocity_is_the_derivative_of_the_path(path):
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64) + 0.00035
    x0, eps = data(20)
    derivative = torch.func.jvp(lambda t: path.sample(x0, eps, t), (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(Velocity().target(path, x0, eps, t), derivative)


@pytest.mark.parametrize("path", PRESERVING, ids=named)
def test_velocity_on_a_rotation_is_v_times_the_angle_s_rate(path):
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    x0, eps = data(41)
    rate = torch.hypot(*path.derivatives(t))
    velocity = Velocity().target(path, x0, eps, t)
    torch.testing.assert_close(velocity, sides(rate) * V().target(path, x0, eps, t))


def test_velocity_of_variance_preserving_is_that_of_ho_s_sde():
    # between steps ln ᾱ falls at the rate beta, so that dx/dt = −½·beta·(x + score) (Song et al. 2021, eq. 13)
    path, t = PRESERVING[0], torch.linspace(0.1, 0.9, 9, dtype=torch.float64) + 0.0005
    betas = DDPMScheduler(**path.scheduler_config).betas.double()[(t * 1000).long()]
    beta = -1000 * (1 - betas).log()
    x0, eps = data(9)
    expected = -sides(beta) / 2 * (path.sample(x0, eps, t) + Score().target(path, x0, eps, t))
    torch.testing.assert_close(Velocity().target(path, x0, eps, t), expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_preconditioned_is_the_f_of_edm(spread):
    path, t = VarianceExploding(sigma_data=spread), torch.linspace(0, 1, 33, dtype=torch.float64)
    scheduler = EDMEulerScheduler(sigma_data=spread)
    (x0, eps), sigma = data(33), sides(path.sigma(t))
    x = x0 + sigma * eps
    # table 1 of the paper
    c_skip = spread**2 / (sigma**2 + spread**2)
    c_out = sigma * spread / (sigma**2 + spread**2) ** 0.5
    c_in = 1 / (sigma**2 + spread**2) ** 0.5
    c_noise = sigma.log() / 4
    target = Preconditioned().target(path, x0, eps, t)
    torch.testing.assert_close(target, (x0 - c_skip * x) / c_out, rtol=0, atol=1e-10)
    torch.testing.assert_close(sides(path.input_scale(t)), c_in)
    torch.testing.assert_close(sides(path.network_time(t)), c_noise)
    said = torch.randn_like(x)
    denoised = Preconditioned().endpoints(path, x, said, t).x0
    torch.testing.assert_close(denoised, c_skip * x + c_out * said, rtol=0, atol=1e-10)
    torch.testing.assert_close(denoised, scheduler.precondition_outputs(x, said, sigma), rtol=0, atol=1e-10)
    torch.testing.assert_close(sides(path.input_scale(t)) * x, scheduler.precondition_inputs(x, sigma))
    torch.testing.assert_close(path.network_time(t), scheduler.precondition_noise(path.sigma(t)))


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_the_preconditioned_target_has_unit_variance_and_is_uncorrelated_with_the_input(path):
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    c, d = Preconditioned().coefficients(path, t)
    variance = path.sigma_data**2
    torch.testing.assert_close(c**2 * variance + d**2, torch.ones_like(t))
    covariance = c * path.alpha(t) * variance + d * path.sigma(t)
    torch.testing.assert_close(covariance, torch.zeros_like(t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PRESERVING, ids=named)
def test_preconditioned_on_a_rotation_is_minus_v(path):
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    for ours, v in zip(Preconditioned().coefficients(path, t), V().coefficients(path, t), strict=True):
        torch.testing.assert_close(ours, -v)
