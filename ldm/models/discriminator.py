"""The patch discriminator of PatchGAN (Isola et al. 2017, arXiv 1611.07004)."""

from __future__ import annotations

from math import gcd
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ldm.errors import UsageError


class PatchDiscriminator(nn.Module):
    """Strided convolutions that give one logit per patch; larger for real.

    The original uses batch normalisation, with which an image's logits depend on the rest of its batch: batch statistics alone
    then separate real from reconstructed batches, and processes disagree. Spectral normalisation (Miyato et al. 2018, arXiv
    1802.05957) or group normalisation (Wu & He 2018, arXiv 1803.08494) takes its place, in every layer but the first.
    """

    def __init__(self, width: int = 64, num_layers: int = 3, norm: Literal["spectral", "group", "none"] = "spectral"):
        """
        Args:
            width: channels of the first layer; they double per layer, up to eight times as many.
            num_layers: layers of stride 2; the receptive field is 70 pixels with 3, 34 with 2.
            norm: ``spectral`` constrains the weights; ``group`` normalises by statistics of the whole image, 8 channels at a
                time, so that a logit depends a little on the image outside its receptive field.
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
        """The shortest side in pixels that gives a logit: the strided layers leave 3, of which two convolutions take 2."""
        return 3 * 2**self.num_layers

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] -> logits (B, 1, h, w). Raises UsageError if a side is shorter than
        :attr:`smallest_side`."""
        height, width = images.shape[-2:]
        if min(height, width) < self.smallest_side:
            raise UsageError(
                f"PatchDiscriminator with num_layers {self.num_layers} has no logit for images of {width} x {height}, below "
                f"{self.smallest_side} a side; lower num_layers or give larger images"
            )
        return self.layers(images)
