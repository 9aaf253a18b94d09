"""How near the reconstruction is, and how near the posterior is to a unit Gaussian.

Both are counted *per pixel value*, so that a KL weight of 1e-6 means here what it means in latent diffusion (Rombach et al.
2022), where both are sums over an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn


class ReconstructionLoss:
    """``l1``·mean|x̂ − x| + ``l2``·mean(x̂ − x)².

    Mean square finds the colours of small objects on flat grounds sooner; mean absolute keeps edges sharper later.
    """

    def __init__(self, l1: float = 1.0, l2: float = 0.0):
        self.l1, self.l2 = l1, l2

    def __call__(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        loss = reconstruction.new_zeros(())
        if self.l1:
            loss = loss + self.l1 * F.l1_loss(reconstruction, images)
        if self.l2:
            loss = loss + self.l2 * F.mse_loss(reconstruction, images)
        return loss


@dataclass
class WeightedLoss:
    """A further loss of stage one.

    Attributes:
        loss: (reconstruction, target), each (B, 3, H, W) in [−1, 1], -> scalar: any module, of torch.nn or of your own. Its
            parameters, if it has any, are trained with the autoencoder's and kept in checkpoints.
        weight: in the sum of the losses.
    """

    loss: nn.Module
    weight: float = 1.0


class LearnedVariance(nn.Module):
    """error·exp(−s) + s, s = ln σ² learned: the likelihood of the image decides what the error weighs against the KL.

    Minimal where σ² is the error itself (Rybkin et al. 2021, arXiv 2006.13202, eq. 3 up to constants; latent diffusion's
    ``logvar``).
    """

    def __init__(self, log_variance: float = 0.0):
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor(float(log_variance)))

    def forward(self, error: Tensor) -> Tensor:
        return error * torch.exp(-self.log_variance) + self.log_variance


def kl_per_pixel_value(posterior: DiagonalGaussianDistribution, images: Tensor) -> Tensor:
    """KL(q(z|x) ‖ N(0, I)) = ½ Σ(μ² + σ² − 1 − ln σ²) (Kingma & Welling 2014), over the number of pixel values."""
    return posterior.kl().sum() / images.numel()
