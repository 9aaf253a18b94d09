"""Metrics of an autoencoder beside PSNR, SSIM and LPIPS: the health of its latents, and its reconstruction FID.

Both are torchmetrics: they accumulate over batches and over processes. Images are (B, 3, H, W) in [−1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.evaluation.features import load_feature_network

DEAD_BELOW = 0.01
# A spread of a thousandth of a channel's own size is below the precision of bf16 (2⁻⁸), and in float64 the fourth moment still
# has four digits of it.
CONSTANT_BELOW = 1e-3


class LatentHealth(Metric):
    """Whether latents are fit for a denoiser, by channel, over posteriors N(μ, σ²) of images of any size.

    All values of a channel have the same weight, so a large image weighs more than a small one. :meth:`compute` gives (C,):

    - ``mean``, ``std``: of latents *sampled* from the posteriors: E[z] = E[μ], Var[z] = E[μ²] + E[σ²] − E[μ]².
    - ``kl``: nats per latent value, E[½(μ² + σ² − 1 − ln σ²)] (Kingma & Welling 2014, arXiv 1312.6114, appendix B); 0 where
      the posterior is the prior, infinite without a posterior.
    - ``kurtosis``: E[(μ − E[μ])⁴] / Var[μ]² − 3; 0 for a Gaussian, −1.2 for a uniform density, large for rare strong values.
    - ``high_frequency``: the part of Σ|F|² at frequencies f with |f| > ¼ cycle per latent pixel, half of the Nyquist frequency
      counted radially; F is the discrete Fourier transform of each map of μ less its own mean. 0 for constant maps, about
      1 − π/16 = 0.80 for white noise. Latents with much of it are hard to denoise (arXiv 2502.14831).

    and the scalar ``dead``: how many channels carry no information about the image. As the active units of Burda et al. (2016,
    arXiv 1509.00519), whose Var[μ] over the data is above 0.01, but relative to the latent's own variance, which that paper's
    prior keeps near 1: a channel is dead where Var[μ] / (Var[μ] + E[σ²]) ≤ 0.01. The KL does not show it: a narrow posterior
    around a constant has a large one. A spread of μ under a thousandth of its root mean square counts as none.
    """

    full_state_update = False
    count: Tensor
    sums: Tensor

    def __init__(self, channels: int, **settings: Any):
        """
        Args:
            channels: C, of the latents.
            settings: torchmetrics' own.
        """
        super().__init__(**settings)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(8, channels, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> LatentHealth:
        """Stay on the CPU: not every device has float64."""
        return self

    def update(self, posterior: DiagonalGaussianDistribution) -> None:
        """Add the posteriors of one batch, (B, C, h, w)."""
        mean, variance, log_variance = (x.cpu().double() for x in (posterior.mean, posterior.var, posterior.logvar))
        if posterior.deterministic:
            log_variance = variance.log()
        square = mean.square()
        kl = 0.5 * (square + variance - 1 - log_variance)
        # orthonormal: the power summed over frequencies is the squared deviation summed over pixels
        spectrum = torch.fft.fft2(mean - mean.mean((2, 3), keepdim=True), norm="ortho")
        power = torch.view_as_real(spectrum).square().sum(-1)
        y, x = (torch.fft.fftfreq(side, dtype=mean.dtype, device=mean.device) for side in mean.shape[2:])
        high = power * (y[:, None].square() + x.square() > 0.25**2)
        values = (mean, square, square * mean, square.square(), variance, kl, power, high)
        self.sums += torch.stack([value.sum((0, 2, 3)) for value in values])
        self.count += mean[:, 0].numel()

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all batches: (C,) float64 each, and ``dead`` ()."""
        mean, square, cube, fourth, variance, kl, power, high = self.sums / self.count
        spread = square - mean**2
        noise_of_rounding = CONSTANT_BELOW**2 * square
        spread = torch.where(spread > noise_of_rounding, spread, 0)
        kurtosis = (fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4) / spread**2 - 3
        return {
            "mean": mean,
            "std": (spread + variance).sqrt(),
            "kl": kl,
            "kurtosis": torch.where(spread > 0, kurtosis, 0),
            "high_frequency": torch.where(power > noise_of_rounding, high / power, 0),
            "dead": (spread <= DEAD_BELOW * (spread + variance)).sum(),
        }


def health_scalars(health: dict[str, Tensor]) -> dict[str, float]:
    """What :meth:`LatentHealth.compute` gives, for a logger.

    ``latent_mean_00``, ``latent_std_00``, ``latent_kl_00`` and so on for every channel; ``latent_dead``; and averages over the
    channels: ``latent_kurtosis``, ``latent_high_frequency``.
    """
    scalars = {
        f"latent_{name}_{channel:02d}": value
        for name in ("mean", "std", "kl")
        for channel, value in enumerate(health[name].tolist())
    }
    return scalars | {f"latent_{name}": float(health[name].double().mean()) for name in ("dead", "kurtosis", "high_frequency")}


class ReconstructionFID(FrechetInceptionDistance):
    """Fréchet distance between the features of images and of their reconstructions (Heusel et al. 2017, arXiv 1706.08500).

    Values of different trunks, and of different numbers of images, cannot be compared; fewer images give a larger one (Chong &
    Forsyth 2020, arXiv 1911.07023).

    Attributes:
        name: for logs and files: ``rfid`` with Inception's features alone, else with the trunk in it, as
            ``rfid_alex_random`` or, with the first digits of the checkpoint's sha256, ``rfid_vgg_397923af``.
        description: the same in words.
    """

    def __init__(self, trunk: str):
        """
        Args:
            trunk: the network that gives the features, as :func:`ldm.evaluation.features.load_feature_network` takes it; with
                ``inception`` it is the published metric.

        Raises:
            UsageError: where the trunk is not available.
        """
        network = load_feature_network(trunk)
        # alone without a suffix, as the published metric is
        self.name, self.description = f"rfid_{network.name}".removesuffix("_inception"), f"rFID ({network.description})"
        # every process sees the same images and computes the whole metric
        super().__init__(feature=network, normalize=True, sync_on_compute=False)
        self.inception.register_forward_hook(lambda _, given, features: features.cpu())
        self.eval()

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> ReconstructionFID:
        """Only the trunk moves: not every device has the float64 of the sums."""
        self.inception._apply(fn, *args, **kwargs)
        return self

    def train(self, mode: bool = True) -> ReconstructionFID:
        """The trunk is frozen: it stays in evaluation mode while a module trains."""
        return super().train(False)

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images, (B, 3, H, W) in [−1, 1]: originals where ``real``, else reconstructions."""
        # bf16 has too few digits for a covariance
        with torch.autocast(imgs.device.type, enabled=False):
            super().update(imgs.float(), real)

    def compute(self) -> Tensor:
        """The distance, (); rounding can leave that of equal sets a little under 0."""
        return super().compute().clamp(min=0)
