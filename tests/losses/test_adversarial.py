import pytest
import torch
from torch import nn

from ldm.errors import UsageError
from ldm.losses.adversarial import GradientPenalty, Hinge, LeCam, NonSaturating, Vanilla, adaptive_weight
from ldm.losses.perceptual import PerceptualLoss
from ldm.losses.reconstruction import ReconstructionLoss
from ldm.models.autoencoder import decode, encode
from ldm.models.discriminator import PatchDiscriminator

REAL, FAKE = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [1.0, -0.5]])


def make_images(seed=0, size=32):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class TestAdversarialLoss:
    def test_hinge_by_hand(self):
        # relu(1 - real) = 0, 0.5, 2, 0; relu(1 + fake) = 0, 1, 2, 0.5
        assert Hinge().discriminator(REAL, FAKE) == pytest.approx((2.5 / 4 + 3.5 / 4) / 2)
        assert Hinge().generator(FAKE) == pytest.approx(2.5 / 4)
        assert Hinge().discriminator(torch.full((4,), 1.0), torch.full((4,), -1.0)) == 0

    @pytest.mark.parametrize("loss", [NonSaturating(), Vanilla()])
    def test_the_discriminator_s_cross_entropy_is_that_of_the_logits(self, loss):
        bce, ones, zeros = nn.functional.binary_cross_entropy_with_logits, torch.ones(2, 2), torch.zeros(2, 2)
        torch.testing.assert_close(loss.discriminator(REAL, FAKE), (bce(REAL, ones) + bce(FAKE, zeros)) / 2)

    def test_the_generator_s_loss_from_the_probabilities(self):
        probability = FAKE.sigmoid()
        torch.testing.assert_close(NonSaturating().generator(FAKE), -probability.log().mean())
        torch.testing.assert_close(Vanilla().generator(FAKE), (1 - probability).log().mean())

    @pytest.mark.parametrize("loss", [Hinge(), NonSaturating(), Vanilla()])
    def test_each_side_pulls_the_logits_in_its_direction(self, loss):
        real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
        of_real, of_fake = torch.autograd.grad(loss.discriminator(real, fake), (real, fake))
        assert (of_real < 0).all() and (of_fake > 0).all()  # descent raises real logits and lowers fake ones
        (of_fake,) = torch.autograd.grad(loss.generator(fake), fake)
        assert (of_fake < 0).all()

    @pytest.mark.parametrize("loss, lost, won", [(Hinge(), -1, -1), (NonSaturating(), -1, 0), (Vanilla(), 0, -1)])
    def test_the_generator_s_gradient_far_from_the_boundary(self, loss, lost, won):
        """Where the discriminator is right (``lost``) only the minimax loss has no gradient."""
        for logit, slope in ((-80.0, lost), (80.0, won)):
            fake = torch.tensor([logit], requires_grad=True)
            (gradient,) = torch.autograd.grad(loss.generator(fake), fake)
            assert gradient.item() == pytest.approx(slope, abs=1e-6)

    @pytest.mark.parametrize("loss", [Hinge(), NonSaturating(), Vanilla()])
    def test_extreme_logits_stay_finite(self, loss):
        for logit in (-1e4, 1e4):
            fake = torch.tensor([logit])
            assert loss.generator(fake).isfinite() and loss.discriminator(-fake, fake).isfinite()


