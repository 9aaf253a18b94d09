"""Text conditions, and the call of a denoiser with one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ldm.models.dit import EncodedText


class Condition(NamedTuple):
    """Encoded captions: ``embeddings`` (B, L, D) and ``mask`` (B, L), 1 for tokens and 0 for padding.

    The null condition is that of the empty caption.
    """

    embeddings: Tensor
    mask: Tensor

    def pad(self, length: int) -> Condition:
        """Pad to ``length`` tokens."""
        missing = length - self.mask.shape[1]
        return Condition(F.pad(self.embeddings, (0, 0, 0, missing)), F.pad(self.mask, (0, missing)))

    def repeat(self, count: int) -> Condition:
        """Repeat each row ``count`` times in succession: (B·count, L, D)."""
        return Condition(self.embeddings.repeat_interleave(count, 0), self.mask.repeat_interleave(count, 0))


def concatenate(first: Condition, second: Condition) -> Condition:
    """Stack two conditions along the batch, padded to the longer one."""
    length = max(first.mask.shape[1], second.mask.shape[1])
    first, second = first.pad(length), second.pad(length)
    return Condition(torch.cat([first.embeddings, second.embeddings]), torch.cat([first.mask, second.mask]))


def encode_condition(denoiser: nn.Module, condition: Condition) -> Condition | EncodedText:
    """The part of a denoiser's computation that depends on the condition alone, for all calls of a sampling run.

    For networks without ``encode_text``, such as diffusers' PixArt, it is the condition itself.
    """
    encode_text = getattr(denoiser, "encode_text", None)
    return condition if encode_text is None else encode_text(condition.embeddings, condition.mask)


def denoise(denoiser: nn.Module, x_t: Tensor, timestep: Tensor, condition: Condition | EncodedText) -> Tensor:
    """The prediction (B, C, H, W) of a denoiser with the signature of diffusers' ``PixArtTransformer2DModel``.

    Args:
        x_t: latents (B, C, H, W), scaled by the path's ``input_scale(t)``.
        timestep: the path's ``network_time(t)`` (B,).
    """
    return denoise_with_activations(denoiser, x_t, timestep, condition, ())[0]


def denoise_with_activations(
    denoiser: nn.Module, x_t: Tensor, timestep: Tensor, condition: Condition | EncodedText, blocks: Sequence[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The prediction as in :func:`denoise`, and the outputs (B, N, D) of ``blocks`` by number, from 0.

    Only a :class:`ldm.models.dit.DiT` returns activations.
    """
    text, mask = condition if isinstance(condition, Condition) else (condition, None)
    output = denoiser(
        hidden_states=x_t.to(getattr(denoiser, "dtype", x_t.dtype)),  # PixArt does not cast its inputs
        encoder_hidden_states=text,
        timestep=timestep,
        encoder_attention_mask=mask,
        return_dict=False,
        **({"return_activations": blocks} if blocks else {}),
    )
    return output[0], output[1] if blocks else {}
