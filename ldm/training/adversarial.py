"""The adversarial part of stage one: the discriminator, its schedule, and the guard over reconstructions."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.losses.adversarial import AdversarialLoss, GradientPenalty, Hinge, LeCam

# next to 0, but multiplying can raise it again
LOWEST_LEVEL = 1e-3


@final
class ReconstructionGuard(nn.Module):
    """A factor on the adversarial weight, the level, updated at each validation.

    Reconstructions count as worse when PSNR or LPIPS is not finite, or worse than the best so far by more than a limit. Then
    the level is lowered. Otherwise it is raised step by step, except while the discriminator classifies nearly all patches
    correctly: its gradient is then noise, which the adaptive weight amplifies. The state is in buffers, and so in checkpoints.
    """

    _level: Tensor
    best_psnr: Tensor
    best_lpips: Tensor
    accuracy: Tensor

    def __init__(
        self,
        max_psnr_loss: float = 0.3,
        max_lpips_rise: float = 0.05,
        max_accuracy: float = 0.95,
        lower: float = 0.5,
        higher: float = 1.25,
        enabled: bool = True,
    ):
        """
        Args:
            max_psnr_loss: how far in dB PSNR may be below its best.
            max_lpips_rise: by what fraction LPIPS may be above its best.
            max_accuracy: the discriminator's accuracy, a moving average from 0 to 1, above which the level is not raised.
            lower: factor on the level when reconstructions are worse; the level stays above 0.
            higher: factor on the level when they are not; the level never exceeds 1.
            enabled: if not, the level is always 1.

        Raises:
            UsageError: if ``lower`` does not lower or ``higher`` does not raise.
        """
        super().__init__()
        if not 0 < lower < 1 < higher:
            raise UsageError(f"the guard's lower {lower} must lie between 0 and 1, and its higher {higher} above 1")
        self.max_psnr_loss, self.max_lpips_rise, self.max_accuracy = max_psnr_loss, max_lpips_rise, max_accuracy
        self.lower, self.higher, self.enabled = lower, higher, enabled
        self.register_buffer("_level", torch.ones(()))
        self.register_buffer("best_psnr", torch.tensor(-torch.inf))
        self.register_buffer("best_lpips", torch.tensor(torch.inf))
        self.register_buffer("accuracy", torch.tensor(0.5))

    @property
    def level(self) -> Tensor:
        """The factor, a scalar from 0 to 1."""
        return self._level if self.enabled else torch.ones_like(self._level)

    def watch_discriminator(self, accuracy: Tensor, decay: float = 0.98) -> None:
        """Update the moving average of the accuracy, 0 to 1, with that of one batch."""
        self.accuracy.lerp_(accuracy.detach().to(self.accuracy), 1 - decay)

    def update(self, psnr: float, lpips: float, active: bool) -> str | None:
        """Update the level after a validation, with PSNR in dB and LPIPS. Returns a message if it has anything to say.

        Before the adversarial loss is ``active``, only the best values are updated.
        """
        message = None
        if self.enabled and active:
            losses = []
            # PSNR is infinite if a flat image is reconstructed exactly
            if psnr != math.inf and not (math.isfinite(psnr) and psnr >= self.best_psnr - self.max_psnr_loss):
                losses.append(f"PSNR {psnr:.2f} dB (best: {self.best_psnr:.2f})")
            if not (math.isfinite(lpips) and lpips <= self.best_lpips * (1 + self.max_lpips_rise)):
                losses.append(f"LPIPS {lpips:.4f} (best: {self.best_lpips:.4f})")
            if losses:
                self._level.mul_(self.lower).clamp_(min=LOWEST_LEVEL)
                message = f"{' and '.join(losses)}: the adversarial loss is lowered to {self.level:.3g}"
            elif self.level < 1 and self.accuracy > self.max_accuracy:
                message = (
                    f"the discriminator classifies {self.accuracy:.0%} of patches correctly: the adversarial loss is held at "
                    f"{self.level:.3g}"
                )
            elif self.level < 1:
                self._level.mul_(self.higher).clamp_(max=1)
                message = f"reconstructions are good again: the adversarial loss is raised to {self.level:.3g}"
        if math.isfinite(psnr):
            self.best_psnr.clamp_(min=psnr)
        if math.isfinite(lpips):
            self.best_lpips.clamp_(max=lpips)
        return message


@final
class AdversarialTraining(nn.Module):
    """A discriminator with its loss and its schedule, counted in steps.

    The discriminator trains from ``start`` on. The decoder's adversarial loss begins ``discriminator_warmup`` steps later,
    because the gradient of an untrained discriminator is noise, and its weight rises linearly over ``generator_ramp`` steps.
    The guard lowers the weight if reconstructions get worse.
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
            loss: of decoder and discriminator (default: hinge).
            weight: of the adversarial loss, whose gradient is first scaled to the size of the reconstruction loss's.
            start: step at which the discriminator begins to train.
            discriminator_warmup: steps that it trains before the decoder's adversarial loss begins.
            generator_ramp: steps over which the weight then rises from 0; 0 means the same as 1.
            max_adaptive_weight: upper bound of that scale.
            guard: lowers the weight (default: a guard with its defaults).
            lecam, gradient_penalty: regularisers of the discriminator (default: none).
        """
        super().__init__()
        self.discriminator = discriminator
        self.loss = loss or Hinge()
        self.start, self.discriminator_warmup, self.generator_ramp = start, discriminator_warmup, generator_ramp
        self.weight, self.max_adaptive_weight = weight, max_adaptive_weight
        self.guard = guard or ReconstructionGuard()
        self.lecam = lecam or LeCam()
        self.gradient_penalty = gradient_penalty or GradientPenalty()

    def trains(self, step: int) -> bool:
        """Whether the discriminator trains at this step."""
        return step >= self.start

    def ramp(self, step: int) -> float:
        """The schedule's factor on the weight at this step, 0 to 1."""
        active = step - self.start - self.discriminator_warmup
        return min(max(active / max(self.generator_ramp, 1), 0.0), 1.0)

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """The decoder's loss. It leaves the discriminator unchanged, its estimates of spectral norms included."""
        was_training = self.discriminator.training
        trained = [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]
        self.discriminator.eval().requires_grad_(False)
        try:
            return self.loss.generator(self.discriminator(reconstruction).float())
        finally:
            self.discriminator.train(was_training)
            for parameter in trained:
                parameter.requires_grad_()

    def discriminator_loss(self, real: Tensor, fake: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The discriminator's loss on real images and detached reconstructions, and its accuracy, 0 to 1."""
        real_logits, fake_logits = self.discriminator(real).float(), self.discriminator(fake.detach()).float()
        loss = self.loss.discriminator(real_logits, fake_logits)
        if self.lecam.weight:
            loss = loss + self.lecam(real_logits, fake_logits)
        if self.gradient_penalty.due(step - self.start):
            loss = loss + self.gradient_penalty(self.discriminator, real)
        with torch.no_grad():
            accuracy = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
        return loss, accuracy

    def copy_buffers(self) -> list[Tensor]:
        """Copies of what changes without an optimiser: estimates of spectral norms, averages of logits, the guard's state."""
        return [buffer.clone() for buffer in self.buffers()]

    def restore_buffers(self, copies: list[Tensor], void: Tensor) -> None:
        """Restore them if ``void``, a scalar, is not 0: a step that is skipped leaves no trace."""
        void = void > 0
        for buffer, copy in zip(self.buffers(), copies, strict=True):
            torch.where(void, copy, buffer, out=buffer)