class TestLeCam:
    def test_two_batches_by_hand(self):
        lecam = LeCam(weight=0.5, decay=0.75)
        # against averages of 0: relu(3)² and relu(-1)² over two; relu(2)² and relu(-1)² over two
        assert lecam(torch.tensor([3.0, -1.0]), torch.tensor([-2.0, 1.0])) == pytest.approx(0.5 * (4.5 + 2.0))
        assert lecam.real == pytest.approx(0.25 * 1.0) and lecam.fake == pytest.approx(0.25 * -0.5)
        # D(x) − ᾱ_fake = 1.125, ᾱ_real − D(x̂) = 0.75
        assert lecam(torch.tensor([1.0]), torch.tensor([-0.5])) == pytest.approx(0.5 * (1.125**2 + 0.75**2))
        assert lecam.real == pytest.approx(0.75 * 0.25 + 0.25) and lecam.fake == pytest.approx(0.75 * -0.125 - 0.125)

    def test_the_averages_become_those_of_steady_logits(self):
        lecam = LeCam(weight=1.0)
        for _ in range(1000):
            lecam(REAL, FAKE)
        torch.testing.assert_close((lecam.real, lecam.fake), (REAL.mean(), FAKE.mean()), rtol=1e-3, atol=0)

    def test_it_pulls_logits_together_and_its_averages_carry_no_gradient(self):
        lecam = LeCam(weight=1.0)
        real, fake = torch.ones(3, requires_grad=True), -torch.ones(3)
        fake.requires_grad_()
        lecam(real, fake)  # so that the averages hold the first logits
        of_real, of_fake = torch.autograd.grad(lecam(real, fake), (real, fake))
        assert (of_real > 0).all() and (of_fake < 0).all()
        assert not lecam.real.requires_grad and not lecam.fake.requires_grad

    def test_its_averages_are_in_checkpoints(self):
        lecam, again = LeCam(weight=1.0), LeCam(weight=1.0)
        lecam(REAL, FAKE)
        again.load_state_dict(lecam.state_dict())
        assert set(lecam.state_dict()) == {"real", "fake"} and again.real == lecam.real != 0
        assert again(REAL, FAKE) == lecam(REAL, FAKE)


