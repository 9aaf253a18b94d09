"""The losses of stage one, on images (B, 3, H, W) in [−1, 1]; each is a mean."""

from ldm.losses.adversarial import (
    AdversarialLoss,
    GradientPenalty,
    Hinge,
    LeCam,
    NonSaturating,
    Vanilla,
    adaptive_weight,
)
from ldm.losses.equivariance import Equivariance
from ldm.losses.perceptual import PerceptualLoss
from ldm.losses.reconstruction import LearnedVariance, ReconstructionLoss, kl_per_pixel_value

__all__ = [
    "AdversarialLoss",
    "Equivariance",
    "GradientPenalty",
    "Hinge",
    "LeCam",
    "LearnedVariance",
    "NonSaturating",
    "PerceptualLoss",
    "ReconstructionLoss",
    "Vanilla",
    "adaptive_weight",
    "kl_per_pixel_value",
]
