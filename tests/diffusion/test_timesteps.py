import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ldm.diffusion.timesteps import LogitNormal, Uniform, shift_time

MANY = 40_000


def draw(sampler, count=MANY, seed=0):
    return sampler(count, "cpu", torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sampler", [Uniform(), Uniform(3.0), LogitNormal(), LogitNormal(0.5, 0.7, 2.0)])
def test_times_are_float32_between_data_and_noise_and_follow_the_generator(sampler):
    t = draw(sampler)
    assert t.shape == (MANY,) and t.dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1
    assert torch.equal(t, draw(sampler)) and not torch.equal(t, draw(sampler, seed=1))


def test_uniform_is_uniform():
    t = draw(Uniform()).double().sort().values
    rank = (torch.arange(MANY) + 0.5) / MANY
    assert (t - rank).abs().max() < 1.95 / MANY**0.5  # Kolmogorov–Smirnov, p = 0.001


@pytest.mark.parametrize("location, scale", [(0.0, 1.0), (-0.6, 0.5), (1.0, 1.5)])
def test_the_logit_is_normal(location, scale):
    logit = draw(LogitNormal(location, scale)).double().logit()
    error = scale / MANY**0.5
    assert abs(logit.mean().item() - location) < 4 * error
    assert abs(logit.std().item() - scale) < 4 * error
    skewness = (((logit - logit.mean()) / logit.std()) ** 3).mean().item()
    assert abs(skewness) < 4 * (6 / MANY) ** 0.5


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
    torch.testing.assert_close(shift_time(plain.sigmas, 3.0), shifted.sigmas)


@pytest.mark.parametrize("kind", [Uniform, LogitNormal])
def test_samplers_shift_what_they_drew(kind):
    torch.testing.assert_close(draw(kind(shift=2.5)), shift_time(draw(kind()), 2.5))
