"""Samplers of diffusers on data whose denoiser is known exactly: every one must reach the data's own distribution."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from ldm.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import X0, Epsilon, Preconditioned, Score, V, Velocity
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.scheduler import make_scheduler, samplers_for
from ldm.diffusion.timesteps import shift_time
from ldm.errors import LdmError, UsageError

PATHS = {
    "scaled_linear": VariancePreserving(),
    "cosine": VariancePreserving("squaredcos_cap_v2"),
    "zero_snr": VariancePreserving("linear", zero_terminal_snr=True),
    "flow": RectifiedFlow(),
    "exploding": VarianceExploding(),
}
OWN = {"flow": Velocity(), "exploding": Preconditioned()}  # and V of the others
CASES = [(path, name) for path in PATHS for name in samplers_for(PATHS[path], OWN.get(path, V()))]
SECOND_ORDER = {"heun", "dpm++2m", "dpm++2m-sde", "unipc"}


class Mixture:
    """Normal distributions in the plane, whose E[x0 | x_t] is known on every path."""

    def __init__(self, weights, means, deviations, correlation=0.0):
        self.weights, self.means = (torch.tensor(value, dtype=torch.float64) for value in (weights, means))
        a, b = deviations
        one = torch.tensor([[a * a, correlation * a * b], [correlation * a * b, b * b]], dtype=torch.float64)
        self.within = one  # (2, 2), of every mode
        self.mean = self.weights @ self.means
        apart = self.means - self.mean
        self.covariance = one + torch.einsum("k,ki,kj->ij", self.weights, apart, apart)

    def denoise(self, x, alpha, sigma):
        """E[x0 | x_t] of x (N, 2)."""
        precision = torch.linalg.inv(alpha**2 * self.within + sigma**2 * torch.eye(2, dtype=torch.float64))
        away = x.double()[:, None] - alpha * self.means  # (N, K, 2)
        pulled = away @ precision
        modes = (self.weights.log() - (away * pulled).sum(-1) / 2).softmax(-1)
        return (modes[..., None] * (self.means + alpha * pulled @ self.within)).sum(1)


# both of mean 0 and variance about 1, as latents are normalised: their paths end in noise of mean 0 and variance 1
GAUSSIAN = Mixture([1.0], [[0.1, -0.1]], (1.2, 0.7), 0.6)
TWO_MODES = Mixture([0.3, 0.7], [[-1.4, 0.7], [0.6, -0.3]], (0.4, 0.8))


def time_of(path, network_time):
    """The t that a network's time stands for: the inverse of ``network_time``."""
    zero, one = path.network_time(torch.tensor([0.0, 1.0], dtype=torch.float64))
    return (network_time.double() - zero) / (one - zero)


def network(path, prediction, denoise):
    """What a network says that knows E[x0 | x_t] = ``denoise(x_t, alpha, sigma)``."""

    def says(scaled, network_time, t):  # t is one for all rows
        assert torch.allclose(time_of(path, network_time), t.double(), rtol=0, atol=1e-6)
        t = time_of(path, network_time[:1])
        alpha, sigma = path.alpha(t), path.sigma(t)
        x = scaled.double().flatten(1) / path.input_scale(t)
        x0 = denoise(x, alpha, sigma)
        return prediction.target(path, x0, (x - alpha * x0) / sigma, t).view_as(scaled)

    return says


def noise(count, seed=0):
    return torch.randn(count, 1, 1, 2, generator=torch.Generator().manual_seed(seed))


def draw(path, name, steps, denoise, start, prediction=None, generator: Any = 1, **options: Any):
    """Samples (N, 2) of the sampler ``name``; and the sampler."""
    prediction = prediction or OWN.get(path, V())
    sampler = Sampler(make_scheduler(name, PATHS[path], prediction, **options), PATHS[path], prediction, steps)
    generator = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
    return sampler(network(PATHS[path], prediction, denoise), start, generator).flatten(1).double(), sampler


def right_half(target):
    """The part of the plane on the side of the second mode, and its weight: that of the modes as far as they are apart."""
    axis = target.means[1] - target.means[0]
    middle = target.means.mean(0)
    far = (target.means - middle) @ axis / (axis @ target.within @ axis).sqrt()
    return lambda x: (x - middle) @ axis > 0, (target.weights @ torch.special.ndtr(far)).item()


