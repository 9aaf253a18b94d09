"""LPIPS, with its trunk from where the user says."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import lpips
import torch
from torch import Tensor, nn

from ldm.errors import UsageError, first_line

# pixels a side that every trunk can do with; alex needs 31
ENOUGH = 32


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924): distance between two images in a frozen network's features.

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
        """Mean distance of the batch, a scalar. Raises :class:`UsageError` for images that shrink to nothing on the way."""
        try:
            return self.network(reconstruction, images).mean()
        except RuntimeError:
            height, width = images.shape[-2:]
            if min(height, width) >= ENOUGH:
                raise
            raise UsageError(
                f"{self.description} cannot look at images of {width} x {height} pixels; give larger ones ({ENOUGH} serve)"
            ) from None


def _load_trunk(trunk: nn.Module, checkpoint: Path) -> None:
    """Load a torchvision classifier's convolutions; lpips cuts them into slices but keeps their numbers."""
    if not checkpoint.is_file():
        raise UsageError(f"{checkpoint} does not exist; model.perceptual.init_args.weights needs a torchvision checkpoint")
    try:
        weights = torch.load(checkpoint, weights_only=True, map_location="cpu")
        trunk.load_state_dict({name: weights["features." + name.split(".", 1)[1]] for name in trunk.state_dict()})
    except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"{checkpoint} is not the checkpoint of this LPIPS trunk; give torchvision's own") from error
