"""Parts of the DiT: attention, modulation, feed-forward, position embedding.

Shapes: B batch, N picture tokens, L text tokens, D width, H heads.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.errors import UsageError


class Modulation(NamedTuple):
    """What a block does to its input: ``gate · f(x · (1 + scale) + shift)``, each (B, 1, D) (Peebles & Xie 2022)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, modulation: Modulation) -> Tensor:
    """(B, N, D) -> (B, N, D)."""
    return x * (1 + modulation.scale) + modulation.shift


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over (B, H, N, d); ``mask`` broadcasts to (B, H, N, L), True where a key may be seen.

    On a CPU with few tokens the plain matrix products beat the flash kernel, its backward above all (1.7x on a 4.5M DiT
    step), so they are asked for there.
    """
    with sdpa_kernel(SDPBackend.MATH) if q.device.type == "cpu" else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head attention; to itself, or to ``context`` when one is given. Queries and keys are normalised per head
    (QK-norm, Dehghani et al. 2023, arXiv 2302.05442), which keeps the logits bounded at high learning rates."""

    def __init__(self, width: int, num_heads: int, context_width: int | None = None):
        super().__init__()
        if width % num_heads:
            raise UsageError(f"model.denoiser: width {width} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.is_cross = context_width is not None
        if self.is_cross:
            self.to_q = nn.Linear(width, width)
            self.to_kv = nn.Linear(context_width, 2 * width)
        else:
            self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.LayerNorm(width // num_heads, eps=1e-6, bias=False)
        self.norm_k = nn.LayerNorm(width // num_heads, eps=1e-6, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D), context (B, L, C), mask (B, 1, 1, L) -> (B, N, D)."""
        q, k, v = (self.to_q(x), *self.to_kv(context).chunk(2, dim=-1)) if self.is_cross else self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))  # (B, H, N, d)
        attended = scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v, mask)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Two linear layers with a tanh-GELU between."""

    def __init__(self, width: int, ratio: float):
        hidden = int(width * ratio)
        super().__init__(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


@lru_cache(maxsize=32)
def position_embedding(width: int, height_tokens: int, width_tokens: int, base_size: int) -> Tensor:
    """2D sine-cosine embedding (N, D), float32, of a grid of tokens.

    ``base_size`` is the side of the grid trained on: other sizes are stretched onto the same span of positions.
    """
    return get_2d_sincos_pos_embed(width, (height_tokens, width_tokens), base_size=base_size, output_type="pt").float()
