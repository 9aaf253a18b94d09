"""Starting from an image, on data whose denoiser is known exactly, for every path, prediction and scheduler."""

import math

import pytest
import torch

from ldm.diffusion.editing import KnownPart, invert, latent_mask
from ldm.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import X0, Epsilon, Preconditioned, V, Velocity
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.scheduler import make_scheduler, samplers_for
from ldm.errors import UsageError

PATHS = {
    "scaled_linear": VariancePreserving(),
    "zero_snr": VariancePreserving("linear", zero_terminal_snr=True),
    "flow": RectifiedFlow(),
    "exploding": VarianceExploding(),
}
OWN = {"flow": Velocity(), "exploding": Preconditioned()}  # and V of the others
CASES = [(path, name) for path in PATHS for name in samplers_for(PATHS[path], OWN.get(path, V()))]
MEAN, DEVIATION = 0.2, 0.6  # of the Gaussian that stands for the data


def sampler_of(path, name=None, steps=10, strength=1.0, prediction=None, **options):
    diffusion = (PATHS[path], prediction or OWN.get(path, V()))
    name = name or ("ddim" if isinstance(PATHS[path], VariancePreserving) else "euler")
    return Sampler(make_scheduler(name, *diffusion, **options), *diffusion, steps, strength=strength)


def network(path, prediction=None, x0=None):
    """What a network says that knows the data: one point, or the Gaussian."""
    path, prediction = PATHS[path], prediction or OWN.get(path, V())

    def says(scaled, network_time, t):
        alpha, sigma, x = path.alpha(t.double())[0], path.sigma(t.double())[0], scaled.double()
        x = x / path.input_scale(t.double())[0]
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        clean = MEAN + gain * (x - alpha * MEAN) if x0 is None else x0.expand_as(x)
        return prediction.target(path, clean, (x - alpha * clean) / sigma, t.double())

    return says


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path, name", CASES)
def test_the_state_is_what_the_network_sees_before_the_scheduler_s_scale(path, name):
    """Sampling from an image calls the network with input_scale·(alpha·x0 + sigma·eps) first, at the level it says."""
    x0, eps, seen = normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1), []
    sampler = sampler_of(path, name, steps=10, strength=0.5)
    calls = 9 if name == "heun" else 5
    assert len(sampler) == calls

    def look(scaled, network_time, t):
        seen.append((scaled.double() / PATHS[path].input_scale(t.double())[0], t[0].double()))
        return network(path, x0=x0.double())(scaled, network_time, t)

    drawn = [*sampler.steps(look, eps, torch.Generator().manual_seed(0), x0)][-1].latents
    x_t, t = seen[0]
    expected = PATHS[path].alpha(t) * x0.double() + PATHS[path].sigma(t) * eps.double()
    torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-4)
    # who knows the image ends with it wherever he starts
    assert len(seen) == calls
    torch.testing.assert_close(drawn, x0, rtol=0, atol=1e-3)


@pytest.mark.parametrize("path, name", CASES)
def test_strength_1_is_the_walk_from_noise_to_the_bit(path, name):
    eps = normal(2, 1, 2, 2)
    plain = sampler_of(path, name)(network(path), eps, torch.Generator().manual_seed(0))
    given = [
        *sampler_of(path, name, strength=1.0).steps(network(path), eps, torch.Generator().manual_seed(0), normal(2, 1, 2, 2))
    ]
    assert torch.equal(given[-1].latents, plain)


