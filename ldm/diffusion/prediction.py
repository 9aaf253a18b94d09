"""What the network predicts: ``y = c(t)·x0 + d(t)·eps``. Every conversion is the solution of a 2×2 system.

    [x_t]   [alpha sigma] [x0 ]
    [ y ] = [  c     d  ] [eps]

The determinant alpha·d − sigma·c must not vanish: a prediction of eps does not determine x0 where alpha = 0, one of x0 not eps
where sigma = 0. It also converts errors: x_t is known, so alpha·δx0 + sigma·δeps = 0, and an error δy of the prediction is an
error δx0 = −(sigma / determinant)·δy of the data. The weights of :mod:`ldm.diffusion.weighting` follow from this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.path import ProbabilityPath, expand

LEAST_DETERMINANT = 1e-6  # relative to the lengths of (alpha, sigma) and (c, d): the sine of the angle between them


class Endpoints(NamedTuple):
    """The data and the noise that a prediction implies, both (B, …)."""

    x0: Tensor
    eps: Tensor


class Prediction(ABC):
    """A choice of c(t) and d(t)."""

    @abstractmethod
    def coefficients(self, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        """c(t) and d(t), each (B,) for t of shape (B,)."""

    def target(self, path: ProbabilityPath, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The training target y, (B, …) like ``x0``."""
        c, d = self.coefficients(path, t)
        return expand(c, x0) * x0 + expand(d, eps) * eps

    def determinant(self, path: ProbabilityPath, t: Tensor) -> Tensor:
        """alpha·d − sigma·c (B,)."""
        c, d = self.coefficients(path, t)
        return path.alpha(t) * d - path.sigma(t) * c

    def determines(self, path: ProbabilityPath, t: Tensor) -> Tensor:
        """Whether x_t and y determine x0 and eps at each t, bool (B,)."""
        (alpha, sigma), (c, d) = (path.alpha(t), path.sigma(t)), self.coefficients(path, t)
        # infinite coefficients give NaN, which is not greater
        return self.determinant(path, t).abs() > LEAST_DETERMINANT * torch.hypot(alpha, sigma) * torch.hypot(c, d)

    def endpoints(self, path: ProbabilityPath, x_t: Tensor, y: Tensor, t: Tensor) -> Endpoints:
        """x0 and eps from a noisy ``x_t`` and a prediction ``y``. Raises ValueError if the system is singular at a t."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        c, d = self.coefficients(path, t)
        determinant = self.determinant(path, t)
        singular = ~self.determines(path, t)
        if singular.any():
            at, where = t[singular][0].item(), type(path).__name__
            raise ValueError(f"{type(self).__name__} does not determine x0 and eps at t = {at:g} on {where}")
        alpha, sigma, c, d, determinant = (expand(value, x_t) for value in (alpha, sigma, c, d, determinant))
        return Endpoints(x0=(d * x_t - sigma * y) / determinant, eps=(alpha * y - c * x_t) / determinant)


class Epsilon(Prediction):
    """The noise (Ho et al. 2020)."""

    def coefficients(self, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


class Score(Prediction):
    """∇ log p(x_t | x0) = −eps / sigma (Song et al. 2021, arXiv 2011.13456)."""

    def coefficients(self, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), -1 / path.sigma(t)


class X0(Prediction):
    """The data x0."""

    def coefficients(self, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)


class V(Prediction):
    """v = alpha·eps − sigma·x0 (Salimans & Ho 2022, arXiv 2202.00512)."""

    def coefficients(self, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        return -path.sigma(t), path.alpha(t)


class Velocity(Prediction):
    """dx_t/dt = alpha'·x0 + sigma'·eps, the probability-flow velocity of any path; eps − x0 for rectified flow."""

    def coefficients(self, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        return path.derivatives(t)


class Preconditioned(Prediction):
    """EDM's F in D = c_skip·x + c_out·F (Karras et al. 2022, arXiv 2206.00364, eq. 7), of unit variance at every noise level.

    F = (x0 − c_skip·x) / c_out with x = x_t / alpha and the noise level sigma / alpha, which extends it to any path; on a
    variance-preserving path with sigma_data = 1, F is −v. The standard deviation of the data is the path's ``sigma_data``.
    """

    def coefficients(self, path: ProbabilityPath, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = path.alpha(t), path.sigma(t)
        length = torch.hypot(sigma, alpha * path.sigma_data)
        return sigma / (path.sigma_data * length), -path.sigma_data * alpha / length
