"""What keeps the discriminator from wrecking reconstructions: it is heard less when they get worse."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from ldm.errors import UsageError

# So quiet is as good as silent, and from here a level finds its way back; from 0 it never would.
LOWEST_LEVEL = 1e-3


@final
class ReconstructionGuard(nn.Module):
    """A factor on the adversarial weight, moved at each validation.

    Reconstructions are worse when PSNR or LPIPS falls short of the best seen so far by more than agreed, or is no number. Then
    the factor is lowered; once they are as good again, it is raised step by step, but held while the discriminator knows
    nearly every patch: what it then says is noise, which the adaptive weight makes loud. Its state lies in buffers, and so in
    checkpoints.
    """

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
            max_psnr_loss: dB below the best validation so far that are borne.
            max_lpips_rise: share by which LPIPS may be above the best validation so far.
            max_accuracy: share of patches that the discriminator may tell apart, on average of late.
            lower: what the level is multiplied with when reconstructions are worse; it stays above 0.
            higher: and while they are not; never above 1.
            enabled: off, the level is 1.

        Raises:
            UsageError: where ``lower`` does not lower or ``higher`` does not raise.
        """
        super().__init__()
        if not 0 < lower < 1 < higher:
            raise UsageError(f"model.adversary.guard.lower {lower} must lie between 0 and 1, and higher {higher} above 1")
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
        """Count one batch's share of patches told apart."""
        self.accuracy.lerp_(accuracy.detach().to(self.accuracy), 1 - decay)

    def judge(self, psnr: float, lpips: float, heard: bool) -> str | None:
        """One validation: PSNR in dB and LPIPS. Returns what was done about the level and why; None: nothing.

        Before the discriminator is ``heard`` the figures only set the mark.
        """
        said = None
        if self.enabled and heard:
            losses = []
            # PSNR is infinite where a flat image is met exactly, which is no loss
            if psnr != math.inf and not (math.isfinite(psnr) and psnr >= self.best_psnr - self.max_psnr_loss):
                losses.append(f"PSNR {psnr:.2f} dB (best: {self.best_psnr:.2f})")
            if not (math.isfinite(lpips) and lpips <= self.best_lpips * (1 + self.max_lpips_rise)):
                losses.append(f"LPIPS {lpips:.4f} (best: {self.best_lpips:.4f})")
            if losses:
                self._level.mul_(self.lower).clamp_(min=LOWEST_LEVEL)
                said = f"{' and '.join(losses)}: the discriminator's weight goes down to {self.level:.3g} of what was asked"
            elif self.level < 1 and self.accuracy > self.max_accuracy:
                said = f"the discriminator knows {self.accuracy:.0%} of all patches: its weight is held at {self.level:.3g}"
            elif self.level < 1:
                self._level.mul_(self.higher).clamp_(max=1)
                said = (
                    f"reconstructions are good again: the discriminator's weight goes up to {self.level:.3g} of what was asked"
                )
        if math.isfinite(psnr):
            self.best_psnr.clamp_(min=psnr)
        if math.isfinite(lpips):
            self.best_lpips.clamp_(max=lpips)
        return said
