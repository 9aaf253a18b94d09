"""Adversarial losses of discriminator and generator, on logits that are larger for real images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UsageError


class AdversarialLoss(ABC):
    """A pair of losses on logits of any shape."""

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's loss, a scalar."""

    @abstractmethod
    def generator(self, fake: Tensor) -> Tensor:
        """The generator's (here the decoder's) loss, a scalar."""


class Hinge(AdversarialLoss):
    """D: ½[relu(1 − D(x)) + relu(1 + D(x̂))], G: −D(x̂) (Lim & Ye 2017, arXiv 1705.02894)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.mean()


class NonSaturating(AdversarialLoss):
    """D: ½[softplus(−D(x)) + softplus(D(x̂))], G: softplus(−D(x̂)) (Goodfellow et al. 2014, section 3)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2

    def generator(self, fake: Tensor) -> Tensor:
        return F.softplus(-fake).mean()


class Vanilla(NonSaturating):
    """The minimax loss: D as in :class:`NonSaturating`, G: ln(1 − sigmoid(D(x̂))) (Goodfellow et al. 2014, eq. 1).

    For study: the generator's gradient vanishes where the discriminator is right.
    """

    def generator(self, fake: Tensor) -> Tensor:
        return -F.softplus(fake).mean()


@final
class LeCam(nn.Module):
    """relu(D(x) − ᾱ_fake)² + relu(ᾱ_real − D(x̂))², ᾱ moving averages of the logits (Tseng et al. 2021, arXiv 2104.03310).

    It regularises a discriminator trained on few images. The relu is from the authors' code, not the paper: it exempts logits
    on the wrong side.
    """

    real: Tensor
    fake: Tensor

    def __init__(self, weight: float = 0.0, decay: float = 0.99):
        """
        Args:
            weight: in the discriminator's loss; 0 turns it off. The paper uses 0.01 to 0.3 for small datasets.
            decay: of the moving averages, per batch.
        """
        super().__init__()
        self.weight, self.decay = weight, decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The weighted penalty of one batch's logits; then the averages are updated with them."""
        penalty = F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()
        with torch.no_grad():
            for average, logits in ((self.real, real), (self.fake, fake)):
                average.lerp_(logits.mean().to(average), 1 - self.decay)
        return self.weight * penalty

    def averages(self) -> list[Tensor]:
        """The moving averages, linear in the logits; none where it is turned off."""
        return [self.real, self.fake] if self.weight else []


@final
class GradientPenalty:
    """R1: ½γ E‖∇ₓ D(x)‖² on real images (Mescheder et al. 2018, arXiv 1801.04406), lazily (Karras et al. 2020, 1912.04958).

    D(x) is the mean of an image's logits.
    """

    def __init__(self, gamma: float = 0.0, every: int = 16):
        """
        Args:
            gamma: 0 turns it off.
            every: apply the penalty once in so many batches, and multiply it by as much.
        """
        if every < 1:
            raise UsageError(f"GradientPenalty: every is {every}; give 1 or more")
        self.gamma, self.every = gamma, every

    def due(self, batch: int) -> bool:
        """Whether the penalty applies to the discriminator's batch of this number."""
        return self.gamma > 0 and batch % self.every == 0

    def __call__(self, discriminator: nn.Module, real: Tensor) -> Tensor:
        """The penalty on real images (B, 3, H, W), in fp32, which the second derivatives need."""
        # torch.compile has no second derivatives
        with torch.autocast(real.device.type, enabled=False), torch.compiler.set_stance("force_eager"):
            real = real.float().detach().requires_grad_()
            logits = discriminator(real).flatten(1).mean(1).sum()
            (gradient,) = torch.autograd.grad(logits, real, create_graph=True)
            return self.gamma / 2 * self.every * gradient.square().flatten(1).sum(1).mean()


def adaptive_weight(by_reconstruction: Tensor, by_generator: Tensor, limit: float = 1e4) -> Tensor:
    """‖∇ rec‖ / (‖∇ G‖ + 1e-4), at most ``limit`` (Esser et al. 2021, arXiv 2012.09841, eq. 7).

    Both gradients are taken at the decoder's last layer. The weight makes them equally large, whatever the scale of the logits.
    """
    return (by_reconstruction.norm() / (by_generator.norm() + 1e-4)).clamp(max=limit).detach()
