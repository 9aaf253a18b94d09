"""Auxiliary losses of stage two: further terms of the denoiser's loss, computed from activations of its blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ldm.diffusion.objective import DenoisingLoss


class AuxiliaryLoss(nn.Module, ABC):
    """A term of stage two's loss, such as an alignment with another network's features or a dispersion of activations.

    Its parameters, if it has any, are trained with the denoiser's and kept in checkpoints.

    Attributes:
        weight: of the term in the loss.
        blocks: numbers of the denoiser's blocks, from 0, whose outputs it needs; none by default, and then none are kept.
    """

    def __init__(self, weight: float = 1.0, blocks: Iterable[int] = ()):
        super().__init__()
        self.weight, self.blocks = weight, tuple(blocks)

    @abstractmethod
    def forward(self, activations: Mapping[int, Tensor], batch: Mapping[str, Any], output: DenoisingLoss) -> Tensor:
        """The term of one micro-batch, a scalar without ``weight``.

        Args:
            activations: block number -> that block's output (B, N, D).
            batch: the samples as the loader gives them.
            output: the objective's: prediction and target (B, C, H, W), t (B,), losses (B,).
        """


def names_of(losses: Iterable[nn.Module]) -> list[str]:
    """A name for each in the logs: its class's, with a number where a class comes again."""
    seen: Counter[str] = Counter()
    names = []
    for loss in losses:
        name = type(loss).__name__
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names