COUNT = 2000
# what a finite number of steps costs: 100 of Euler's, 40 of second order
BIAS = 0.07


@pytest.mark.parametrize(
    "path, name, options",
    [(path, name, {}) for path, name in CASES]
    + [("scaled_linear", "ddim", {"eta": eta}) for eta in (0.5, 1.0)]
    + [("scaled_linear", "ddim", {"timestep_spacing": spacing, "eta": 0.3}) for spacing in ("linspace", "leading")],
)
def test_mean_covariance_and_weights_of_the_modes_are_the_data_s(path, name, options):
    """Each within 4 standard errors of ``COUNT`` samples and ``BIAS``; a Gaussian and two modes, drawn in one batch."""

    def denoise(x, *levels):
        first, second = x.chunk(2)
        return torch.cat([GAUSSIAN.denoise(first, *levels), TWO_MODES.denoise(second, *levels)])

    both, _ = draw(path, name, 40 if name in SECOND_ORDER else 100, denoise, noise(2 * COUNT), **options)
    for x, target in zip(both.chunk(2), (GAUSSIAN, TWO_MODES), strict=True):
        variance = target.covariance.diagonal()
        assert ((x.mean(0) - target.mean).abs() < 4 * (variance / COUNT).sqrt() + BIAS / 3).all()
        error = ((variance[:, None] * variance + target.covariance**2) / COUNT).sqrt()
        assert ((x.T.cov() - target.covariance).abs() < 4 * error + BIAS).all()
    inside, weight = right_half(TWO_MODES)
    found = inside(both[COUNT:]).double().mean().item()
    assert abs(found - weight) < 4 * math.sqrt(weight * (1 - weight) / COUNT) + BIAS / 3


@pytest.mark.parametrize("path, name", CASES)
def test_what_the_network_predicts_makes_no_difference(path, name):
    own = OWN.get(path, V())
    start = noise(20)
    expected, _ = draw(path, name, 6, TWO_MODES.denoise, start, own)
    for prediction in (Epsilon(), Score(), X0(), V(), Velocity(), Preconditioned()):
        blind = path not in ("scaled_linear", "exploding") and isinstance(prediction, (Epsilon, Score))
        if not blind:
            found, _ = draw(path, name, 6, TWO_MODES.denoise, start, prediction)
            # the velocity of a discrete schedule jumps where its steps stand
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 if isinstance(prediction, Velocity) else 3e-3)


@pytest.mark.parametrize("steps", [1, 7, 61])
@pytest.mark.parametrize("path, name", CASES)
def test_who_knows_the_data_draws_it_from_pure_noise(path, name, steps):
    x0 = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    drawn, sampler = draw(path, name, steps, lambda *_: x0, noise(3))
    # schedulers that count in sigma / alpha begin at 20,000 with the cosine: float32 has seven digits
    torch.testing.assert_close(drawn, x0, rtol=0, atol=5e-3 if path == "cosine" else 1e-3)
    assert sampler.t[0] > 0.996 and (sampler.t.diff() <= 0).all()


