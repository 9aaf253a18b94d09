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
    """Encoded captions: ``embeddings`` (B, L, D) and ``mask`` (B, L), 0 for padding and for a token the number of its text
    encoder: 1, or from 1 where there are several (:func:`join_encoders`).

    The null condition is that of the empty caption. ``sizes`` (B, 6) are the :func:`micro_conditions`, for denoisers that take
    them (:func:`takes_sizes`).
    """

    embeddings: Tensor
    mask: Tensor
    sizes: Tensor | None = None

    def pad(self, length: int) -> Condition:
        """Pad to ``length`` tokens."""
        missing = length - self.mask.shape[1]
        padded = F.pad(self.embeddings, (0, 0, 0, missing)), F.pad(self.mask, (0, missing))
        return Condition(*padded, self.sizes)

    def repeat(self, count: int) -> Condition:
        """Repeat each row ``count`` times in succession: (B·count, L, D)."""
        sizes = None if self.sizes is None else self.sizes.repeat_interleave(count, 0)
        return Condition(self.embeddings.repeat_interleave(count, 0), self.mask.repeat_interleave(count, 0), sizes)

    def rows(self, index: Tensor) -> Condition:
        """The rows of these numbers."""
        return Condition(self.embeddings[index], self.mask[index], None if self.sizes is None else self.sizes[index])


def join_encoders(conditions: Sequence[Condition]) -> Condition:
    """The same captions by several text encoders (B, L_k, D_k) as one condition (B, ΣL_k, max D_k).

    In each row the tokens of the encoders follow one another, filled up with zeros to the widest, and padding comes last. The
    mask numbers the encoders, by which a denoiser knows how to project a token.
    """
    if len(conditions) == 1:
        return conditions[0]
    width = max(condition.embeddings.shape[-1] for condition in conditions)
    embeddings = torch.cat([F.pad(one.embeddings, (0, width - one.embeddings.shape[-1])) for one in conditions], 1)
    mask = torch.cat([one.mask.clamp(max=1) * number for number, one in enumerate(conditions, 1)], 1)
    order = (mask == 0).int().argsort(dim=1, stable=True)
    return Condition(embeddings.gather(1, order[..., None].expand_as(embeddings)), mask.gather(1, order))


def concatenate(first: Condition, second: Condition) -> Condition:
    """Stack two conditions along the batch, padded to the longer one."""
    length = max(first.mask.shape[1], second.mask.shape[1])
    first, second = first.pad(length), second.pad(length)
    sizes = None if first.sizes is None or second.sizes is None else torch.cat([first.sizes, second.sizes])
    return Condition(torch.cat([first.embeddings, second.embeddings]), torch.cat([first.mask, second.mask]), sizes)


def takes_sizes(denoiser: nn.Module) -> bool:
    """Whether a denoiser is conditioned on the sizes of images: a DiT or diffusers' PixArt that was made so."""
    config = getattr(denoiser, "config", {})
    return bool(config.get("micro_conditioning") or getattr(denoiser, "use_additional_conditions", False))


def micro_conditions(original_size: Tensor, crop: Tensor, target_size: tuple[int, int]) -> Tensor:
    """The six numbers by which SDXL knows how an image was made (Podell et al. 2023, arXiv 2307.01952, section 2.2).

    Args:
        original_size: (B, 2), height and width in pixels before all resizing.
        crop: (B, 4), top, left, height and width of the part that was cropped out and resized to the target.
        target_size: height and width in pixels.

    Returns:
        (B, 6), float32: height and width of the original; top and left of the crop, in pixels of the target; height and width
        of the target.
    """
    # filled on the device: the host would wait for a copy of its own numbers
    target = torch.stack([torch.full((len(crop),), float(side), device=crop.device) for side in target_size], 1)
    return torch.cat([original_size.float(), crop[:, :2] * target / crop[:, 2:], target], 1)


def encode_condition(denoiser: nn.Module, condition: Condition) -> Condition | EncodedText:
    """The part of a denoiser's computation that depends on the condition alone, for all calls of a sampling run.

    For networks without ``encode_text``, such as diffusers' PixArt, it is the condition itself.
    """
    encode_text = getattr(denoiser, "encode_text", None)
    return condition if encode_text is None else encode_text(*(part for part in condition if part is not None))


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
    text, mask, sizes = condition if isinstance(condition, Condition) else (condition, None, None)
    output = denoiser(
        hidden_states=x_t.to(getattr(denoiser, "dtype", x_t.dtype)),  # PixArt does not cast its inputs
        encoder_hidden_states=text,
        timestep=timestep,
        encoder_attention_mask=mask,
        return_dict=False,
        **({"return_activations": blocks} if blocks else {}),
        **({} if sizes is None else {"added_cond_kwargs": _added_conditions(denoiser, sizes)}),
    )
    return output[0], output[1] if blocks else {}


def _added_conditions(denoiser: nn.Module, sizes: Tensor) -> dict[str, Tensor]:
    """:func:`micro_conditions` as diffusers passes them: to PixArt the original size and the ratio of the target's sides, else
    all six, as to SDXL."""
    if hasattr(denoiser, "use_additional_conditions"):
        return {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 4:5] / sizes[:, 5:]}
    return {"time_ids": sizes}
