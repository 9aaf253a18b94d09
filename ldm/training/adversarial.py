"""The other player of stage one: the discriminator, when it trains, and how loudly the decoder hears it."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from ldm.losses import AdversarialLoss, GradientPenalty, Hinge, LeCam
from ldm.training.guard import ReconstructionGuard


@final
class AdversarialTraining(nn.Module):
    """A discriminator with its loss and its timetable, in batches.

    From ``start`` it trains; it is not heard for ``alone`` batches, because a discriminator that knows nothing yet has only
    noise to teach; then its weight rises linearly over ``warmup`` batches; and the guard lowers it where
    reconstructions suffer.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        loss: AdversarialLoss | None = None,
        weight: float = 0.5,
        start: int = 50_000,
        discriminator_warmup: int = 1_000,
        generator_ramp: int = 5_000,
        max_adaptive_weight: float = 1e4,
        guard: ReconstructionGuard | None = None,
        lecam: LeCam | None = None,
        gradient_penalty: GradientPenalty | None = None,
    ):
        """
        Args:
            discriminator: images (B, 3, H, W) -> logits, larger for real.
            loss: of the game (default: hinge).
            weight: of the adversarial loss, after its gradient was made as large as the reconstruction's.
            start: batch at which the discriminator begins to train.
            discriminator_warmup: batches that it trains before it is heard.
            warmup: batches over which its weight then rises from 0; 0 is as 1.
            max_adaptive_weight: bound on the factor between the two gradients.
            guard: what lowers the weight (default: with its own defaults).
            lecam, gradient_penalty: regularisers (default: none).
        """
        super().__init__()
        self.discriminator = discriminator
        self.loss = loss or Hinge()
        self.weight, self.start, self.discriminator_warmup, self.generator_ramp = (
            weight,
            start,
            discriminator_warmup,
            generator_ramp,
        )
        self.max_adaptive_weight = max_adaptive_weight
        self.guard = guard or ReconstructionGuard()
        self.lecam = lecam or LeCam()
        self.gradient_penalty = gradient_penalty or GradientPenalty()

    def trains(self, step: int) -> bool:
        """Whether the discriminator trains on this batch."""
        return step >= self.start

    def ramp(self, step: int) -> float:
        """How much of the weight the timetable allows at this batch, 0 to 1."""
        heard = step - self.start - self.discriminator_warmup
        return min(max(heard / max(self.generator_ramp, 1), 0.0), 1.0)

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """What the decoder minimises. The discriminator judges and learns nothing, not even its spectral norms' estimates."""
        was_training = self.discriminator.training
        learning = [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]
        self.discriminator.eval().requires_grad_(False)
        try:
            return self.loss.generator(self.discriminator(reconstruction).float())
        finally:
            self.discriminator.train(was_training)
            for parameter in learning:
                parameter.requires_grad_()

    def discriminator_loss(self, real: Tensor, fake: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What the discriminator minimises on real images and detached reconstructions, and its accuracy, 0 to 1."""
        real_logits, fake_logits = self.discriminator(real).float(), self.discriminator(fake.detach()).float()
        loss = self.loss.discriminator(real_logits, fake_logits)
        if self.lecam.weight:
            loss = loss + self.lecam(real_logits, fake_logits)
        if self.gradient_penalty.due(step - self.start):
            loss = loss + self.gradient_penalty(self.discriminator, real)
        with torch.no_grad():
            accuracy = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
        return loss, accuracy
