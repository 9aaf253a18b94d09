"""The weight of the squared error at each t.

A weighting is defined as lambda(t) on the error of the data, ‖x̂0 − x0‖². As δx0 = −(sigma / determinant)·δy (see
:mod:`ldm.diffusion.prediction`), the weight of the network's own error is lambda·sigma² / determinant², for any prediction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.diffusion.path import ProbabilityPath, require_positive
from ldm.diffusion.prediction import Prediction, Velocity


class Weighting(ABC):
    """A choice of lambda(t)."""

    @abstractmethod
    def scaled(self, path: ProbabilityPath, t: Tensor) -> Tensor:
        """lambda(t)·sigma(t)² (B,), finite at both ends of the path even where lambda is not."""

    def __call__(self, path: ProbabilityPath, prediction: Prediction, t: Tensor) -> Tensor:
        """The weight (B,) of the mean squared error of the prediction at t (B,)."""
        return self.scaled(path, t) / prediction.determinant(path, t).square()


class MinSNR(Weighting):
    """lambda = min(SNR, gamma), SNR = alpha² / sigma² (Hang et al. 2023, arXiv 2303.09556).

    For Epsilon that is min(SNR, gamma) / SNR, for V on a variance-preserving path min(SNR, gamma) / (SNR + 1), for Velocity
    on rectified flow min((1 − t)², gamma·t²).
    """

    def __init__(self, gamma: float = 5.0):
        """``gamma``: the signal-to-noise ratio above which lambda is constant."""
        require_positive(self, gamma=gamma)
        self.gamma = gamma

    def scaled(self, path: ProbabilityPath, t: Tensor) -> Tensor:
        return torch.minimum(path.alpha(t).square(), self.gamma * path.sigma(t).square())


class EDM(Weighting):
    """lambda = 1 / c_out² = SNR + 1 / sigma_data² (Karras et al. 2022, arXiv 2206.00364, table 1), for any prediction.

    For :class:`ldm.diffusion.prediction.Preconditioned` the weight is 1, so that prediction needs no weighting.
    """

    def scaled(self, path: ProbabilityPath, t: Tensor) -> Tensor:
        return path.alpha(t).square() + (path.sigma(t) / path.sigma_data).square()


class VelocityError(Weighting):
    """The squared error of the velocity dx_t/dt, for any prediction: lambda = (alpha·sigma' − alpha'·sigma)² / sigma².

    With :class:`ldm.diffusion.prediction.X0` on rectified flow that is ‖x̂0 − x0‖² / t², the loss of JiT (Li & He 2025, arXiv
    2511.13720); with Velocity the weight is 1.
    """

    def __init__(self, least_sigma: float = 0.05):
        """``least_sigma``: in the place of smaller sigma in the denominator, which bounds lambda."""
        require_positive(self, least_sigma=least_sigma)
        self.least_sigma = least_sigma

    def scaled(self, path: ProbabilityPath, t: Tensor) -> Tensor:
        sigma = path.sigma(t)
        return (Velocity().determinant(path, t) * sigma / sigma.clamp(min=self.least_sigma)).square()
