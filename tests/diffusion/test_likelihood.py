"""ln p of data whose density is known, along the ODE of every path, and the variational bounds below it."""

import math

import pytest
import torch
from scipy.linalg import hadamard
from torch.distributions import MultivariateNormal

from ldm.diffusion.likelihood import FlowLikelihood, ddpm_bound, rademacher, squared_error, time_range
from ldm.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving, expand
from ldm.diffusion.prediction import X0, Epsilon, Preconditioned, Score, V, Velocity
from ldm.errors import LdmError, UsageError

# a path and a prediction, and by how much the density of x0 is missed that begins at its first step
CASES = [
    (RectifiedFlow(), Velocity()),
    (RectifiedFlow(), X0()),
    (VariancePreserving(), V()),
    (VariancePreserving("linear"), Epsilon()),
    (VariancePreserving("squaredcos_cap_v2", zero_terminal_snr=True), V()),
    (VarianceExploding(), Preconditioned()),
    (VarianceExploding(sigma_data=0.5), Score()),
]
names = [f"{type(path).__name__}-{type(prediction).__name__}" for path, prediction in CASES]


class Gaussian:
    """Correlated normal data of shape (4, 1, 1), mean 0 and variance 1, as latents are normalised."""

    def __init__(self):
        mixing = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        covariance = mixing @ mixing.T + 0.5 * torch.eye(4)
        scale = covariance.diagonal().rsqrt()
        self.covariance = scale[:, None] * covariance * scale

    def sample(self, count):
        torch.manual_seed(0)
        return self.at(1.0, 0.0).sample((count,)).view(count, 4, 1, 1)

    def at(self, alpha, sigma):
        """The distribution of alpha·x0 + sigma·eps."""
        zero, one = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
        return MultivariateNormal(zero, alpha**2 * self.covariance + sigma**2 * one)

    def denoiser(self, path, prediction):
        """What a network says that knows E[x0 | x_t], which is asked for times of the path alone."""

        def says(scaled, network_time, t):
            assert t.min() >= 0 and t.max() <= 1
            t = t.double()
            alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
            values, vectors = torch.linalg.eigh(self.covariance)
            x = scaled.double().flatten(1) / path.input_scale(t)[:, None]
            x0 = x @ vectors * (alpha * values / (alpha**2 * values + sigma**2)) @ vectors.T
            eps = x @ vectors * (sigma / (alpha**2 * values + sigma**2)) @ vectors.T
            return prediction.target(path, x0.view_as(scaled), eps.view_as(scaled), t)

        return says


GAUSSIAN = Gaussian()
X = GAUSSIAN.sample(5)
# these probes make the divergence exact: their outer products sum to the unit matrix
EXACT = torch.tensor(hadamard(4), dtype=torch.float64).view(4, 1, 4, 1, 1).expand(4, 5, 4, 1, 1)


def generated_density(path, prediction):
    """ln p(x0) where the flow leads the noise of the path's end to the data: it scales each principal axis."""
    at = torch.tensor(time_range(path, prediction), dtype=torch.float64)
    alpha, sigma = path.alpha(at), path.sigma(at)
    values, vectors = torch.linalg.eigh(GAUSSIAN.covariance)
    start, end = ((alpha**2)[:, None] * values + (sigma**2)[:, None]).sqrt()
    z = alpha[0] * X.flatten(1) @ vectors * (end / start)
    prior = torch.distributions.Normal(0.0, torch.hypot(alpha[1] * path.sigma_data, sigma[1]))
    return (prior.log_prob(z) + (alpha[0] * end / start).log()).sum(1)


