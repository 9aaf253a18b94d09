import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, ScoreSdeVeScheduler

from ldm.diffusion.path import (
    NUM_TRAIN_TIMESTEPS,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    _angles,
    as_float64,
    expand,
)
from ldm.errors import UsageError

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PRESERVING = [VariancePreserving(schedule, zero) for zero in (False, True) for schedule in SCHEDULES]
PATHS = [RectifiedFlow(), *PRESERVING, VarianceExploding(), VarianceExploding(0.01, 50, 0.5)]
PRESERVING_IDS = [*SCHEDULES, *(f"{schedule}-zero-snr" for schedule in SCHEDULES)]
IDS = ["rectified", *PRESERVING_IDS, "exploding", "exploding-0.5"]
# off the grid of diffusers' steps, where the interpolation is not differentiable
TIMES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64) + 0.00035
ALL_TIMES = torch.linspace(0, 1, 501, dtype=torch.float64)
STEPS = torch.arange(NUM_TRAIN_TIMESTEPS)
STEP_TIMES = (STEPS + 1).double() / NUM_TRAIN_TIMESTEPS


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_derivatives_are_those_of_autograd_and_of_finite_differences(path):
    t = TIMES.clone().requires_grad_()
    small = 1e-7
    for function, derivative in zip((path.alpha, path.sigma), path.derivatives(TIMES), strict=True):
        by_autograd = torch.autograd.grad(function(t).sum() + 0 * t.sum(), t)[0]
        torch.testing.assert_close(derivative, by_autograd)
        by_difference = (function(TIMES + small) - function(TIMES - small)) / (2 * small)
        torch.testing.assert_close(derivative, by_difference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_the_path_leads_from_data_to_noise(path):
    alpha, sigma = path.alpha(ALL_TIMES), path.sigma(ALL_TIMES)
    assert alpha[0] == 1 and sigma[0] < 0.011
    assert (alpha.diff() <= 0).all() and (sigma.diff() > 0).all()
    assert torch.atan2(sigma, alpha).diff().min() > 0  # the signal-to-noise ratio falls all the way
    assert sigma[-1] / alpha[-1] > 10
    assert all(derivative.isfinite().all() for derivative in path.derivatives(ALL_TIMES))


@pytest.mark.parametrize("path", [PATHS[0], *PRESERVING], ids=IDS[:7])
def test_the_path_starts_at_the_data_itself(path):
    assert path.alpha(torch.zeros(1)) == 1 and path.sigma(torch.zeros(1)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", [PATHS[0], *PRESERVING[3:]], ids=["rectified", *PRESERVING_IDS[3:]])
def test_the_path_ends_at_pure_noise(path, dtype):
    assert path.alpha(torch.ones(1, dtype=dtype)) == 0 and path.sigma(torch.ones(1, dtype=dtype)) == 1


@pytest.mark.parametrize("path", PRESERVING, ids=PRESERVING_IDS)
def test_variance_is_preserved(path):
    variance = path.alpha(ALL_TIMES) ** 2 + path.sigma(ALL_TIMES) ** 2
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-12)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(
    "schedule, betas",
    [("linear", {}), ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}), ("squaredcos_cap_v2", {})],
)
def test_variance_preserving_is_ddpm_at_each_of_its_steps(schedule, betas, zero_terminal_snr):
    scheduler = DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero_terminal_snr, **betas)
    path = VariancePreserving(schedule, zero_terminal_snr)
    x0, eps = torch.randn(2, NUM_TRAIN_TIMESTEPS, 3, dtype=torch.float64)
    expected = scheduler.add_noise(x0, eps, cast(torch.IntTensor, STEPS))
    torch.testing.assert_close(path.sample(x0, eps, STEP_TIMES), expected, rtol=0, atol=1e-9)
    in_single = path.sample(x0.float(), eps.float(), STEP_TIMES.float())
    torch.testing.assert_close(in_single, expected.float(), rtol=0, atol=2e-6)
    torch.testing.assert_close(path.network_time(STEP_TIMES), STEPS.double())
    rebuilt = DDPMScheduler(**path.scheduler_config)
    assert rebuilt.config["beta_schedule"] == schedule
    torch.testing.assert_close(rebuilt.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_moves_alpha_affinely_and_keeps_the_first_step(schedule):
    plain, zero = (VariancePreserving(schedule, choice).alpha(STEP_TIMES) for choice in (False, True))
    affine = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])  # Lin et al. 2023, algorithm 1
    torch.testing.assert_close(zero, affine, rtol=0, atol=2e-5)  # diffusers' table is a product of 1000 float32
    torch.testing.assert_close(zero[0], plain[0], rtol=0, atol=1e-6)


