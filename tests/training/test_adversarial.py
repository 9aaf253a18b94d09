"""The adversarial loss: its schedule, what it leaves unchanged, and stage one's gradient against the textbook's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.data.datamodule import ShardDataModule
from ldm.losses.adversarial import AdversarialLoss, GradientPenalty, Hinge, LeCam, NonSaturating
from ldm.losses.perceptual import PerceptualLoss
from ldm.losses.reconstruction import ReconstructionLoss, kl_per_pixel_value
from ldm.models.autoencoder import AutoencoderConfig, decode, encode, pixels_to_images
from ldm.models.discriminator import PatchDiscriminator
from ldm.training.adversarial import AdversarialTraining, ReconstructionGuard
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.optimiser import MuonConfig, OptimiserConfig
from tests.tiny import make_trainer


def make(**settings: Any) -> AdversarialTraining:
    torch.manual_seed(0)
    return AdversarialTraining(PatchDiscriminator(8, 2), **settings)


def make_images(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Same(nn.Module):
    """A discriminator whose logits are what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.bias


class TestSchedule:
    def test_the_discriminator_warms_up_and_then_the_weight_rises_linearly(self) -> None:
        adversary = make(start=10, discriminator_warmup=5, generator_ramp=4)
        assert [step for step in range(30) if adversary.trains(step)] == list(range(10, 30))
        assert [adversary.ramp(step) for step in (0, 9, 10, 15)] == [0, 0, 0, 0]
        assert [adversary.ramp(step) for step in range(16, 20)] == [0.25, 0.5, 0.75, 1]
        assert adversary.ramp(10**9) == 1

    def test_without_warmup_and_ramp_the_weight_is_full_after_the_first_step(self) -> None:
        adversary = make(start=0, discriminator_warmup=0, generator_ramp=0)
        assert [adversary.ramp(step) for step in range(3)] == [0, 1, 1]


class TestGeneratorLoss:
    @pytest.mark.parametrize("loss", [Hinge(), NonSaturating()])
    def test_it_is_the_loss_of_the_discriminator_in_evaluation_mode(self, loss: AdversarialLoss) -> None:
        adversary = make(loss=loss)
        with torch.no_grad():
            expected = loss.generator(adversary.discriminator.eval()(make_images()))
        adversary.discriminator.train()
        torch.testing.assert_close(adversary.generator_loss(make_images()), expected)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    def test_it_leaves_the_discriminator_unchanged(self, training: bool, precision: torch.dtype) -> None:
        adversary = make()
        discriminator = adversary.discriminator.train(training)
        frozen = next(discriminator.parameters()).requires_grad_(False)
        before, reconstruction = state(discriminator), make_images().requires_grad_()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = adversary.generator_loss(reconstruction)
        loss.backward()
        assert gradient(reconstruction).abs().max() > 0 and loss.dtype == torch.float32
        assert same(state(discriminator), before)  # spectral norms' vectors too
        assert all(parameter.grad is None for parameter in discriminator.parameters())
        assert all(module.training is training for module in discriminator.modules())
        assert [p for p in discriminator.parameters() if not p.requires_grad] == [frozen]

    def test_so_does_a_failure(self) -> None:
        adversary = make()
        with pytest.raises(RuntimeError):
            adversary.generator_loss(torch.zeros(1, 5, 32, 32))
        assert adversary.discriminator.training and all(p.requires_grad for p in adversary.discriminator.parameters())


