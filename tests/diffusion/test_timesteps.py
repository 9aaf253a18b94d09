import math
from typing import cast

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ldm.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.timesteps import DiscreteUniform, LogitNormal, LogNormal, Mode, Uniform, shift_time
from ldm.errors import UsageError

MANY = 40_000
SAMPLERS = [Uniform(), LogitNormal(), Mode(), DiscreteUniform(), LogNormal()]
SAMPLERS += [Uniform(3.0), LogitNormal(0.5, 0.7, 2.0), Mode(-0.5, 2.0)]


def sample(sampler, count=MANY, seed=0, size=(1, 1), path=None):
    return sampler(torch.zeros(1).expand(count, 1, *size), path or RectifiedFlow(), torch.Generator().manual_seed(seed))


def is_uniform(values):
    """Kolmogorov–Smirnov at p = 0.001: the values of its own distribution function are uniform."""
    rank = (torch.arange(len(values)) + 0.5) / len(values)
    return (values.double().sort().values - rank).abs().max() < 1.95 / len(values) ** 0.5


@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving(), VarianceExploding()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_times_are_float32_between_data_and_noise_and_follow_the_generator(sampler, path):
    t = sample(sampler, path=path)
    assert t.shape == (MANY,) and t.dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1
    assert torch.equal(t, sample(sampler, path=path)) and not torch.equal(t, sample(sampler, seed=1, path=path))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
def test_uniform_is_uniform_before_its_shift(shift):
    t = sample(Uniform(shift)).double()
    assert is_uniform(t / (shift - (shift - 1) * t))


@pytest.mark.parametrize("location, scale, shift", [(0.0, 1.0, 1.0), (-0.6, 0.5, 1.0), (1.0, 1.5, 1.0), (0.5, 0.7, 2.5)])
def test_the_logit_is_normal(location, scale, shift):
    logit = sample(LogitNormal(location, scale, shift)).double().logit()
    assert is_uniform(torch.special.ndtr((logit - location - math.log(shift)) / scale))


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 0.81, 1.29, 1.75])
def test_mode_has_the_paper_s_distribution(scale):
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    f = 1 - u - scale * ((math.pi * u / 2).cos() ** 2 - 1 + u)
    assert (f.diff() <= 1e-12).all() and f[0] == 1 and f[-1].abs() < 1e-12
    t = sample(Mode(scale)).double()
    # P(T <= t) = P(f(u) <= t) = 1 − f⁻¹(t): f falls
    inverse = 1 - torch.searchsorted(-f, -t).double() / 200_000
    assert is_uniform(inverse)
    middle = ((t > 0.45) & (t < 0.55)).double().mean()
    assert (middle > 0.1) == (scale > 0) or scale == 0


def test_discrete_times_are_uniform_over_diffusers_steps():
    path, scheduler = VariancePreserving(), DDPMScheduler(**VariancePreserving().scheduler_config)
    t = sample(DiscreteUniform(), 200_000, path=path)
    steps = path.network_time(t)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    counts = steps.round().long().bincount(minlength=1000)
    assert len(counts) == 1000
    chi_squared = ((counts - 200) ** 2 / 200).sum()
    assert abs(chi_squared - 999) < 4 * (2 * 999) ** 0.5
    few, steps = t[:64], steps[:64].round().long()
    x0, eps = torch.randn(2, 64, 4)
    torch.testing.assert_close(
        path.sample(x0, eps, few), scheduler.add_noise(x0, eps, cast(torch.IntTensor, steps)), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize(
    "path", [VarianceExploding(0.001, 200), VariancePreserving("squaredcos_cap_v2", True), RectifiedFlow()]
)
def test_the_logarithm_of_the_noise_is_normal_on_every_path(path):
    t = sample(LogNormal(-0.5, 1.0), path=path).double()
    level = (path.sigma(t) / path.alpha(t)).log()
    assert is_uniform(torch.special.ndtr(level + 0.5))


def test_noise_levels_beyond_the_path_are_clamped_to_its_ends():
    path = VarianceExploding(0.1, 1.0)
    t = sample(LogNormal(-1.2, 1.2), path=path)
    for share, beyond in (((t == 0), (math.log(0.1) + 1.2) / 1.2), ((t == 1), 1.2 / 1.2 * -1)):
        expected = torch.special.ndtr(torch.tensor(beyond)).item()
        assert abs(share.double().mean() - expected) < 4 * (expected / MANY) ** 0.5


def test_on_rectified_flow_log_normal_noise_is_logit_normal_time():
    torch.manual_seed(0)
    torch.testing.assert_close(sample(LogNormal(0.3, 0.8)), sample(LogitNormal(0.3, 0.8)))


def test_a_shift_adds_its_logarithm_to_the_logit():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for shift in (0.3, 1.0, 3.0):
        torch.testing.assert_close(shift_time(t, shift).logit(), t.logit() + torch.tensor(shift).double().log())
    assert torch.equal(shift_time(t, 1.0), t)
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 1 / 3), t)
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(shift_time(ends, 5.0), ends)


def test_the_shift_is_that_of_the_flow_scheduler():
    plain, shifted = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(shift_time(cast(torch.Tensor, plain.sigmas), 3.0), shifted.sigmas)


@pytest.mark.parametrize("kind", [Uniform, LogitNormal, Mode])
def test_samplers_apply_their_shift(kind):
    torch.testing.assert_close(sample(kind(shift=2.5)), shift_time(sample(kind()), 2.5))


@pytest.mark.parametrize("kind", [Uniform, LogitNormal, Mode])
def test_larger_latents_are_shifted_by_the_root_of_their_tokens(kind):
    sampler = kind(base_side=32)
    for size, shift in (((32, 32), 1.0), ((64, 64), 2.0), ((32, 64), 2**0.5), ((16, 16), 0.5)):
        torch.testing.assert_close(sample(sampler, 100, size=size), shift_time(sample(kind(), 100), shift))
    twice = sample(kind(shift=3.0, base_side=32), 100, size=(64, 64))
    torch.testing.assert_close(twice, shift_time(sample(kind(), 100), 6.0))
    torch.testing.assert_close(sample(kind(), 100, size=(64, 64)), sample(kind(), 100, size=(32, 32)))


def test_the_shift_by_resolution_keeps_the_uncertainty_of_a_flat_image():
    # the mean of n pixels of x_t, over its signal: standard deviation (t / (1 − t)) / √n, whatever n (section 5.3.2)
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    small, large = 32 * 32, 96 * 48
    shifted = shift_time(t, (large / small) ** 0.5)
    torch.testing.assert_close(t / (1 - t) / small**0.5, shifted / (1 - shifted) / large**0.5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Uniform(shift=0), "Uniform: shift is 0; give a number greater than 0"),
        (lambda: Uniform(base_side=-4), "Uniform: base_side is -4; give a number greater than 0"),
        (lambda: LogitNormal(scale=-1), "LogitNormal: scale is -1; give a number greater than 0"),
        (lambda: LogNormal(scale=0), "LogNormal: scale is 0; give a number greater than 0"),
        (lambda: Mode(scale=2), "Mode: scale is 2; give a number from -1 to 1.75"),
    ],
)
def test_impossible_densities_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