class Linear(nn.Module):
    """D(x) = ⟨w, x⟩, its gradient w everywhere; two logits of one mean for each image."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, size, size, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        logit = (images * self.weight).flatten(1).sum(1)
        return torch.stack((logit - 1, logit + 1), 1)


class TestGradientPenalty:
    @pytest.mark.parametrize("every", [1, 16])
    def test_of_a_linear_discriminator_it_is_the_closed_form(self, every):
        """½γ‖w‖² · every, whatever the images, and its gradient γ·w · every."""
        discriminator = Linear(4)
        penalty = GradientPenalty(3.0, every)(discriminator, make_images(size=4))
        torch.testing.assert_close(penalty, 1.5 * every * discriminator.weight.detach().square().sum())
        penalty.backward()
        torch.testing.assert_close(discriminator.weight.grad, 3.0 * every * discriminator.weight.detach())

    def test_it_is_the_gradient_s_square_by_finite_differences(self):
        torch.manual_seed(0)
        discriminator, images = PatchDiscriminator(4, 1).eval(), make_images(size=8)[:1]
        penalty, step = GradientPenalty(2.0, 1)(discriminator, images), 1e-4
        discriminator.double()
        steps = step * torch.eye(images.numel(), dtype=torch.float64).view(-1, *images.shape[1:])
        with torch.no_grad():
            above, below = (discriminator(images + sign * steps).flatten(1).mean(1) for sign in (1, -1))
        assert penalty.item() == pytest.approx(((above - below) / (2 * step)).square().sum().item(), rel=1e-3)

    def test_it_is_due_every_so_many_batches_and_never_without_a_gamma(self):
        assert [batch for batch in range(40) if GradientPenalty(1.0, 16).due(batch)] == [0, 16, 32]
        assert all(GradientPenalty(1.0, 1).due(batch) for batch in range(5))
        assert not any(GradientPenalty(0.0, 16).due(batch) for batch in range(40))
        with pytest.raises(UsageError, match="GradientPenalty: every is 0; give 1 or more"):
            GradientPenalty(1.0, 0)

    def test_descent_on_it_flattens_a_patch_discriminator_through_its_spectral_norms(self):
        torch.manual_seed(0)
        discriminator, images, penalty = PatchDiscriminator(8, 2), make_images(), GradientPenalty(1.0, 1)
        optimiser = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
        before = {name: weight.detach().clone() for name, weight in discriminator.named_parameters()}
        values = []
        for _ in range(20):
            optimiser.zero_grad()
            values.append(penalty(discriminator, images))
            values[-1].backward()
            optimiser.step()
        assert values[-1] < values[0] / 2
        moved = {name for name, weight in discriminator.named_parameters() if not torch.equal(weight, before[name])}
        assert moved >= {name for name in before if "weight" in name}
        assert images.grad is None and not images.requires_grad

    def test_it_stays_fp32_under_bf16_autocast(self):
        torch.manual_seed(0)
        discriminator, images = PatchDiscriminator(8, 2).eval(), make_images()
        expected = GradientPenalty(1.0, 1)(discriminator, images)
        with torch.autocast("cpu", torch.bfloat16):
            assert discriminator(images).dtype == torch.bfloat16  # so that a cast of the weights is in autocast's cache
            penalty = GradientPenalty(1.0, 1)(discriminator, images.bfloat16().float())
            assert torch.equal(GradientPenalty(1.0, 1)(discriminator, images), expected)
        assert penalty.dtype == torch.float32


class TestAdaptiveWeight:
    GRADIENTS = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.6, 0.0], [0.0, 0.8]])

    def test_it_is_the_ratio_of_the_norms(self):
        assert adaptive_weight(*self.GRADIENTS) == pytest.approx(5 / (1 + 1e-4))
        assert adaptive_weight(torch.zeros(3), self.GRADIENTS[1]) == 0

    def test_the_weighted_gradient_is_the_same_whatever_the_scale_of_the_logits(self):
        by_reconstruction, by_generator = self.GRADIENTS
        for scale in (0.1, 1.0, 1000.0):
            weighted = adaptive_weight(by_reconstruction, scale * by_generator) * scale * by_generator
            torch.testing.assert_close(weighted, 5 * by_generator, rtol=2e-3, atol=0)

    def test_it_is_bounded(self):
        silent = torch.zeros(2, 2)
        assert adaptive_weight(self.GRADIENTS[0], silent) == 1e4
        assert adaptive_weight(1e6 * self.GRADIENTS[0], silent) == 1e4
        by_reconstruction, by_generator = self.GRADIENTS
        assert adaptive_weight(by_reconstruction, by_generator, limit=2.0) == 2

    def test_no_gradient_flows_through_it(self):
        by_reconstruction, by_generator = (gradient.clone().requires_grad_() for gradient in self.GRADIENTS)
        assert not adaptive_weight(by_reconstruction, by_generator).requires_grad

    @pytest.mark.parametrize("game, limit", [(NonSaturating(), 1e4), (Hinge(), 0.5)])
    def test_one_backward_from_the_reconstruction_gives_the_full_gradient(self, tiny_autoencoder, randomised, game, limit):
        """Backward to the reconstruction, ratio at the last layer by vector-Jacobian products, one through the decoder:
        every parameter's gradient is that of the full loss, in double precision."""
        autoencoder = randomised(tiny_autoencoder).double()
        discriminator = PatchDiscriminator(8, 2).double().eval()
        perceptual, reconstruction = PerceptualLoss("alex", "random").double(), ReconstructionLoss()
        last_layer, images, noise = (
            autoencoder.decoder.conv_out.weight,
            make_images().double(),
            torch.randn(2, 4, 16, 16).double(),
        )

        def decoded():
            posterior = encode(autoencoder, images)
            return posterior.kl().mean(), decode(autoencoder, posterior.mean + posterior.std * noise)

        def error(output):
            return reconstruction(output, images) + 2 * perceptual(output, images)

        def gradients(loss):
            return torch.autograd.grad(loss, list(autoencoder.parameters()))

        kl, output = decoded()
        generator = game.generator(discriminator(output))
        at_last = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (error(output), generator)]
        weight = (at_last[0].norm() / (at_last[1].norm() + 1e-4)).clamp(max=limit)
        textbook = gradients(error(output) + 0.5 * weight * generator + 1e-6 * kl)

        kl, output = decoded()
        leaf = output.detach().requires_grad_()
        by_error, by_generator = (
            torch.autograd.grad(loss, leaf)[0] for loss in (error(leaf), game.generator(discriminator(leaf)))
        )
        error_at_last, generator_at_last = (
            torch.autograd.grad(output, last_layer, by, retain_graph=True)[0] for by in (by_error, by_generator)
        )
        gradient = by_error + 0.5 * adaptive_weight(error_at_last, generator_at_last, limit) * by_generator
        ours = gradients((gradient * output).sum() + 1e-6 * kl)

        assert all(value.abs().max() > 0 for value in textbook)
        torch.testing.assert_close(ours, textbook, rtol=1e-9, atol=1e-12)
