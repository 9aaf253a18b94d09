"""The losses of stage one. Networks are arguments; pictures are (B, 3, H, W) in [−1, 1]; each loss is a mean.

The KL term is counted in nats *per pixel value*, as the reconstruction is, so that a weight of 1e-6 means here what it
means in latent diffusion (Rombach et al. 2022), where both are sums over a picture.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import lpips
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from ldm.errors import UsageError, first_line

ADAPTIVE_WEIGHT_LIMIT = 1e4  # Esser et al. 2021, arXiv 2012.09841


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


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924): distance between two pictures in a frozen network's features.

    The package ``lpips`` carries the linear heads; the trunk is torchvision's and a download of its own.
    """

    def __init__(self, trunk: Literal["vgg", "alex", "squeeze"] = "vgg", weights: str = "pretrained"):
        """
        Args:
            trunk: the network that gives the features.
            weights: ``pretrained`` (torchvision's cache or download), ``random`` (offline; a fixed seed, so that figures of
                two runs can be compared; not the published metric), or the path of a torchvision checkpoint.

        Raises:
            UsageError: when the weights cannot be had.
        """
        super().__init__()
        self.description = f"LPIPS ({trunk}, {'random trunk' if weights == 'random' else weights})"
        if weights == "pretrained":
            try:
                self.network = lpips.LPIPS(net=trunk, verbose=False)
            except (OSError, RuntimeError) as error:
                raise UsageError(
                    f"the pretrained {trunk} trunk of LPIPS cannot be had ({first_line(error)}); set "
                    "model.perceptual.init_args.weights to the path of torchvision's checkpoint, or to 'random'"
                ) from error
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.network = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
            if weights != "random":
                _load_trunk(self.network.net, Path(weights))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PerceptualLoss:
        """A frozen metric: its dropout stays off while the stage trains."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Mean distance of the batch, a scalar."""
        return self.network(reconstruction, images).mean()


def _load_trunk(trunk: nn.Module, checkpoint: Path) -> None:
    """Load a torchvision classifier's convolutions; lpips cuts them into slices but keeps their numbers."""
    if not checkpoint.is_file():
        raise UsageError(f"{checkpoint} does not exist; model.perceptual.init_args.weights needs a torchvision checkpoint")
    try:
        weights = torch.load(checkpoint, weights_only=True, map_location="cpu")
        trunk.load_state_dict({name: weights["features." + name.split(".", 1)[1]] for name in trunk.state_dict()})
    except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"{checkpoint} is not the checkpoint of this LPIPS trunk; give torchvision's own") from error


def kl_per_pixel_value(posterior: DiagonalGaussianDistribution, images: Tensor) -> Tensor:
    """KL(q(z|x) ‖ N(0, I)) = ½ Σ(μ² + σ² − 1 − ln σ²) (Kingma & Welling 2014), over the number of pixel values."""
    return posterior.kl().sum() / images.numel()


class AdversarialLoss(ABC):
    """The game between the discriminator and the decoder, on logits that are larger for real pictures."""

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the discriminator minimises."""

    @abstractmethod
    def generator(self, fake: Tensor) -> Tensor:
        """What the decoder minimises."""


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


def adaptive_weight(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """‖∇ rec‖ / (‖∇ G‖ + 1e-4) at the decoder's last layer, clamped, without gradient (Esser et al. 2021, eq. 7).

    It keeps the adversarial gradient as large as the reconstruction's, whatever the scale of the logits.
    """
    (by_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (by_generator,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    weight = by_reconstruction.norm() / (by_generator.norm() + 1e-4)
    return weight.clamp(max=ADAPTIVE_WEIGHT_LIMIT).detach()
