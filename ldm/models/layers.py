"""Parts of the DiT: norms, attention, modulation, feed-forward, positions.

Shapes: B batch, N image tokens, L text tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb, get_2d_rotary_pos_embed, get_2d_sincos_pos_embed
from torch import Tensor, nn

from ldm.errors import UsageError

Norm = Literal["layer_norm", "rms_norm"]
Activation = Literal["gelu", "swiglu"]


def _as_precise(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """A norm's weight in the dtype of ``x`` where that is wider: FSDP gathers weights in bf16, and tokens are in fp32."""
    return weight if weight is None else weight.to(torch.promote_types(weight.dtype, x.dtype))


class LayerNorm(nn.LayerNorm):
    """torch's, which on CPUs refuses weights narrower than its input."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _as_precise(self.weight, input), _as_precise(self.bias, input)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, _as_precise(self.weight, x), self.eps)


def make_norm(kind: Norm, width: int, affine: bool = False, bias: bool = True) -> nn.Module:
    """LayerNorm, or RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), which has no bias."""
    if kind == "rms_norm":
        return RMSNorm(width, eps=1e-6, elementwise_affine=affine)
    return LayerNorm(width, eps=1e-6, elementwise_affine=affine, bias=bias)


class Modulation(NamedTuple):
    """Of ``gate · f(x · (1 + scale) + shift)``, each (B, 1, D) (Peebles & Xie 2022)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, modulation: Modulation) -> Tensor:
    """x · (1 + scale) + shift: (B, N, D) -> (B, N, D)."""
    # fused: without addcmul here and in the block, a training step of a small DiT (fp32, CPU) takes 1.09x the time
    return torch.addcmul(modulation.shift, x, 1 + modulation.scale)


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over (B, H, N, d); ``mask`` broadcasts to (B, H, N, L), True where a key takes part.

    On a CPU, bf16 attention with gradients is computed in fp32: the backward pass of torch's bf16 kernel is slow. Forward and
    backward together took it 1.0 (256 tokens) to 4.5 (25 tokens) times as long, on a CPU with AMX.
    """
    if v.device.type != "cpu" or v.dtype != torch.bfloat16 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(v.dtype)


class Rotation(NamedTuple):
    """Rotary angles of every token and pair of features, in two equivalent forms; see :func:`rotate`."""

    phases: Tensor  # (1, N, d/2), complex64
    cosines_sines: tuple[Tensor, Tensor]  # each (N, d), float32


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Apply a rotary embedding in float32: (B, N, H, d) -> (B, N, H, d)."""
    # complex arithmetic takes 0.4x the time (CPU, forward and backward), but torch.compile generates no code for it
    real = torch.compiler.is_compiling()
    angles = rotation.cosines_sines if real else rotation.phases
    rotated = apply_rotary_emb(heads, angles, use_real=real, sequence_dim=1)  # pyright: ignore[reportArgumentType]  a pair
    return cast(Tensor, rotated)


class KeysValues(NamedTuple):
    """Projected keys (normalised) and values, each (B, H, L, d)."""

    keys: Tensor
    values: Tensor


