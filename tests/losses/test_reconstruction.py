import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Normal, kl_divergence

from ldm.losses.reconstruction import LearnedVariance, ReconstructionLoss, kl_per_pixel_value


def make_images(seed=0, size=32):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_reconstruction_loss_is_its_weighted_means():
    a, b = make_images(0), make_images(1)
    l1, l2 = (a - b).abs().mean(), ((a - b) ** 2).mean()
    torch.testing.assert_close(ReconstructionLoss()(a, b), l1)
    torch.testing.assert_close(ReconstructionLoss(0, 2)(a, b), 2 * l2)
    torch.testing.assert_close(ReconstructionLoss(0.5, 3)(a, b), 0.5 * l1 + 3 * l2)
    assert ReconstructionLoss(1, 1)(a, a) == 0


def test_kl_is_that_of_torch_over_the_number_of_pixel_values():
    moments = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    posterior = DiagonalGaussianDistribution(moments)
    images = torch.zeros(3, 3, 16, 16)
    expected = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum() / (3 * 3 * 16 * 16)
    torch.testing.assert_close(kl_per_pixel_value(posterior, images), expected)
    standard = DiagonalGaussianDistribution(torch.zeros(3, 8, 4, 4))
    assert kl_per_pixel_value(standard, images) == 0


class TestLearnedVariance:
    @pytest.mark.parametrize("error", [0.02, 1.0, 7.0])
    def test_it_is_minimal_where_the_variance_is_the_error(self, error):
        loss, error = LearnedVariance().double(), torch.tensor(error, dtype=torch.float64)
        at = {}
        for shift in (-0.1, 0.0, 0.1):
            with torch.no_grad():
                loss.log_variance.copy_(error.log() + shift)
            at[shift] = loss(error)
        assert at[0.0] < at[-0.1] and at[0.0] < at[0.1]
        torch.testing.assert_close(at[0.0], 1 + error.log())
        with torch.no_grad():
            loss.log_variance.copy_(error.log())
        (gradient,) = torch.autograd.grad(loss(error), loss.log_variance)
        assert gradient.abs() < 1e-12

    def test_descent_finds_the_error(self):
        loss = LearnedVariance(log_variance=1.0)
        optimiser = torch.optim.Adam(loss.parameters(), lr=0.05)
        for _ in range(300):
            optimiser.zero_grad()
            loss(torch.tensor(0.05)).backward()
            optimiser.step()
        assert loss.log_variance.exp().item() == pytest.approx(0.05, rel=0.01)

    def test_it_weighs_the_error_s_gradient_by_its_precision(self):
        loss, error = LearnedVariance(log_variance=-2.0), torch.tensor(0.3, requires_grad=True)
        loss(error).backward()
        torch.testing.assert_close(error.grad, torch.tensor(2.0).exp())
        torch.testing.assert_close(loss.log_variance.grad, 1 - 0.3 * torch.tensor(2.0).exp())
