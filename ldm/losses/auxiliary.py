"""Auxiliary losses of stage two: further terms of the denoiser's loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UsageError

if TYPE_CHECKING:
    from ldm.diffusion.objective import DenoisingLoss


class AuxiliaryLoss(nn.Module, ABC):
    """A term of stage two's loss, such as an alignment with another network's features or a dispersion of activations.

    Its parameters, if any, are trained with the denoiser's and saved in checkpoints.
    """

    def __init__(self, weight: float = 1.0, blocks: Iterable[int] = ()):
        """
        Args:
            weight: of the term in the loss.
            blocks: numbers of the denoiser's blocks, from 0, whose activations the term needs.
        """
        super().__init__()
        if weight < 0:
            raise UsageError(f"{type(self).__name__}: weight is {weight:g}; give 0 or more")
        self.weight, self.blocks = weight, tuple(blocks)

    @abstractmethod
    def forward(self, activations: Mapping[int, Tensor], batch: Mapping[str, Any], output: DenoisingLoss) -> Tensor:
        """The term of one micro-batch, a scalar, without ``weight``.

        Args:
            activations: block number -> that block's output (B, N, D).
            batch: the samples as the loader gives them.
            output: the objective's: prediction and target (B, C, H, W), times and losses (B,).
        """


class DirectionLoss(AuxiliaryLoss):
    """1 − cos(ŷ, y) over the channels of a latent pixel, averaged over all pixels (Yao et al. 2025, arXiv 2501.01423).

    The paper applies it to the velocity; here it compares whatever the denoiser predicts.
    """

    def forward(self, activations: Mapping[int, Tensor], batch: Mapping[str, Any], output: DenoisingLoss) -> Tensor:
        # The lower bound on the length, as a share of the target's, bounds the gradient where the denoiser starts from zero.
        length = output.target.norm(dim=1, keepdim=True).clamp(min=1e-6)  # (B, 1, H, W)
        return 1 - F.cosine_similarity(output.prediction / length, output.target / length, dim=1, eps=0.1).mean()


def names_of(losses: Iterable[nn.Module]) -> list[str]:
    """A name for each in the logs: its class, with a number from the second of a class on."""
    seen: Counter[str] = Counter()
    names = []
    for loss in losses:
        name = type(loss).__name__
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names
