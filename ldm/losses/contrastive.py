"""Losses and accuracy of image–text matching: every image of a batch against every caption of it.

Images and captions are vectors (B, E) of length 1, row by row a pair. ``same`` (B, B) says which captions are equal: a caption
that two images share is right for both (Yang et al. 2022, arXiv 2204.03610).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# embeddings of one caption in two batches differ by rounding alone
_TOLERANCE = 1e-4


def same_rows(vectors: Tensor) -> Tensor:
    """Which rows of (B, D) are equal up to rounding, (B, B) bool."""
    return torch.cdist(vectors, vectors, p=float("inf")) <= _TOLERANCE * vectors.abs().amax()


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """The symmetric cross-entropy of choosing a caption for each image, and an image for each caption (Radford et al. 2021,
    arXiv 2103.00020), (); ``logits`` (B, B), an image a row."""
    target = same / same.sum(1, keepdim=True)  # symmetric before it is divided, so that it serves both directions
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(logits: Tensor, same: Tensor) -> Tensor:
    """The logistic loss of every pair by itself, summed over captions and averaged over images (Zhai et al. 2023, arXiv
    2303.15343), (); ``logits`` (B, B)."""
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum(1).mean()


def retrieval_accuracy(queries: Tensor, candidates: Tensor, same: Tensor) -> Tensor:
    """Whether the nearest candidate (B, E) of each query (B, E) is its own, or equal to it: 1 or 0, (B,)."""
    nearest = (queries @ candidates.T).argmax(1)
    return same.gather(1, nearest[:, None])[:, 0].float()
