from urllib.error import URLError

import pytest
import torch
import torchvision
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.distributions import Normal, kl_divergence

from ldm.errors import UsageError
from ldm.losses import (
    ADAPTIVE_WEIGHT_LIMIT,
    Hinge,
    NonSaturating,
    PerceptualLoss,
    ReconstructionLoss,
    adaptive_weight,
    kl_per_pixel_value,
)


def pictures(seed=0, size=32):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_reconstruction_loss_is_its_weighted_means():
    a, b = pictures(0), pictures(1)
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


REAL, FAKE = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [1.0, -0.5]])


def test_hinge_by_hand():
    # relu(1 - real) = 0, 0.5, 2, 0; relu(1 + fake) = 0, 1, 2, 0.5
    assert Hinge().discriminator(REAL, FAKE) == pytest.approx((2.5 / 4 + 3.5 / 4) / 2)
    assert Hinge().generator(FAKE) == pytest.approx(2.5 / 4)
    assert Hinge().discriminator(torch.full((4,), 1.0), torch.full((4,), -1.0)) == 0


def test_non_saturating_is_the_cross_entropy_of_the_logits():
    bce, ones, zeros = nn.functional.binary_cross_entropy_with_logits, torch.ones(2, 2), torch.zeros(2, 2)
    discriminator = (bce(REAL, ones) + bce(FAKE, zeros)) / 2
    torch.testing.assert_close(NonSaturating().discriminator(REAL, FAKE), discriminator)
    torch.testing.assert_close(NonSaturating().generator(FAKE), bce(FAKE, ones))


@pytest.mark.parametrize("loss", [Hinge(), NonSaturating()])
def test_each_side_pulls_the_logits_its_own_way(loss):
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    loss.discriminator(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()  # descent raises real logits and lowers fake ones
    fake.grad = None
    loss.generator(fake).backward()
    assert (fake.grad < 0).all()


class TestAdaptiveWeight:
    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1))

    def losses(self, network, scale=1.0):
        output = network(pictures(size=8))
        return (output - pictures(1, 8)).abs().mean(), scale * output.square().mean(), network[-1].weight

    def test_it_is_the_ratio_of_the_gradients(self, network):
        reconstruction, generator, last = self.losses(network)
        weight = adaptive_weight(reconstruction, generator, last)
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, generator)]
        torch.testing.assert_close(weight, norms[0] / (norms[1] + 1e-4))

    def test_the_weighted_gradient_is_as_large_as_the_reconstruction_s_whatever_the_scale(self, network):
        for scale in (0.1, 1.0, 1000.0):
            reconstruction, generator, last = self.losses(network, scale)
            weighted = adaptive_weight(reconstruction, generator, last) * generator
            norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, weighted)]
            torch.testing.assert_close(norms[1], norms[0], rtol=0.02, atol=0)

    def test_no_gradient_flows_through_it_and_the_graph_is_left_for_training(self, network):
        reconstruction, generator, last = self.losses(network)
        weight = adaptive_weight(reconstruction, generator, last)
        assert not weight.requires_grad and last.grad is None
        (reconstruction + weight * generator).backward()
        expected = torch.autograd.grad(sum(self.losses(network)[:2]), last)  # a graph of its own still works
        assert last.grad.abs().sum() > 0 and expected[0].abs().sum() > 0

    def test_it_is_bounded(self, network):
        reconstruction, generator, last = self.losses(network, scale=1e-30)
        weight = adaptive_weight(1e6 * reconstruction, generator, last)
        assert weight == ADAPTIVE_WEIGHT_LIMIT


@pytest.fixture(scope="module")
def perceptual():
    return PerceptualLoss("squeeze", "random")


class TestPerceptualLoss:
    def test_a_random_trunk_is_the_same_each_time_and_leaves_the_generator_alone(self, perceptual):
        torch.manual_seed(123)
        expected = torch.rand(4)
        torch.manual_seed(123)
        again = PerceptualLoss("squeeze", "random")
        assert torch.equal(torch.rand(4), expected)
        ours, theirs = perceptual.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert again.description == "LPIPS (squeeze, random trunk)"

    def test_it_is_a_distance(self, perceptual):
        a, b = pictures(0), pictures(1)
        assert perceptual(a, a) == 0 and perceptual(a, b) > 0
        torch.testing.assert_close(perceptual(a, b), perceptual(b, a))
        near = (a + 0.05 * (b - a)).clamp(-1, 1)
        assert perceptual(near, a) < perceptual(b, a)

    def test_its_gradient_reaches_the_reconstruction_and_no_weight(self, perceptual):
        reconstruction = pictures(0).requires_grad_()
        perceptual(reconstruction, pictures(1)).backward()
        assert reconstruction.grad.abs().max() > 0 and reconstruction.grad.isfinite().all()
        assert not any(parameter.requires_grad for parameter in perceptual.parameters())

    def test_a_frozen_metric_stays_in_evaluation(self, perceptual):
        stage = nn.Sequential(perceptual, nn.Dropout())
        stage.train()
        assert stage[1].training and not any(module.training for module in perceptual.modules())

    def test_a_checkpoint_of_torchvision_gives_exactly_its_weights(self, tmp_path):
        torch.manual_seed(7)
        alexnet = torchvision.models.alexnet(weights=None)
        torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
        perceptual = PerceptualLoss("alex", str(tmp_path / "alexnet.pth"))
        trunk = perceptual.network.net.state_dict()
        expected = {name: value for name, value in alexnet.state_dict().items() if name.startswith("features.")}
        assert len(trunk) == len(expected) == 10
        for name, value in trunk.items():
            assert torch.equal(value, expected["features." + name.split(".", 1)[1]])
        assert str(tmp_path / "alexnet.pth") in perceptual.description

    def test_a_path_that_is_no_such_checkpoint_is_refused_by_name(self, tmp_path):
        with pytest.raises(UsageError, match=r"missing\.pth does not exist"):
            PerceptualLoss("squeeze", str(tmp_path / "missing.pth"))
        torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
        (tmp_path / "text.pth").write_text("not a checkpoint")
        for name in ("other.pth", "text.pth"):
            with pytest.raises(UsageError) as error:
                PerceptualLoss("squeeze", str(tmp_path / name))
            assert f"{name} is not the checkpoint" in str(error.value) and "\n" not in str(error.value)

    def test_without_a_network_the_pretrained_trunk_says_both_ways_out(self, tmp_path, monkeypatch):
        def offline(*_, **__):
            raise URLError("Name or service not known")

        monkeypatch.setattr(torch.hub, "urlopen", offline)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(UsageError) as error:
            PerceptualLoss("squeeze")
        message = str(error.value)
        assert "pretrained squeeze trunk" in message and "Name or service not known" in message and "\n" not in message
        assert "model.perceptual.init_args.weights" in message and "path" in message and "'random'" in message
