"""Where each word of a prompt is looked at while an image is drawn: cross-attention maps (Tang et al. 2022, arXiv 2210.04885).

Looking costs nothing when nobody looks: hooks stand on the denoiser's text attention only inside :func:`watched_attention`, and
compute the probabilities anew from what the attention was given, as its fused kernel keeps none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.files import atomic_file
from ldm.inference.generate import ImageGenerator
from ldm.models.dit import DiT
from ldm.models.layers import Attention, KeysValues
from ldm.reporting.grids import captioned_grid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ldm.inference.settings import GenerationSettings
    from ldm.pipeline import LatentDiffusionPipeline

# words, and runs of signs (emoji); a word keeps its apostrophes and hyphens
WORD = re.compile(r"\w[\w'’-]*|[^\w\s]+")
# a heat map's colours from 0 to 1, as matplotlib's "inferno" goes: equal steps look equally large, on a grey print too
HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])


class AttentionSum:
    """Probabilities (B, N, tokens) added up over heads, blocks and calls of the denoiser."""

    def __init__(self, images: int, tokens: int):
        self.images, self.tokens = images, tokens
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, probabilities: Tensor) -> None:
        """Those (B', H, N, L) of one attention: of the conditional rows, which stand last, and the tokens that count."""
        self.total = self.total + probabilities[-self.images :, ..., : self.tokens].float().mean(1)
        self.count += 1

    def mean(self) -> Tensor:
        """(B, N, tokens), on the CPU; for each place N the tokens' shares sum to 1.

        Raises:
            UsageError: where the denoiser was not called in the times watched.
        """
        if not self.count:
            raise UsageError("no step of the sampler lies within the times watched; give a wider range, or more steps")
        return (self.total / self.count).cpu()


def attention_probabilities(attention: Attention, x: Tensor, context: Tensor | KeysValues, mask: Tensor | None) -> Tensor:
    """softmax(q·kᵀ/√d) of a cross-attention's own arguments, (B, H, N, L); tokens that ``mask`` hides have 0."""
    q = attention.norm_q(attention.to_q(x).unflatten(-1, (attention.num_attention_heads, -1))).transpose(1, 2)
    keys = context.keys if isinstance(context, KeysValues) else attention.keys_values(context).keys
    logits = q.float() @ keys.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (logits if mask is None else logits.masked_fill(~mask, -math.inf)).softmax(-1)


@contextmanager
def watched_attention(
    denoiser: nn.Module, images: int, tokens: int, times: tuple[float, float] = (-math.inf, math.inf)
) -> Iterator[AttentionSum]:
    """Within it, what ``denoiser`` attends to in its texts is added up; what it answers stays the same.

    Args:
        denoiser: a :class:`ldm.models.dit.DiT` that is not compiled.
        images: the last so many rows of each call count: guidance puts the rows of the null condition before them.
        tokens: the first so many tokens count: all of the longest prompt.
        times: calls whose timestep lies between these two count, in the units of the path's ``network_time``.

    Raises:
        UsageError: for a network of another kind.
    """
    if not isinstance(denoiser, DiT):
        raise UsageError(f"attention maps are read from a DiT; this model's denoiser is a {type(denoiser).__name__}")
    watched = AttentionSum(images, tokens)
    counts = False

    def before_denoiser(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal counts
        timestep = named["timestep"] if "timestep" in named else arguments[2]
        counts = times[0] <= float(timestep.flatten()[0]) <= times[1]

    def after_attention(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if counts:
            with torch.no_grad():
                watched.add(attention_probabilities(module, *arguments))

    with ExitStack() as hooks:
        handles = [denoiser.register_forward_pre_hook(before_denoiser, with_kwargs=True)]
        handles += [block.text_attention.register_forward_hook(after_attention) for block in denoiser.blocks]
        for handle in handles:
            hooks.callback(handle.remove)
        yield watched


def word_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[tuple[int, int], list[int]]:
    """For each word of a prompt, by its span of characters, the places of its tokens.

    Raises:
        UsageError: for a tokenizer that does not say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise UsageError(f"{type(tokenizer).__name__} does not say which token stands for which word; attention maps need it")
    spans = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    found = {
        word.span(): [place for place, (start, end) in enumerate(spans) if start < word.end() and word.start() < end]
        for word in WORD.finditer(prompt)
    }
    return {span: places for span, places in found.items() if places}  # some signs are dropped before they are tokens


@dataclass(frozen=True)
class WordMaps:
    """Where the words of one prompt are looked at.

    Attributes:
        words: as they stand in the prompt, W of them.
        maps: (W, h, w) float32, share of the attention that each place of the image gives to a word.
        tokens: of the whole prompt, L with the special ones.
        token_maps: (L, h, w) float32; for each place they sum to 1.
    """

    words: list[str]
    maps: np.ndarray
    tokens: list[str]
    token_maps: np.ndarray


def draw_watched(
    pipeline: LatentDiffusionPipeline, settings: GenerationSettings, times: tuple[float, float] = (0.0, 1.0)
) -> tuple[Image.Image, WordMaps]:
    """An image, the same as ever, and where the words of its prompt were looked at.

    Args:
        times: mean over the steps within, from 0 (data) to 1 (noise), and over all blocks and heads.

    Raises:
        UsageError: for a denoiser that is no DiT, a tokenizer without offsets, or times without a step.
    """
    prompt, tokenizer = settings.prompt, pipeline.tokenizer
    pipeline.check_prompt(prompt)
    places = word_tokens(tokenizer, prompt)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"])
    # the ends of the path too, to within rounding
    low, high = sorted(pipeline.diffusion.path.network_time(torch.tensor(times, dtype=torch.float64)).tolist())
    rounding = 1e-5 * max(abs(low), abs(high))
    with watched_attention(pipeline.transformer, 1, len(tokens), (low - rounding, high + rounding)) as watched:
        image = next(ImageGenerator(pipeline).generate([settings])).image
    token_side = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
    grid = image.height // token_side, image.width // token_side
    token_maps = watched.mean()[0].T.unflatten(1, grid).numpy()  # (L, h, w)
    words = [prompt[start:end] for start, end in places]
    maps = np.array([token_maps[of].sum(0) for of in places.values()], dtype=np.float32).reshape(-1, *grid)
    return image, WordMaps(words, maps, tokens, token_maps)


def attention_grid(image: Image.Image, prompt: str, maps: WordMaps, cell: int = 200) -> Image.Image:
    """The image, then for each word where it was looked at: black nowhere, yellow at the word's own greatest share."""
    enlarged = max(1, cell // max(image.size))
    size = image.width * enlarged, image.height * enlarged
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.NEAREST), dtype=float)[..., None]
    images, captions = [image], [prompt]
    for word, shares in zip(maps.words, maps.maps, strict=True):
        heat = np.asarray(Image.fromarray(shares / shares.max()).resize(size, Image.Resampling.BILINEAR))
        colours = np.stack([np.interp(heat, np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], axis=-1)
        images.append(Image.fromarray((0.3 * grey + 0.7 * colours).round().astype(np.uint8)))
        captions.append(f"{word}: up to {shares.max():.1%}")
    return captioned_grid(images, captions, cell=cell)


def save_maps(path: Path, maps: WordMaps) -> None:
    """The arrays as ``words``, ``maps``, ``tokens`` and ``token_maps`` of an .npz file."""
    with atomic_file(path) as file:
        np.savez(file, **vars(maps))
