"""What the network predicts: ``y = c(t)·x0 + d(t)·eps``. Every conversion is one 2×2 solve.

    [x_t]   [alpha sigma] [x0 ]
    [ y ] = [  c     d  ] [eps]

The determinant alpha·d − sigma·c must not vanish: an eps target says nothing of x0 where alpha = 0, an x0 target nothing
of eps where sigma = 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.path import Path, expand


class Endpoints(NamedTuple):
    """The data and the noise that a prediction implies, both (B, …)."""

    x0: Tensor
    eps: Tensor


class Prediction(ABC):
    """A choice of c(t) and d(t)."""

    @abstractmethod
    def coefficients(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        """c(t) and d(t), each (B,) for t of shape (B,)."""

    def target(self, path: Path, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should say, (B, …) like ``x0``."""
        c, d = self.coefficients(path, t)
        return expand(c, x0) * x0 + expand(d, eps) * eps

    def endpoints(self, path: Path, x_t: Tensor, y: Tensor, t: Tensor) -> Endpoints:
        """x0 and eps from a noisy ``x_t`` and a prediction ``y``.

        Raises:
            ValueError: where the two equations do not determine x0 and eps.
        """
        alpha, sigma = path.alpha(t), path.sigma(t)
        c, d = self.coefficients(path, t)
        determinant = alpha * d - sigma * c
        if (determinant.abs() < 1e-6).any():
            at = t[determinant.abs() < 1e-6][0].item()
            raise ValueError(f"{type(self).__name__} does not determine x0 and eps at t = {at:g} on this path")
        alpha, sigma, c, d, determinant = (expand(value, x_t) for value in (alpha, sigma, c, d, determinant))
        return Endpoints(x0=(d * x_t - sigma * y) / determinant, eps=(alpha * y - c * x_t) / determinant)


class Epsilon(Prediction):
    """The noise (Ho et al. 2020)."""

    def coefficients(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


class Sample(Prediction):
    """The data x0."""

    def coefficients(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)


class V(Prediction):
    """v = alpha·eps − sigma·x0 (Salimans & Ho 2022, arXiv 2202.00512)."""

    def coefficients(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return -path.sigma(t), path.alpha(t)


class Velocity(Prediction):
    """dx_t/dt = alpha'·x0 + sigma'·eps, the probability-flow velocity of any path; eps − x0 for rectified flow."""

    def coefficients(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return path.derivatives(t)