@pytest.mark.parametrize(
    "steps, spacing", [(7, "linspace"), (28, "leading"), (28, "trailing"), (61, "trailing"), (1000, "trailing")]
)
def test_ddim_with_eta_1_is_ddpm_step_for_step(steps, spacing):
    results = []
    for name, options in (("ddim", {"eta": 1.0}), ("ddpm", {})):
        options |= {"timestep_spacing": spacing}
        results.append(draw("scaled_linear", name, steps, TWO_MODES.denoise, noise(20), **options)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-3)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_ddim_with_eta_0_is_euler_on_the_same_timesteps(spacing):
    found, sampler = draw("scaled_linear", "euler", 28, TWO_MODES.denoise, noise(20), timestep_spacing=spacing)
    # its x_t / alpha begins at sigma / alpha times the noise
    start = noise(20) * (1 if spacing == "leading" else PATHS["scaled_linear"].sigma(sampler.t[0]))
    expected, _ = draw("scaled_linear", "ddim", 28, TWO_MODES.denoise, start, timestep_spacing=spacing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_ddim_is_diffusers_own_where_that_steps_from_one_timestep_to_the_next():
    path, prediction = PATHS["scaled_linear"], V()
    ours, _ = draw("scaled_linear", "ddim", 50, TWO_MODES.denoise, noise(20), eta=0.7)
    scheduler = make_scheduler("ddim", path, prediction)
    assert type(scheduler) is DDIMScheduler
    scheduler.set_timesteps(50)
    x, generator, says = noise(20), torch.Generator().manual_seed(1), network(path, prediction, TWO_MODES.denoise)
    for timestep in scheduler.timesteps:
        said = says(x, timestep.expand(20), (timestep.expand(20) + 1) / 1000).float()
        x = scheduler.step(said, int(timestep), x, eta=0.7, generator=generator, return_dict=False)[0]
    torch.testing.assert_close(ours, x.flatten(1).double(), rtol=0, atol=1e-4)


def flow_of(path, x, start, end):
    """Where the probability flow of the Gaussian leads x (N, 2) from one time to another, in closed form."""
    (alpha, sigma), (alpha_end, sigma_end) = ((path.alpha(t), path.sigma(t)) for t in (start, end))
    variance, axes = torch.linalg.eigh(GAUSSIAN.within)
    ratio = ((alpha_end**2 * variance + sigma_end**2) / (alpha**2 * variance + sigma**2)).sqrt()
    return alpha_end * GAUSSIAN.mean + (x - alpha * GAUSSIAN.mean) @ axes * ratio @ axes.T


KARRAS = {"use_karras_sigmas": True}  # steps that shrink evenly: from uniform ones multistep solvers reach their order late


@pytest.mark.parametrize(
    "path, name, order, options",
    [
        ("scaled_linear", "ddim", 1, {}),
        ("scaled_linear", "euler", 1, KARRAS),
        ("scaled_linear", "heun", 2, KARRAS),
        ("scaled_linear", "dpm++2m", 2, KARRAS),
        ("scaled_linear", "unipc", 3, KARRAS),
        ("zero_snr", "ddim", 1, {}),
        ("flow", "euler", 1, {}),
        ("flow", "heun", 2, {}),
        ("flow", "dpm++2m", 2, {}),
        ("flow", "unipc", 2, {}),
        ("exploding", "euler", 1, {}),
        ("exploding", "dpm++2m", 2, {}),
    ],
)
def test_the_error_falls_at_the_solver_s_order(path, name, order, options):
    """Up to the last step, which all of them take by Euler's rule, to the data itself."""
    errors = []
    for steps in (40, 160):
        prediction = OWN.get(path, V())
        sampler = Sampler(make_scheduler(name, PATHS[path], prediction, **options), PATHS[path], prediction, steps)
        denoiser = network(PATHS[path], prediction, GAUSSIAN.denoise)
        seen = [step.latents for step in sampler.steps(denoiser, noise(50), torch.Generator().manual_seed(1))]
        start, end = sampler.t[[0, -1]].double()
        first = noise(50) * getattr(sampler.scheduler, "init_noise_sigma", 1.0)
        found = seen[-2].flatten(1).double()
        if path == "scaled_linear" and name in ("euler", "heun"):  # they count in x_t / alpha
            first, found = first * PATHS[path].alpha(start), found * PATHS[path].alpha(end)
        errors.append((found - flow_of(PATHS[path], first.flatten(1).double(), start, end)).abs().mean().item())
    assert math.log(errors[0] / errors[1], 4) > order - 0.35 and errors[1] < 0.02


@pytest.mark.parametrize("path, name", CASES)
def test_a_row_with_its_own_generator_does_not_depend_on_its_batch(path, name):
    start = noise(3)
    together, _ = draw(path, name, 5, TWO_MODES.denoise, start, generator=[torch.Generator().manual_seed(n) for n in range(3)])
    for row in range(3):
        alone, _ = draw(path, name, 5, TWO_MODES.denoise, start[row : row + 1], generator=[torch.Generator().manual_seed(row)])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", ["scaled_linear", "flow"])
def test_heun_calls_the_denoiser_twice_in_each_step_but_the_last(path):
    calls = []
    _, sampler = draw(path, "heun", 6, lambda x, *_: calls.append(1) or x, noise(1))
    assert len(calls) == len(sampler) == len(sampler.t) == 11


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 30])
@pytest.mark.parametrize("path, name", CASES)
def test_all_steps_of_a_sampler_are_distinct_and_the_last_is_as_large_as_its_neighbours(path, name, steps):
    sampler = Sampler(make_scheduler(name, PATHS[path], OWN.get(path, V())), PATHS[path], OWN.get(path, V()), steps)
    levels = sampler.t.double().unique().flip(0)
    assert len(levels) == steps
    if path == "exploding":  # EDM's noise levels are even in sigma^(1/7), and the last step is from sigma_min (its equation 5)
        levels = PATHS[path].sigma(levels) ** (1 / 7)
    sizes = -torch.cat([levels, torch.zeros(1)]).diff()
    assert sizes[-1] > 0.8 * sizes[:-1].median() if steps > 2 else path == "exploding" or sizes[-1] > 0.45 / steps