@pytest.mark.parametrize(("path", "prediction"), CASES, ids=names)
def test_the_density_of_gaussians_is_exact_on_every_path(path, prediction):
    """To a thousandth of a nat, by steps that adapt and by fixed ones."""
    says, true = GAUSSIAN.denoiser(path, prediction), generated_density(path, prediction)
    found = FlowLikelihood(path, prediction, tolerance=1e-6)(says, X, EXACT)
    assert (found.nats - true).abs().max() < 1e-3
    assert found.evaluations < 400
    fixed = FlowLikelihood(path, prediction, "rk4", steps=100)
    assert (fixed(says, X, EXACT).nats - true).abs().max() < 1e-3


def test_it_is_that_of_the_data_where_the_path_ends_in_noise_alone():
    """And random probes are right within their standard error."""
    true = GAUSSIAN.at(1.0, 0.0).log_prob(X.flatten(1))
    flow, says = FlowLikelihood(RectifiedFlow(), Velocity()), GAUSSIAN.denoiser(RectifiedFlow(), Velocity())
    assert (flow(says, X, EXACT).nats - true).abs().max() < 1e-3
    cosine = VariancePreserving("squaredcos_cap_v2", zero_terminal_snr=True)
    found = FlowLikelihood(cosine, V(), tolerance=1e-6, start=0.0)(GAUSSIAN.denoiser(cosine, V()), X, EXACT)
    assert (found.nats - true).abs().max() < 1e-3
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    found = flow(says, X, rademacher(X.shape, generators, 64))
    assert ((found.nats - true).abs() < 4 * found.standard_error).all()
    assert 0.01 < found.standard_error.max() < 0.5
    with pytest.raises(LdmError, match="dopri5 cannot solve"):
        flow(lambda x, network_time, t: says(x, network_time, t) * math.nan, X, EXACT)
    with pytest.raises(UsageError, match="no solver 'rk5'; choose one of: dopri5"):
        FlowLikelihood(RectifiedFlow(), Velocity(), "rk5")


def test_the_bound_of_ddpm_lies_below_the_density_and_is_estimated_without_bias():
    """On a Gaussian its expectation has a closed form: each error is the variance of x0 given x_t."""
    for path, prediction in ((VariancePreserving("linear"), Epsilon()), (VariancePreserving(zero_terminal_snr=True), V())):
        says, data = GAUSSIAN.denoiser(path, prediction), GAUSSIAN.sample(512)
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(data))]
        found = ddpm_bound(path, prediction, says, data, generators, steps=10)
        k = torch.arange(1001, dtype=torch.float64) / 1000
        alpha, sigma = path.alpha(k)[:, None], path.sigma(k)[:, None]
        values = torch.linalg.eigvalsh(GAUSSIAN.covariance)
        errors = (values * sigma**2 / (alpha**2 * values + sigma**2)).sum(1)
        snr = (alpha / sigma).square()[:, 0]
        kl = ((snr[1:-1] - snr[2:]) / 2 * errors[2:]).sum()
        first, last = sigma[1] ** 2, sigma[-1] ** 2
        prior = (alpha[-1] ** 2 * values + last - 1 - last.log()).sum() / 2
        expected = float(-prior - kl - errors[1] / (2 * first) - 2 * (2 * math.pi * first).log())
        assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(len(found))
        entropy = float(GAUSSIAN.at(1.0, 0.0).entropy())
        assert -entropy - 2 < expected < -entropy  # its first steps are long
    every = ddpm_bound(path, prediction, says, data[:8], generators[:8])
    assert abs(every.mean() - expected) < 6


def test_the_error_of_the_data_is_that_of_the_noise_scaled():
    path, prediction = RectifiedFlow(), Velocity()
    t, eps = torch.full((5,), 0.3), torch.randn(5, 4, 1, 1)
    found = squared_error(path, prediction, lambda x, network_time, t: 0 * x, X.float(), eps, t)
    x_t = path.sample(X.float(), eps, t)  # a velocity of 0 takes x_t for the data
    assert torch.allclose(found, (x_t - X).flatten(1).square().sum(1), rtol=1e-4)
    assert expand(t, eps).shape == (5, 1, 1, 1)
