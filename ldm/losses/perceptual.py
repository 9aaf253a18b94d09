"""LPIPS, with a choice of where the weights of its trunk come from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import lpips
import torch
from torch import Tensor, nn

from ldm.errors import UsageError, first_line

# side in pixels that suffices for every trunk; alex needs 31
ENOUGH = 32


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924): distance between two images in a frozen network's features.

    The package ``lpips`` contains the linear heads; the trunk is torchvision's and downloaded separately.
    """

    def __init__(self, trunk: Literal["vgg", "alex", "squeeze"] = "vgg", weights: str = "pretrained"):
        """
        Args:
            trunk: the network of the features.
            weights: ``pretrained`` (torchvision's cache or download), the path of a torchvision checkpoint, or ``random``: no
                download and always the same seed, but not the published metric.

        Raises:
            UsageError: if the weights cannot be loaded.
        """
        super().__init__()
        self.description = f"LPIPS ({trunk}, {'random trunk' if weights == 'random' else weights})"
        if weights == "pretrained":
            try:
                self.network = lpips.LPIPS(net=trunk, verbose=False)
            except (OSError, RuntimeError) as error:
                raise UsageError(
                    f"the pretrained {trunk} trunk of LPIPS cannot be loaded ({first_line(error)}); set the weights of "
                    "PerceptualLoss to the path of torchvision's checkpoint, or to 'random'"
                ) from error
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.network = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
            if weights != "random":
                _load_trunk(self.network.net, Path(weights))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stay in evaluation mode: the metric is frozen, and its dropout off, while a module around it trains."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Mean distance of the batch, a scalar. Raises :class:`UsageError` for images too small for the trunk."""
        try:
            return self.network(reconstruction, images).mean()
        except RuntimeError:
            height, width = images.shape[-2:]
            if min(height, width) >= ENOUGH:
                raise
            raise UsageError(
                f"{self.description} cannot take images of {width} x {height} pixels; give {ENOUGH} or more a side"
            ) from None


def _load_trunk(trunk: nn.Module, checkpoint: Path) -> None:
    """Load a torchvision classifier's convolutions; lpips splits them into slices but keeps their numbers."""
    if not os.path.isfile(checkpoint):
        raise UsageError(f"{checkpoint} does not exist; give PerceptualLoss the path of a torchvision checkpoint")
    try:
        weights = torch.load(checkpoint, weights_only=True, map_location="cpu")
        trunk.load_state_dict({name: weights["features." + name.split(".", 1)[1]] for name in trunk.state_dict()})
    except Exception as error:  # bytes that are not torch's make its readers raise anything
        raise UsageError(f"{checkpoint} is not a checkpoint of this LPIPS trunk; give torchvision's") from error
