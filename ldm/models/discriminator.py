"""The patch discriminator of PatchGAN (Isola et al. 2017, arXiv 1611.07004): real or not, patch by patch."""

from __future__ import annotations

from math import gcd
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ldm.errors import UsageError


class PatchDiscriminator(nn.Module):
    """Strided convolutions that give one logit per patch; larger for real.

    The original normalises by batch, which lets an image's logits depend on the others: real and reconstructed batches can
    then be told apart by their statistics alone, and ranks differ. Here images are judged one by one, by spectral
    normalisation (Miyato et al. 2018, arXiv 1802.05957) or group normalisation (Wu & He 2018, arXiv 1803.08494), which stand
    where the batch's did: not at the first layer.
    """

    def __init__(self, width: int = 64, num_layers: int = 3, norm: Literal["spectral", "group", "none"] = "spectral"):
        """
        Args:
            width: channels of the first layer; they double per layer, up to eight times.
            num_layers: halvings; the receptive field of the convolutions is 70 pixels with 3, 34 with 2.
            norm: ``spectral`` bounds the weights and looks at no image; ``group`` divides by what it measures over the whole
                image, 8 channels at a time, so that a logit also sees, through these figures, beyond its patch.
        """
        super().__init__()
        if width < 1 or num_layers < 1:
            raise UsageError(f"PatchDiscriminator: width {width} and num_layers {num_layers}; give 1 or more of both")
        self.num_layers = num_layers
        widths = [width * min(2**level, 8) for level in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, num_layers + 1):
            stride = 2 if level < num_layers else 1
            convolution = nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1)
            layers += [spectral_norm(convolution) if norm == "spectral" else convolution]
            if norm == "group":
                layers += [nn.GroupNorm(widths[level] // gcd(widths[level], 8), widths[level])]
            layers += [nn.LeakyReLU(0.2)]
        last = nn.Conv2d(widths[-1], 1, 4, padding=1)
        self.layers = nn.Sequential(*layers, spectral_norm(last) if norm == "spectral" else last)

    @property
    def smallest_side(self) -> int:
        """Pixels below which a side gives no logit: ``num_layers`` halvings leave 3, of which two convolutions take 2."""
        return 3 * 2**self.num_layers

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] -> logits (B, 1, h, w).

        Raises:
            UsageError: where a side is shorter than :attr:`smallest_side`.
        """
        height, width = images.shape[-2:]
        if min(height, width) < self.smallest_side:
            raise UsageError(
                f"PatchDiscriminator with num_layers {self.num_layers} has no logit for images of {width} x {height}, under "
                f"{self.smallest_side} a side; lower num_layers or give larger images"
            )
        return self.layers(images)