@pytest.mark.parametrize("path, name", [case for case in CASES if case[1] in ("ddim", "euler", "heun")])
def test_a_walk_begun_part_way_goes_on_as_the_whole_one_does(path, name):
    """From a state of the whole sampling, for samplers that neither remember earlier steps nor draw noise."""
    states = [step.latents for step in sampler_of(path, name).steps(network(path), normal(3, 1, 2, 2))]
    rest = sampler_of(path, name, strength=0.4)
    begin = len(states) - len(rest)
    # noised(x0, 0, 0) with the state in the place of x0, undone
    start = states[begin - 1] / (1.0 if rest.counts_over_alpha else rest.alpha[0])
    resumed = [step.latents for step in rest.steps(network(path), torch.zeros(3, 1, 2, 2), None, start)]
    torch.testing.assert_close(resumed[-1], states[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("strength, steps", [(0.29, 29), (1.0, 100), (0.3, 30), (0.999, 99), (0.01, 1)])
def test_strength_is_a_share_of_the_steps(strength, steps):
    assert len(sampler_of("flow", steps=100, strength=strength)) == steps


@pytest.mark.parametrize(
    "strength, why",
    [
        (0.0, "strength is 0; give a number above 0"),
        (1.1, r"strength is 1.1; give .* up to 1"),
        (float("nan"), "strength is nan"),
        (0.05, r"strength 0.05 of 10 steps leaves none; give a strength of 0.1 or more, or more steps"),
    ],
)
def test_a_strength_that_cannot_be_walked_is_refused(strength, why):
    with pytest.raises(UsageError, match=why) as error:
        sampler_of("flow", strength=strength)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path, name", CASES)
def test_what_the_denoiser_sees_is_told_at_every_step(path, name):
    x0 = normal(2, 1, 2, 2).double()
    for step in sampler_of(path, name, steps=4).steps(network(path, x0=x0), normal(2, 1, 2, 2, seed=1), torch.Generator()):
        torch.testing.assert_close(step.x0.double(), x0, rtol=0, atol=2e-3)


@pytest.mark.parametrize("path, name", CASES)
def test_the_known_part_ends_as_the_image_and_stands_at_every_step_s_level(path, name):
    x0, eps = normal(1, 1, 4, 4), normal(1, 1, 4, 4, seed=1)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    known, sampler, latents = KnownPart(x0, eps, mask), sampler_of(path, name, steps=5), x0
    for step in sampler.steps(network(path), eps, torch.Generator().manual_seed(0), x0):
        drawn = step.latents.clone()
        known.put_back(sampler, step)
        assert torch.equal(step.latents[..., 2:], drawn[..., 2:])
        assert torch.equal(step.latents[..., :2], sampler.noised(x0, eps, step.number + 1)[..., :2])
        assert torch.equal(step.x0[..., :2], x0[..., :2])
        latents = step.latents
    assert torch.equal(latents[..., :2], x0[..., :2]) and not torch.equal(latents, x0)


def test_a_latent_is_redrawn_where_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 8, 8)
    mask[0, 0, 3, 4] = 1
    assert latent_mask(mask, 4)[0, 0].tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize(
    "path, prediction",
    [
        ("scaled_linear", V()),
        ("scaled_linear", Epsilon()),
        ("zero_snr", V()),
        ("zero_snr", X0()),
        ("flow", Velocity()),
        ("flow", X0()),
        ("exploding", Preconditioned()),
        ("exploding", Epsilon()),
    ],
)
def test_what_is_inverted_is_drawn_again(path, prediction):
    """But for the step from the data, whose error falls with its length."""
    x0, says = MEAN + DEVIATION * normal(50, 1, 2, 2), network(path, prediction)
    errors = []
    for steps in (10, 40):
        noise = invert(sampler_of(path, steps=steps, prediction=prediction), says, x0)
        again = sampler_of(path, steps=steps, prediction=prediction)(says, noise)
        errors.append((again - x0).abs().max().item())
    assert errors[1] < 0.01 and (errors[1] < errors[0] / 3 or errors[0] < 1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_the_inverse_of_data_is_noise_of_unit_variance_and_converges(path):
    """The probability flow of a Gaussian stretches it evenly: x0 at z deviations comes from noise at z of its own."""
    z = normal(200, 1, 2, 2)
    path_, one = PATHS[path], torch.ones(1, dtype=torch.float64)
    last = sampler_of(path, steps=2).t[:1].double() if path == "scaled_linear" else one
    alpha, sigma = path_.alpha(last).item(), path_.sigma(last).item()
    expected = alpha * MEAN + math.hypot(alpha * DEVIATION, sigma) * z
    if path == "exploding":
        expected = expected / math.hypot(sigma, 1.0)  # as its schedulers count noise
    errors = [
        (invert(sampler_of(path, steps=steps), network(path), MEAN + DEVIATION * z, iterations=5) - expected)
        .abs()
        .mean()
        .item()
        for steps in (20, 80)
    ]
    assert errors[1] < errors[0] / 2.5 and errors[1] < 0.03


def test_more_calls_make_the_way_back_exact():
    x0, says = MEAN + DEVIATION * normal(50, 1, 2, 2), network("flow")
    errors = []
    for iterations in (1, 2, 4):
        noise = invert(sampler_of("flow", steps=20), says, x0, iterations)
        errors.append((sampler_of("flow", steps=20)(says, noise) - x0).abs().mean().item())
    assert errors[1] < errors[0] / 3 and errors[2] < errors[0] / 3


@pytest.mark.parametrize("path, name", CASES)
def test_every_scheduler_s_grid_can_be_climbed_and_the_deterministic_ones_lead_back(path, name):
    x0, counted = MEAN + DEVIATION * normal(2, 1, 2, 2), []
    noise = invert(sampler_of(path, name, steps=40), network(path), x0, on_step=lambda: counted.append(1))
    assert noise.isfinite().all() and len(counted) == 40
    if name in ("ddim", "euler", "heun", "dpm++2m", "unipc"):
        again = sampler_of(path, name, steps=40)(network(path), noise)
        assert (again - x0).abs().max() < 0.15