class TestDiscriminatorLoss:
    def test_the_decoder_gets_no_gradient(self) -> None:
        adversary, weight = make(), torch.ones((), requires_grad=True)
        loss, accuracy = adversary.discriminator_loss(make_images(0), weight * make_images(1), 0)
        loss.backward()
        assert weight.grad is None and not accuracy.requires_grad
        assert all(parameter.grad is not None for parameter in adversary.discriminator.parameters())

    @pytest.mark.parametrize(
        "real, fake, accuracy",
        [
            ([3.0, 1.0], [-1.0, -2.0], 1.0),
            ([-3.0, -1.0], [1.0, 2.0], 0.0),
            ([3.0, -1.0], [-1.0, -2.0], 0.75),
            ([0.0], [0.0], 0.0),
        ],
    )
    def test_accuracy_is_the_mean_over_real_and_fake(self, real: list[float], fake: list[float], accuracy: float) -> None:
        assert AdversarialTraining(Same()).discriminator_loss(torch.tensor(real), torch.tensor(fake), 0)[1] == accuracy

    def test_terms_add_up(self) -> None:
        real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.5]])
        hinge = Hinge().discriminator(real, fake).item()
        lecam = 0.1 * ((4 + 0.25) / 2 + 9 / 2)  # averages are 0 yet
        penalty = 2.0 / 2 * 4 * (0.5**2 + 0.5**2)  # the mean of two logits
        adversary = AdversarialTraining(Same(), start=7, lecam=LeCam(0.1), gradient_penalty=GradientPenalty(2.0, 4))
        assert adversary.discriminator_loss(real, fake, 7)[0].item() == pytest.approx(hinge + lecam + penalty)
        without = AdversarialTraining(Same(), start=7, lecam=LeCam(0.1), gradient_penalty=GradientPenalty(2.0, 4))
        assert without.discriminator_loss(real, fake, 8)[0].item() == pytest.approx(hinge + lecam)
        assert AdversarialTraining(Same()).discriminator_loss(real, fake, 0)[0].item() == pytest.approx(hinge)

    def test_the_penalty_is_due_from_the_start_on(self) -> None:
        adversary = make(start=5, gradient_penalty=GradientPenalty(100.0, 3)).eval()
        losses = [adversary.discriminator_loss(make_images(0), make_images(1), step)[0].item() for step in range(5, 12)]
        assert [step for step, loss in enumerate(losses, 5) if loss > min(losses) + 1e-3] == [5, 8, 11]

    def test_its_state_is_all_that_a_resume_needs(self) -> None:
        adversary, again = (make(lecam=LeCam(0.1)) for _ in range(2))
        adversary.discriminator_loss(make_images(0), make_images(1), 0)
        adversary.guard.update(20.0, 0.3, active=False)
        again.load_state_dict(adversary.state_dict())
        losses = [each.discriminator_loss(make_images(2), make_images(3), 1)[0] for each in (adversary, again)]
        assert torch.equal(losses[0], losses[1]) and again.guard.best_psnr == 20


@pytest.mark.parametrize("limit", [1e4, 0.5])
def test_the_stage_s_gradient_is_that_of_the_full_loss(image_shards: Path, tmp_path: Path, limit: float) -> None:
    """A step with all losses against autograd of their sum, the adaptive weight computed by autograd at the last layer as in
    the paper (Esser et al. 2021, eq. 7)."""
    torch.manual_seed(0)
    guard = ReconstructionGuard()
    guard._level.fill_(0.7)
    module = AutoencoderTraining(
        autoencoder=AutoencoderConfig([8, 16], 4, 1, 4, True, 32),
        adversary=make(start=0, discriminator_warmup=0, generator_ramp=2, weight=0.8, max_adaptive_weight=limit, guard=guard),
        reconstruction=ReconstructionLoss(1.0, 0.5),
        perceptual=PerceptualLoss("alex", "random"),
        optimiser=MuonConfig(1e-3, max_grad_norm=1e9),
        discriminator_optimiser=OptimiserConfig(1e-3),
        perceptual_weight=2.0,
        kl_weight=1e-3,
        learn_variance=True,
    )
    autoencoder, adversary = module.autoencoder, module.adversary
    expected: dict[str, Tensor] = {}

    def textbook(batch: dict[str, Any], batch_idx: int) -> None:
        """Before a step: its gradients by the textbook, with the same noise."""
        assert module.variance is not None
        images, last_layer = pixels_to_images(batch["image"]), autoencoder.decoder.conv_out.weight
        posterior = encode(autoencoder, images)
        reconstruction = decode(autoencoder, posterior.mean + posterior.std * batch["posterior_noise"])
        error = module.reconstruction(reconstruction, images) + 2 * module.perceptual(reconstruction, images)
        faithful = module.variance(error)
        generator = -adversary.discriminator.eval()(reconstruction).mean()
        norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (faithful, generator)]
        weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, limit).detach()
        weight = 0.8 * min(module.global_step / 2, 1.0) * 0.7 * weight
        loss = faithful + weight * generator + 1e-3 * kl_per_pixel_value(posterior, images)
        names, parameters = zip(*learned(module), strict=True)
        expected.update(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        adversary.discriminator.train()

    module.on_train_batch_start = textbook
    trainer = make_trainer(tmp_path, 2, precision="32-true", limit_val_batches=0)
    trainer.fit(module, ShardDataModule(str(image_shards), str(image_shards), batch_size=4))

    ours = {name: gradient(parameter) for name, parameter in learned(module)}  # of the last step
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        # where the exact gradient is 0, as for the bias of attention's keys, it is rounding error here
        assert (ours[name] - value).norm() <= 1e-5 * max(value.norm(), 1e-4 * whole), name


def learned(module: AutoencoderTraining) -> list[tuple[str, nn.Parameter]]:
    assert module.variance is not None
    return [*module.autoencoder.named_parameters(), *module.variance.named_parameters()]
