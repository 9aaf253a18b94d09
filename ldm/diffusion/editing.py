"""Starting from an image: keeping a part of it while the rest is generated, and the noise that it would be generated from.

All of it in normalised latents, and on the grid of a :class:`ldm.diffusion.sampler.Sampler`, so that it holds for every path,
prediction and scheduler. Starting part-way (image-to-image) is the sampler's own ``strength``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.sampler import Denoiser, Sampler, SamplerStep


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """A mask of pixels (B, 1, H, W), 1 where they are redrawn -> of latents (B, 1, H / factor, W / factor).

    A latent is redrawn where any of its pixels is.
    """
    return F.max_pool2d(mask, factor)


@dataclass(frozen=True)
class KnownPart:
    """The part of an image that is kept (Lugmayr et al. 2022, RePaint, arXiv 2201.09865, section 4.1).

    Attributes:
        x0: the image's latents (B, C, h, w).
        eps: its noise, one for all steps: the known part then follows one straight line down to the image.
        mask: (B, 1, h, w), 1 where it is redrawn.
    """

    x0: Tensor
    eps: Tensor
    mask: Tensor

    def put_back(self, sampler: Sampler, step: SamplerStep) -> None:
        """Replace the known part of a step's latents, and of what it predicts, by the image's own."""
        step.latents = self.mask * step.latents + (1 - self.mask) * sampler.noised(self.x0, self.eps, step.number + 1)
        step.x0 = self.mask * step.x0 + (1 - self.mask) * self.x0


def invert(
    sampler: Sampler, denoiser: Denoiser, x0: Tensor, iterations: int = 3, on_step: Callable[[], None] | None = None
) -> Tensor:
    """The noise from which a deterministic sampler generates ``x0``.

    DDIM inversion (Song et al. 2020, arXiv 2010.02502; Dhariwal & Nichol 2021, arXiv 2105.05233) for any path: a step of
    DDIM, which is Euler's on the probability-flow ODE in sigma / alpha, leads from x_t to x_s = alpha_s·x̂0 + sigma_s·êps. Going
    up, x_t is wanted and its x̂0 is not known yet. It starts as x_s, scaled, and is then corrected by what the step from it
    misses x_s by: ``iterations`` calls of the denoiser per step (Pan et al. 2023, AIDI, arXiv 2309.04907). One call is the
    plain method; more make the way back exact. The step from the data is the plain one: where the data are no x̂0 of the
    denoiser, no x_t leads to them, and correcting it would not settle.

    Args:
        sampler: whose noise levels are followed; sampling from the noise gives ``x0`` again when its scheduler is ``ddim``, or
            ``euler`` on the other paths, and nearly so with the other deterministic ones.
        denoiser: as :meth:`Sampler.steps` takes it.
        x0: latents (B, C, h, w).
        iterations: calls of the denoiser per step.
        on_step: called after every step.

    Returns:
        (B, C, h, w), for the sampler's ``noise``; of unit variance as far as the denoiser is right about what little noise
        there is near the data. One that sees none there leaves it smaller: 0.4 on a small model of the shapes.
    """
    # of the two calls that heun makes at one level the first will do
    levels = [n for n in range(len(sampler)) if n == 0 or sampler.t[n] < sampler.t[n - 1]]
    alpha_s, sigma_s, x_s = 1.0, 0.0, x0
    for number in reversed(levels):
        alpha, sigma = sampler.alpha[number], sampler.sigma[number]
        x_t = x_s * (math.hypot(alpha, sigma) / math.hypot(alpha_s, sigma_s))
        # with both scaled to unit variance, the step to x_s is a turn: cos·x_t + sin·v, v being what the network sees there
        rate = (alpha**2 + sigma**2) / (alpha * alpha_s + sigma * sigma_s)
        for _ in range(iterations if sigma_s else 1):
            clean = sampler.denoised(denoiser, x_t, number)
            missed = alpha_s * clean + sigma_s * (x_t - alpha * clean) / sigma - x_s
            x_t = x_t - rate * missed
        alpha_s, sigma_s, x_s = alpha, sigma, x_t
        if on_step is not None:
            on_step()
    return sampler.noise_of(x_s)