def is_autocast(x: Tensor) -> bool:
    """Whether products of ``x`` are in another dtype than its own."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # the meta device has no autocast


def cast_for_autocast(x: Tensor) -> Tensor:
    """Cast as autocast would for each of several matrix products, once for all of them."""
    if not is_autocast(x):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def products(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """The output of each layer for ``x`` (…, C); compiled, one matrix product for all, which fills a GPU better than several.

    The weights are concatenated in the pass that casts them for autocast. Uncompiled that would be a pass of its own, and on a
    CPU the parts of the product would be copied before they are normalised.
    """
    if not torch.compiler.is_compiling() or any(type(layer) is not nn.Linear for layer in layers):  # adapters, fp8
        return tuple(layer(x) for layer in layers)
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention, or cross-attention to a context of ``context_width`` features."""

    def __init__(
        self,
        width: int,
        num_attention_heads: int,
        context_width: int | None = None,
        qk_norm: bool = True,
        norm: Norm = "layer_norm",
    ):
        """``qk_norm``: normalise queries and keys per head, to bound the logits (Dehghani et al. 2023, arXiv 2302.05442)."""
        super().__init__()
        if width % num_attention_heads:
            raise UsageError(f"width {width} is not a multiple of num_attention_heads {num_attention_heads}")
        self.num_attention_heads = num_attention_heads
        self.to_q = nn.Linear(width, width)
        self.to_k, self.to_v = (nn.Linear(context_width or width, width) for _ in range(2))
        self.norm_q, self.norm_k = (
            make_norm(norm, width // num_attention_heads, affine=True, bias=False) if qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.to_out = nn.Linear(width, width)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of a ``context`` (B, L, C)."""
        keys, values = products(context, self.to_k, self.to_v)
        return KeysValues(self._heads(keys, self.norm_k), self._heads(values))

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeysValues | None = None,
        mask: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """x (B, N, D), context (B, L, C) or its :meth:`keys_values`, mask (B, 1, 1, L) -> (B, N, D)."""
        x = cast_for_autocast(x)
        if context is None:
            q, k, v = products(x, self.to_q, self.to_k, self.to_v)
            k, v = self._heads(k, self.norm_k, rotation), self._heads(v)
        else:
            q = self.to_q(x)
            k, v = context if isinstance(context, KeysValues) else self.keys_values(context)
        attended = scaled_dot_product_attention(self._heads(q, self.norm_q, rotation), k, v, mask)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor, norm: nn.Module | None = None, rotation: Rotation | None = None) -> Tensor:
        """(B, N, D) -> (B, H, N, d), each head normalised and rotated."""
        heads = projected.unflatten(-1, (self.num_attention_heads, -1))
        if norm is not None:
            heads = norm(heads)
        if rotation is not None:
            heads = rotate(heads, rotation)
        return heads.transpose(1, 2)


class GatedSiLU(nn.Module):
    """(…, 2·hidden) -> (…, hidden): SiLU of one half times the other."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between them, or SwiGLU (Shazeer 2020, arXiv 2002.05202).

    The GELU is exact: on a CPU it takes 0.4x the time of its tanh approximation. SwiGLU has a third matrix; two thirds of the
    hidden features, rounded to a multiple of 8, keep the number of parameters.
    """

    def __init__(self, width: int, ratio: float, activation: Activation = "gelu"):
        hidden = int(width * ratio)
        if activation == "swiglu":
            hidden = 8 * round(hidden / 12)
            super().__init__(nn.Linear(width, 2 * hidden), GatedSiLU(), nn.Linear(hidden, width))
        else:
            super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


# Whatever first fills the caches, training uses them too: tensors made under inference_mode would be refused by autograd.
# There is an entry for each size of the buckets.


@lru_cache(maxsize=128)
@torch.inference_mode(False)
def position_embedding(
    width: int, height_tokens: int, width_tokens: int, base_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """2D sine-cosine embedding (N, D), float32, of a grid of tokens, scaled to the span of a grid of side ``base_size``."""
    embedding = get_2d_sincos_pos_embed(width, (height_tokens, width_tokens), base_size=base_size, output_type="pt")
    return embedding.float().to(device)


@lru_cache(maxsize=128)
@torch.inference_mode(False)
def rotary_embedding(
    head_width: int, height_tokens: int, width_tokens: int, base_size: int, device: torch.device | str = "cpu"
) -> Rotation:
    """Axial rotary embedding of a grid of tokens (Su et al. 2021, arXiv 2104.09864; axes as Heo et al. 2024, 2403.13298).

    Half of each head rotates by the column and half by the row, so that attention logits depend on the offset between two
    tokens alone. Positions are scaled as in :func:`position_embedding`.
    """
    span = ((0, 0), (base_size, base_size))
    phases = cast(Tensor, get_2d_rotary_pos_embed(head_width, span, (height_tokens, width_tokens), use_real=False)).to(device)
    cosines, sines = (part.repeat_interleave(2, dim=1) for part in (phases.real, phases.imag))
    return Rotation(phases[None], (cosines, sines))