@pytest.mark.parametrize("name", ["euler", "euler-ancestral", "heun"])
def test_flow_samplers_take_even_steps_from_noise_to_data_and_shift_them(name):
    def levels(scheduler):
        return Sampler(scheduler, RectifiedFlow(), Velocity(), 4).t.unique().flip(0).tolist()

    plain = make_scheduler(name, RectifiedFlow(), Velocity())
    assert levels(plain) == [1.0, 0.75, 0.5, 0.25]
    shifted = type(plain).from_config(make_scheduler("euler", RectifiedFlow(), Velocity(), shift=3.0).config)
    assert levels(shifted) == pytest.approx([1.0, 0.9, 0.75, 0.5])  # 3s / (1 + 2s)


@pytest.mark.parametrize("name", samplers_for(RectifiedFlow(), Velocity()))
def test_a_shift_by_size_is_that_of_training_whatever_the_sampler(name):
    def times(by_size=1.0, **options):
        scheduler = make_scheduler(name, RectifiedFlow(), Velocity(), **options)
        return Sampler(scheduler, RectifiedFlow(), Velocity(), 5, shift=by_size).t

    torch.testing.assert_close(times(2.5), shift_time(times(), 2.5), rtol=0, atol=1e-6)
    key = "shift" if name in ("euler", "heun") else "flow_shift"
    if name != "euler-ancestral":  # has none of its own
        torch.testing.assert_close(times(2.0, **{key: 1.5}), shift_time(times(), 3.0), rtol=0, atol=1e-6)
    for shift in torch.linspace(0.05, 0.95, 91).tolist():  # some round the first noise level up
        assert times(shift)[0] <= 1


def test_an_answer_that_is_not_finite_stops_the_walk_at_its_step():
    answers = iter([0.0, 0.0, math.nan, 0.0])
    with pytest.raises(
        LdmError, match=r"prediction is not finite at step 3 of 4 \(t = 0\.\d+\); lower the guidance scale"
    ) as error:
        draw("flow", "euler", 4, lambda x, *_: x * 0 + next(answers), noise(2))
    assert error.value.exit_code == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("path, name", [("scaled_linear", "ddim"), ("scaled_linear", "ddpm")])
def test_more_steps_than_there_are_timesteps_are_refused(path, name):
    with pytest.raises(UsageError, match=r"cannot take 1001 steps"):
        draw(path, name, 1001, TWO_MODES.denoise, noise(1))
    with pytest.raises(UsageError, match=r"num_inference_steps is 0; give 1 or more"):
        draw(path, name, 0, TWO_MODES.denoise, noise(1))


@pytest.mark.parametrize("steps", [10**6, 10**15])
@pytest.mark.parametrize("path, name", [(path, name) for path, name in CASES if path in OWN])
def test_steps_without_end_are_refused(path, name, steps):
    with pytest.raises(UsageError, match=f"num_inference_steps is {steps}, above the limit of 10,000; lower it"):
        draw(path, name, steps, TWO_MODES.denoise, noise(1))
    for other in (2.5, True, None, "4"):
        with pytest.raises(UsageError, match=f"num_inference_steps is {other!r}; give 1 or more"):
            draw(path, name, other, TWO_MODES.denoise, noise(1))


@pytest.mark.parametrize("path, name, steps, options", [("flow", "dpm++2m", 10, KARRAS), ("zero_snr", "euler", 1000, {})])
def test_noise_levels_that_do_not_lead_down_the_path_are_refused(path, name, steps, options):
    with pytest.raises(UsageError, match=f"does not lead down .* in {steps} steps as it is set; take fewer"):
        draw(path, name, steps, TWO_MODES.denoise, noise(1), **options)