def test_rectified_flow_is_the_flow_matching_scheduler_at_each_of_its_steps():
    scheduler, path = FlowMatchEulerDiscreteScheduler(), RectifiedFlow()
    timesteps = cast(torch.FloatTensor, scheduler.timesteps)
    t = cast(torch.Tensor, scheduler.sigmas)[: len(timesteps)]
    torch.testing.assert_close(path.network_time(t), timesteps)
    x0, eps = torch.randn(2, len(timesteps), 4, 2, 2)
    scaled = scheduler.scale_noise(cast(torch.FloatTensor, x0), timesteps, cast(torch.FloatTensor, eps))
    torch.testing.assert_close(path.sample(x0, eps, t), scaled)


def test_variance_exploding_adds_scales_and_times_noise_as_edm():
    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=50, sigma_data=0.5, sigma_schedule="exponential")
    path = VarianceExploding(0.01, 50, 0.5)
    scheduler.set_timesteps(40)
    t, sigma = torch.linspace(1, 0, 40, dtype=torch.float64), scheduler.sigmas[:-1].double()
    torch.testing.assert_close(path.sigma(t), sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(path.network_time(t), scheduler.timesteps.double(), rtol=1e-5, atol=1e-6)
    x0, eps = torch.randn(2, 40, 4, dtype=torch.float64)
    noisy = scheduler.add_noise(x0, eps, scheduler.timesteps)
    torch.testing.assert_close(path.sample(x0, eps, t), noisy.double(), rtol=1e-5, atol=1e-5)
    for i, timestep in enumerate(scheduler.timesteps):
        scheduler._step_index = i
        expected = scheduler.scale_model_input(noisy[i], timestep).double()
        torch.testing.assert_close(path.input_scale(t)[i] * noisy[i], expected, rtol=1e-5, atol=1e-6)


def test_the_noise_of_variance_exploding_is_song_s_geometric_sequence():
    scheduler = ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50)
    scheduler.set_sigmas(100)
    t = torch.linspace(0, 1, 100)
    torch.testing.assert_close(VarianceExploding(0.01, 50).sigma(t), scheduler.discrete_sigmas, rtol=1e-4, atol=0)


def test_the_input_of_the_network_has_unit_variance():
    for path, spread in ((VarianceExploding(), 1.0), (VarianceExploding(sigma_data=0.5), 0.5), (PRESERVING[0], 1.0)):
        variance = (path.alpha(TIMES) * spread) ** 2 + path.sigma(TIMES) ** 2
        torch.testing.assert_close(path.input_scale(TIMES) ** 2 * variance, torch.ones_like(TIMES))
    assert torch.equal(RectifiedFlow().input_scale(TIMES), torch.ones_like(TIMES))


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_time_is_the_inverse_of_the_noise_to_signal_ratio(path):
    t = torch.cat([TIMES, ALL_TIMES])
    ratio = (path.sigma(t) / path.alpha(t)).log()
    torch.testing.assert_close(path.time(ratio), t, rtol=0, atol=1e-9)
    beyond = path.time(torch.tensor([-math.inf, -1e3, 1e3, math.inf]))
    torch.testing.assert_close(beyond, torch.tensor([0.0, 0, 1, 1]), rtol=0, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape_are_those_of_t(path, dtype):
    t = torch.rand(5, dtype=dtype) * 0.9 + 0.05
    values = (path.alpha(t), path.sigma(t), *path.derivatives(t), path.network_time(t), path.input_scale(t), path.time(t))
    assert {(value.dtype, value.shape) for value in values} == {(dtype, t.shape)}


def test_expand_broadcasts_one_time_over_its_sample():
    t = torch.tensor([0.0, 1.0])
    x0, eps = torch.ones(2, 3, 2, 2), torch.full((2, 3, 2, 2), 7.0)
    assert expand(t, x0).shape == (2, 1, 1, 1)
    assert torch.equal(RectifiedFlow().sample(x0, eps, t), torch.stack([x0[0], eps[1]]))


def test_impossible_noise_levels_are_refused():
    with pytest.raises(UsageError, match="VarianceExploding: sigma_min is 0; give a number greater than 0"):
        VarianceExploding(sigma_min=0)
    with pytest.raises(UsageError, match="sigma_min 90 is not below sigma_max 80"):
        VarianceExploding(sigma_min=90)
    with pytest.raises(UsageError, match="sigma_data is nan"):
        VarianceExploding(sigma_data=math.nan)


def test_the_angles_reach_a_device_once_and_no_path_keeps_them():
    """A copy at every call makes the host wait; a path with tensors could not be sent to the loader's workers."""
    path, t = VariancePreserving(), torch.empty(3, device="meta")
    before = _angles.cache_info().misses
    for _ in range(3):
        assert path.alpha(t).device.type == path.time(t).device.type == "meta"
    assert _angles.cache_info().misses - before <= 1
    assert not any(isinstance(value, torch.Tensor) for value in vars(path).values())


def test_float64_stays_on_the_cpu_where_a_device_has_none():
    values: Any = SimpleNamespace(device=torch.device("mps"), cpu=lambda: torch.ones(2))
    assert torch.equal(as_float64(values), torch.ones(2, dtype=torch.float64))
