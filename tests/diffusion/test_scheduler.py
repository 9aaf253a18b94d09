"""A denoiser that knows the answer, sampled by the scheduler that goes into the saved pipeline."""

import pytest
import torch

from ldm.diffusion.path import RectifiedFlow, VariancePreserving, expand
from ldm.diffusion.prediction import Epsilon, Sample, V, Velocity
from ldm.diffusion.scheduler import matching_scheduler
from ldm.errors import UsageError

SERVED = [(RectifiedFlow(), Velocity())]
SERVED += [
    (VariancePreserving(schedule), prediction)
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")
    for prediction in (Epsilon(), Sample(), V())
    # eps says nothing of the data where alpha = 0, which is where this schedule begins
    if not (schedule == "squaredcos_cap_v2" and isinstance(prediction, Epsilon))
]


def time_of(path, timestep):
    """The t that a scheduler's timestep stands for: the inverse of ``network_time``."""
    zero, one = path.network_time(torch.tensor([0.0, 1.0], dtype=torch.float64))
    return ((timestep.double() - zero) / (one - zero)).reshape(1)


def sample(path, prediction, x0_given, noise, steps):
    """Sample from pure noise; ``x0_given(x_t, alpha, sigma)`` is the denoiser's belief about the data."""
    scheduler = matching_scheduler(path, prediction)
    scheduler.set_timesteps(steps)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        t = time_of(path, timestep)
        alpha, sigma = expand(path.alpha(t), x), expand(path.sigma(t), x)
        x0 = x0_given(x, alpha, sigma)
        said = prediction.target(path, x0, (x - alpha * x0) / sigma, t)
        x = scheduler.step(said, timestep, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [1, 2, 10, 40])
@pytest.mark.parametrize("path, prediction", SERVED)
def test_who_knows_the_data_draws_it_from_pure_noise(path, prediction, steps):
    x0, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = sample(path, prediction, lambda *_: x0, noise, steps)
    torch.testing.assert_close(drawn, x0, rtol=0, atol=2e-3)


@pytest.mark.parametrize("path, prediction", SERVED)
def test_gaussian_data_come_back_with_their_mean_and_deviation(path, prediction):
    mean, deviation = 0.5, 0.8

    def expectation(x_t, alpha, sigma):
        """E[x0 | x_t] of x0 ~ N(mean, deviation²)."""
        return mean + alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * (x_t - alpha * mean)

    noise = torch.randn(40_000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = sample(path, prediction, expectation, noise, 100)
    assert abs(drawn.mean().item() - mean) < 0.04
    assert abs(drawn.std().item() - deviation) < 0.04


@pytest.mark.parametrize("path", [VariancePreserving(), RectifiedFlow()])
@pytest.mark.parametrize("steps", [1, 7, 30, 50])
def test_sampling_starts_at_the_noisiest_time_and_ends_at_data(path, steps):
    prediction = Velocity() if isinstance(path, RectifiedFlow) else V()
    scheduler = matching_scheduler(path, prediction)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    assert time_of(path, scheduler.timesteps[0]).item() == pytest.approx(1)


@pytest.mark.parametrize(
    "path, prediction",
    [
        (RectifiedFlow(), Epsilon()),
        (RectifiedFlow(), Sample()),
        (RectifiedFlow(), V()),
        (VariancePreserving(), Velocity()),
    ],
)
def test_a_pairing_that_no_scheduler_serves_is_refused_with_those_that_are(path, prediction):
    with pytest.raises(UsageError) as error:
        matching_scheduler(path, prediction)
    message = str(error.value)
    assert f"{type(prediction).__name__} on {type(path).__name__}" in message and "\n" not in message
    assert "Velocity with RectifiedFlow" in message and "Epsilon, Sample or V with VariancePreserving" in message


def test_epsilon_is_refused_where_the_schedule_begins_without_any_data():
    with pytest.raises(UsageError, match=r"squaredcos_cap_v2.*V or Sample"):
        matching_scheduler(VariancePreserving("squaredcos_cap_v2"), Epsilon())
