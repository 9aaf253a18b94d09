import pytest
import torch
from torch import nn

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.objective import DenoisingObjective
from ldm.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving
from ldm.diffusion.prediction import X0, Epsilon, Preconditioned, Score, V, Velocity
from ldm.diffusion.timesteps import DiscreteUniform, LogitNormal, LogNormal, Mode, Uniform
from ldm.diffusion.weighting import EDM, MinSNR

CONDITION = Condition(torch.randn(6, 3, 16), torch.ones(6, 3, dtype=torch.int64))
PATHS = [RectifiedFlow(), VariancePreserving(), VariancePreserving("linear", True), VarianceExploding(sigma_data=0.5)]
PREDICTIONS = [Epsilon(), Score(), X0(), V(), Velocity(), Preconditioned()]
PAIRS = [(path, prediction) for path in PATHS for prediction in PREDICTIONS]


def name(value):
    return type(value).__name__


class Oracle(nn.Module):
    """Knows x0 and t, and computes the noise from its input."""

    def __init__(self, path, prediction, x0, t):
        super().__init__()
        self.path, self.prediction, self.x0, self.t = path, prediction, x0, t
        self.timestep = torch.empty(0)

    def forward(self, hidden_states, timestep, **_):
        self.timestep, path = timestep, self.path
        scale, alpha, sigma = (f(self.t)[:, None, None, None] for f in (path.input_scale, path.alpha, path.sigma))
        eps = (hidden_states / scale - alpha * self.x0) / sigma
        return (self.prediction.target(path, self.x0, eps, self.t),)


@pytest.mark.parametrize("path, prediction", PAIRS, ids=name)
def test_an_oracle_has_no_loss(path, prediction):
    x0, t = torch.randn(6, 4, 8, 8, dtype=torch.float64), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    objective = DenoisingObjective(path, prediction, Uniform(), MinSNR())
    oracle = Oracle(path, prediction, x0, t)
    result = objective(oracle, x0, CONDITION, t, torch.randn_like(x0))
    assert result.loss.shape == result.unweighted.shape == (6,)
    size = prediction.target(path, x0, torch.randn_like(x0), t).square().mean((1, 2, 3))
    assert (result.unweighted / size).max() < 1e-12 and result.loss.abs().max() < 1e-6
    assert torch.equal(result.t, t) and torch.equal(oracle.timestep, path.network_time(t))


class Constant(nn.Module):
    def __init__(self, value=0.5):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, hidden_states, **_):
        return (self.value.expand_as(hidden_states),)


@pytest.mark.parametrize("path, prediction", PAIRS, ids=name)
def test_the_loss_is_each_sample_s_own_mean_square_error(path, prediction):
    x0, eps, t = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), torch.linspace(0.1, 0.9, 6)
    result = DenoisingObjective(path, prediction, Uniform())(Constant(), x0, CONDITION, t, eps)
    target = prediction.target(path, x0, eps, t)
    torch.testing.assert_close(result.loss, ((0.5 - target) ** 2).mean((1, 2, 3)))
    assert torch.equal(result.loss, result.unweighted)


@pytest.mark.parametrize("path, prediction", PAIRS, ids=name)
def test_a_weighting_leaves_the_unweighted_loss_beside_it(path, prediction):
    x0, eps, t = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), torch.linspace(0.1, 0.9, 6)
    plain = DenoisingObjective(path, prediction, Uniform())(Constant(), x0, CONDITION, t, eps).loss
    result = DenoisingObjective(path, prediction, Uniform(), MinSNR(2.0))(Constant(), x0, CONDITION, t, eps)
    assert torch.equal(result.unweighted, plain)
    torch.testing.assert_close(result.loss, MinSNR(2.0)(path, prediction, t) * plain)


@pytest.mark.parametrize("prediction, weighting", [(Preconditioned(), None), (Preconditioned(), EDM()), (X0(), EDM())])
def test_the_loss_of_edm_is_the_paper_s(prediction, weighting):
    """lambda·‖D(x) − x0‖² with D = c_skip·x + c_out·F(c_in·x, c_noise), written out."""
    path, spread = VarianceExploding(sigma_data=0.5), 0.5
    t, (x0, eps) = torch.linspace(0.05, 0.95, 6), torch.randn(2, 6, 4, 8, 8)
    sigma = path.sigma(t)[:, None, None, None]
    x = spread * x0 + sigma * eps
    c_skip, c_in = spread**2 / (sigma**2 + spread**2), (sigma**2 + spread**2) ** -0.5
    c_out = sigma * spread * c_in

    def said(scaled, c_noise):
        return scaled.roll(1, -1) + c_noise[:, None, None, None]

    class Network(nn.Module):
        def forward(self, hidden_states, timestep, **_):
            f = said(hidden_states, timestep)
            return (f if isinstance(prediction, Preconditioned) else c_skip * hidden_states / c_in + c_out * f,)

    denoised = c_skip * x + c_out * said(c_in * x, path.sigma(t).log() / 4)
    expected = ((denoised - spread * x0) ** 2 / c_out**2).mean((1, 2, 3))
    loss = DenoisingObjective(path, prediction, LogNormal(), weighting)(Network(), spread * x0, CONDITION, t, eps).loss
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)


def test_nan_in_a_sample_stays_in_the_loss_of_that_sample():
    x0, t = torch.randn(6, 4, 8, 8), torch.rand(6)
    x0[2, 1, 3, 3] = torch.nan
    objective = DenoisingObjective(VariancePreserving(), V(), Uniform(), MinSNR())
    result = objective(Constant(), x0, CONDITION, t)
    only_third = torch.arange(6) == 2
    assert torch.equal(result.loss.isnan(), only_third) and torch.equal(result.unweighted.isnan(), only_third)


@pytest.mark.parametrize("sampler", [Uniform(), LogitNormal(), Mode(), DiscreteUniform(), LogNormal()], ids=name)
def test_time_and_noise_come_from_the_generator(sampler):
    x0 = torch.randn(6, 4, 8, 8)
    objective = DenoisingObjective(VarianceExploding(), Preconditioned(), sampler)
    first, same, other = (
        objective(Constant(), x0, CONDITION, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.loss, same.loss) and torch.equal(first.t, same.t) and len(set(first.t.tolist())) == 6
    assert not torch.equal(first.t, other.t) and not torch.equal(first.loss, other.loss)


def test_the_shift_by_resolution_follows_the_size_of_the_latents():
    objective = DenoisingObjective(RectifiedFlow(), Velocity(), Uniform(base_side=4))
    small, large = (
        objective(Constant(), torch.randn(6, 4, side, side), CONDITION, generator=torch.Generator().manual_seed(0)).t
        for side in (4, 8)
    )
    torch.testing.assert_close(large.logit(), small.logit() + torch.tensor(2.0).log())


def test_the_gradient_is_that_of_the_mean_square(tiny_dit):
    network, x0, eps = Constant(), torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)
    loss = DenoisingObjective(RectifiedFlow(), Velocity(), Uniform())(network, x0, CONDITION, torch.rand(6), eps).loss.mean()
    (gradient,) = torch.autograd.grad(loss, network.value)
    torch.testing.assert_close(gradient, 2 * (0.5 - (eps - x0)).mean())
    DenoisingObjective(RectifiedFlow(), Velocity(), Uniform())(tiny_dit, x0, CONDITION).loss.mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in tiny_dit.parameters())
