import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ldm.diffusion.path import NUM_TRAIN_TIMESTEPS, RectifiedFlow, VariancePreserving, expand

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PATHS = [RectifiedFlow(), *(VariancePreserving(schedule) for schedule in SCHEDULES)]
IDS = ["rectified", *SCHEDULES]
# off the grid of diffusers' steps, where the interpolation has corners
TIMES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64) + 0.00035


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_derivatives_are_those_of_autograd_and_of_finite_differences(path):
    t = TIMES.clone().requires_grad_()
    small = 1e-7
    for function, derivative in zip((path.alpha, path.sigma), path.derivatives(TIMES), strict=True):
        (by_autograd,) = torch.autograd.grad(function(t).sum(), t)
        torch.testing.assert_close(derivative, by_autograd)
        by_difference = (function(TIMES + small) - function(TIMES - small)) / (2 * small)
        torch.testing.assert_close(derivative, by_difference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_the_path_leads_from_data_to_noise(path):
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    assert alpha[0] == 1 and sigma[0] == 0
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    assert sigma[-1] > 0.99 and alpha[-1] < 0.1


@pytest.mark.parametrize("path", PATHS[1:], ids=SCHEDULES)
def test_variance_is_preserved(path):
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "schedule, betas",
    [("linear", {}), ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}), ("squaredcos_cap_v2", {})],
)
def test_variance_preserving_is_what_ddpm_adds_at_each_of_its_steps(schedule, betas):
    scheduler, path = DDPMScheduler(beta_schedule=schedule, **betas), VariancePreserving(schedule)
    steps = torch.arange(NUM_TRAIN_TIMESTEPS)
    t = (steps + 1).double() / NUM_TRAIN_TIMESTEPS
    x0, eps = torch.randn(2, NUM_TRAIN_TIMESTEPS, 3, dtype=torch.float64)
    torch.testing.assert_close(path.sample(x0, eps, t), scheduler.add_noise(x0, eps, steps), rtol=0, atol=1e-4)
    torch.testing.assert_close(path.network_time(t), steps.double())
    assert DDPMScheduler(**path.scheduler_config).config.beta_schedule == schedule


def test_rectified_flow_is_what_flow_matching_scales_at_each_of_its_steps():
    scheduler, path = FlowMatchEulerDiscreteScheduler(), RectifiedFlow()
    timesteps = scheduler.timesteps
    t = scheduler.sigmas[: len(timesteps)]
    torch.testing.assert_close(path.network_time(t), timesteps)
    x0, eps = torch.randn(2, len(timesteps), 4, 2, 2)
    torch.testing.assert_close(path.sample(x0, eps, t), scheduler.scale_noise(x0, timesteps, eps))


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape_are_those_of_t(path, dtype):
    t = torch.rand(5, dtype=dtype) * 0.9 + 0.05
    values = (path.alpha(t), path.sigma(t), *path.derivatives(t), path.network_time(t))
    assert {(value.dtype, value.shape) for value in values} == {(dtype, t.shape)}


def test_expand_lets_one_time_rule_its_whole_sample():
    t = torch.tensor([0.0, 1.0])
    x0, eps = torch.ones(2, 3, 2, 2), torch.full((2, 3, 2, 2), 7.0)
    assert expand(t, x0).shape == (2, 1, 1, 1)
    assert torch.equal(RectifiedFlow().sample(x0, eps, t), torch.stack([x0[0], eps[1]]))
