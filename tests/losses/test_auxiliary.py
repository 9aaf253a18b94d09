"""Auxiliary losses of stage two; tests/training/test_extensions.py trains with losses of activations."""

import pytest
import torch
from torch import nn

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.objective import DenoisingObjective
from ldm.diffusion.path import RectifiedFlow, VarianceExploding
from ldm.diffusion.prediction import Epsilon, Velocity
from ldm.diffusion.timesteps import Uniform
from ldm.errors import UsageError
from ldm.losses.auxiliary import DirectionLoss

CONDITION = Condition(torch.randn(6, 3, 16), torch.ones(6, 3, dtype=torch.int64))


class Says(nn.Module):
    """A denoiser of one prediction."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = nn.Parameter(prediction)

    def forward(self, **_):
        return (self.prediction,)


def losses(path, prediction, denoiser, x0, eps, t):
    """The mean squared error and the direction's loss."""
    output = DenoisingObjective(path, prediction, Uniform())(denoiser, x0, CONDITION, t, eps)
    return output.loss.mean(), DirectionLoss()(output.activations, {}, output)


def test_the_direction_s_loss_is_one_minus_the_cosine_of_the_channels_of_each_pixel():
    x0, eps, t = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), torch.rand(6)

    def direction(said):
        return losses(RectifiedFlow(), Velocity(), Says(said), x0, eps, t)[1]

    v = eps - x0
    for said, expected in ((v, 0.0), (7 * v, 0.0), (-2 * v, 2.0)):
        torch.testing.assert_close(direction(said), torch.tensor(expected), rtol=0, atol=1e-3)
    rotated = torch.stack([-v[:, 1], v[:, 0], -v[:, 3], v[:, 2]], 1)  # by 90° at each pixel
    torch.testing.assert_close(direction(rotated), torch.tensor(1.0), rtol=0, atol=1e-4)
    said = torch.randn_like(v)
    cosine = (said * v).sum(1) / (said.norm(dim=1) * v.norm(dim=1))
    torch.testing.assert_close(direction(said), (1 - cosine).mean(), rtol=1e-2, atol=1e-3)


def test_the_direction_s_loss_does_not_depend_on_the_scale_of_the_target():
    x0, eps, said = torch.randn(3, 6, 4, 8, 8, dtype=torch.float64)
    t, path = torch.linspace(0.1, 0.9, 6, dtype=torch.float64), VarianceExploding()
    _, of_noise = losses(path, Epsilon(), Says(said), x0, eps, t)
    scaled = said * Velocity().coefficients(path, t)[1][:, None, None, None]  # from 0.06 to 300
    torch.testing.assert_close(losses(path, Velocity(), Says(scaled), x0, eps, t)[1], of_noise, rtol=0, atol=1e-5)


def test_the_direction_s_gradient_is_moderate_where_a_network_starts_from_zero():
    x0, eps, t = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), torch.rand(6)
    network = Says(torch.zeros(6, 4, 8, 8))
    error, direction = losses(RectifiedFlow(), Velocity(), network, x0, eps, t)
    (of_error,) = torch.autograd.grad(error, network.prediction)
    (of_direction,) = torch.autograd.grad(direction, network.prediction)
    assert 0 < of_direction.norm() < 20 * of_error.norm()


def test_nan_in_a_prediction_is_nan_in_the_direction_s_loss():
    x0, eps, t = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), torch.rand(6)
    said = torch.zeros(6, 4, 8, 8)
    said[2, 1, 3, 3] = torch.nan
    assert losses(RectifiedFlow(), Velocity(), Says(said), x0, eps, t)[1].isnan()


def test_a_negative_weight_is_refused():
    with pytest.raises(UsageError, match="DirectionLoss: weight is -1; give 0 or more"):
        DirectionLoss(weight=-1)
