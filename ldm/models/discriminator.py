"""The patch discriminator of PatchGAN (Isola et al. 2017, arXiv 1611.07004): real or not, patch by patch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Strided convolutions that give one logit per patch; larger for real.

    Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957) stands where the original has batch normalisation: it keeps
    no statistics, so that real and reconstructed batches cannot be told apart by them, nor ranks differ.
    """

    def __init__(self, width: int = 64, num_layers: int = 3):
        """
        Args:
            width: channels of the first layer; they double per layer, up to eight times.
            num_layers: halvings; the receptive field is 70 pixels with 3, 34 with 2.
        """
        super().__init__()
        widths = [width * min(2**level, 8) for level in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, num_layers + 1):
            stride = 2 if level < num_layers else 1
            convolution = nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1)
            layers += [spectral_norm(convolution), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, 4, padding=1)))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] -> logits (B, 1, h, w)."""
        return self.layers(images)
