import pytest
import torch
from torch import nn

from ldm.diffusion.guidance import Condition
from ldm.diffusion.objective import DenoisingObjective
from ldm.diffusion.path import RectifiedFlow, VariancePreserving
from ldm.diffusion.prediction import Epsilon, Sample, V, Velocity
from ldm.diffusion.timesteps import LogitNormal, Uniform

CONDITION = Condition(torch.randn(6, 3, 16), torch.ones(6, 3, dtype=torch.int64))
PAIRS = [(RectifiedFlow(), prediction) for prediction in (Epsilon(), Sample(), V(), Velocity())]
PAIRS += [(VariancePreserving(), prediction) for prediction in (Epsilon(), Sample(), V(), Velocity())]


class Oracle(nn.Module):
    """Knows x0, and what time the network's time stands for."""

    def __init__(self, path, prediction, x0):
        super().__init__()
        self.path, self.prediction, self.x0 = path, prediction, x0
        self.seen = None

    def forward(self, hidden_states, encoder_hidden_states, timestep, encoder_attention_mask, return_dict):
        self.seen = timestep
        t = (timestep + self.path.network_time(torch.zeros(())).abs()) / 1000
        alpha, sigma = (value[:, None, None, None] for value in (self.path.alpha(t), self.path.sigma(t)))
        eps = (hidden_states - alpha * self.x0) / sigma
        return (self.prediction.target(self.path, self.x0, eps, t),)


@pytest.mark.parametrize("path, prediction", PAIRS)
def test_who_knows_the_data_has_no_loss(path, prediction):
    x0 = torch.randn(6, 4, 8, 8, dtype=torch.float64)
    objective, oracle = DenoisingObjective(path, prediction, Uniform()), Oracle(path, prediction, x0)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    result = objective(oracle, x0, CONDITION, t, torch.randn_like(x0))
    assert result.loss.shape == (6,) and result.loss.max() < 1e-8
    assert torch.equal(result.t, t) and torch.equal(oracle.seen, path.network_time(t))


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.5))

    def forward(self, hidden_states, **_):
        return (self.value.expand_as(hidden_states),)


@pytest.mark.parametrize("path, prediction", PAIRS)
def test_the_loss_is_each_sample_s_own_mean_square_error(path, prediction):
    x0, eps, t = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), torch.linspace(0.1, 0.9, 6)
    loss = DenoisingObjective(path, prediction, Uniform())(Constant(), x0, CONDITION, t, eps).loss
    target = prediction.target(path, x0, eps, t)
    torch.testing.assert_close(loss, ((0.5 - target) ** 2).mean((1, 2, 3)))


def test_time_and_noise_are_drawn_from_the_generator():
    x0 = torch.randn(6, 4, 8, 8)
    objective = DenoisingObjective(RectifiedFlow(), Velocity(), LogitNormal())
    first, same, other = (
        objective(Constant(), x0, CONDITION, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.loss, same.loss) and torch.equal(first.t, same.t) and len(set(first.t.tolist())) == 6
    assert not torch.equal(first.t, other.t) and not torch.equal(first.loss, other.loss)


def test_the_gradient_is_that_of_the_mean_square(tiny_dit):
    network, x0, eps = Constant(), torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)
    loss = DenoisingObjective(RectifiedFlow(), Velocity(), Uniform())(network, x0, CONDITION, torch.rand(6), eps).loss.mean()
    loss.backward()
    torch.testing.assert_close(network.value.grad, 2 * (0.5 - (eps - x0)).mean())
    DenoisingObjective(RectifiedFlow(), Velocity(), Uniform())(tiny_dit, x0, CONDITION).loss.mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in tiny_dit.parameters())
