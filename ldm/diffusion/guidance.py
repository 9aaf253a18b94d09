"""Conditions, and guidance as a wrapper round a denoiser in sampling; the data drop captions in training.

Guidance counts ``w`` as diffusers does: ``null + w·(cond − null)``, neutral at 1. Papers that write
``(1 + w')·cond − w'·null`` (Ho & Salimans 2022, arXiv 2207.12598) mean w' = w − 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Condition(NamedTuple):
    """Encoded captions: ``embeddings`` (B, L, D) and ``mask`` (B, L), 1 where a token stands and 0 where padding does."""

    embeddings: Tensor
    mask: Tensor

    def pad(self, length: int) -> Condition:
        """Pad to ``length`` tokens; the mask keeps the padding from being seen."""
        missing = length - self.mask.shape[1]
        return Condition(F.pad(self.embeddings, (0, 0, 0, missing)), F.pad(self.mask, (0, missing)))

    def repeat(self, count: int) -> Condition:
        """Every row ``count`` times in a row: (B·count, L, D)."""
        return Condition(self.embeddings.repeat_interleave(count, 0), self.mask.repeat_interleave(count, 0))


def concatenate(first: Condition, second: Condition) -> Condition:
    """Stack two conditions along the batch, padded to the longer one."""
    length = max(first.mask.shape[1], second.mask.shape[1])
    first, second = first.pad(length), second.pad(length)
    return Condition(torch.cat([first.embeddings, second.embeddings]), torch.cat([first.mask, second.mask]))


def denoise(denoiser: nn.Module, x_t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """Call a denoiser with the signature of diffusers' ``PixArtTransformer2DModel``; returns (B, C, H, W)."""
    return denoiser(
        hidden_states=x_t,
        encoder_hidden_states=condition.embeddings,
        timestep=timestep,
        encoder_attention_mask=condition.mask,
        return_dict=False,
    )[0]


class ClassifierFreeGuidance:
    """A denoiser for one batch of captions: both predictions in one call, all channels guided alike."""

    def __init__(self, denoiser: nn.Module, condition: Condition, null: Condition, scale: float):
        """
        Args:
            condition: the captions' condition, B rows.
            null: the null condition (or a negative prompt), B rows.
            scale: w; at 1 the null prediction is not computed.
        """
        self.denoiser, self.scale = denoiser, scale
        self.condition = condition if scale == 1 else concatenate(null, condition)

    def __call__(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Guided prediction (B, C, H, W) for ``x_t`` (B, C, H, W) and ``timestep`` (B,)."""
        if self.scale == 1:
            return denoise(self.denoiser, x_t, timestep, self.condition)
        both = denoise(self.denoiser, torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), self.condition)
        null, conditional = both.chunk(2)
        return null + self.scale * (conditional - null)
