"""Cross-attention maps: where the model attends to each word of a prompt (Tang et al. 2022, arXiv 2210.04885).

The denoiser's text attention has forward hooks only inside :func:`record_attention`. They compute the probabilities from the
attention's inputs, as its fused kernel returns none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.files import atomic_file
from ldm.inference.generate import ImageGenerator
from ldm.models.dit import DiT, DiTBlock
from ldm.models.layers import Attention, KeysValues
from ldm.reporting.grids import captioned_grid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ldm.inference.settings import GenerationSettings
    from ldm.pipeline import LatentDiffusionPipeline

# words, and runs of symbols (emoji); a word keeps its apostrophes and hyphens
WORD = re.compile(r"\w[\w'’-]*|[^\w\s]+")
# the colours of a heat map from 0 to 1, matplotlib's "inferno": perceptually uniform, in grey too
HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])
CELL = 200  # pixels


class AttentionSum:
    """Attention probabilities (B, N, tokens), summed over heads, blocks and calls of the denoiser."""

    def __init__(self, images: int, tokens: int):
        self.images, self.tokens = images, tokens
        self.total: Tensor | None = None
        self.count = 0

    def add(self, probabilities: Tensor) -> None:
        """Add those (B', H, N, L) of one attention: of the conditional rows, which are the last, and of the prompt's tokens."""
        probabilities = probabilities[-self.images :, ..., : self.tokens].float().mean(1)
        self.total = probabilities if self.total is None else self.total + probabilities
        self.count += 1

    def mean(self) -> Tensor:
        """(B, N, tokens), on the CPU; at each position N the tokens' shares sum to 1. Raises UsageError where the denoiser was
        not called at the times recorded."""
        if self.total is None:
            raise UsageError("no step of the sampler lies within these times; give a wider range, or more steps")
        return (self.total / self.count).cpu()


def attention_probabilities(attention: Attention, x: Tensor, context: Tensor | KeysValues, mask: Tensor | None) -> Tensor:
    """softmax(q·kᵀ/√d) of a cross-attention's arguments, (B, H, N, L); 0 for tokens that ``mask`` hides."""
    q = attention.norm_q(attention.to_q(x).unflatten(-1, (attention.num_attention_heads, -1))).transpose(1, 2)
    keys = context.keys if isinstance(context, KeysValues) else attention.keys_values(context).keys
    logits = q.float() @ keys.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (logits if mask is None else logits.masked_fill(~mask, -math.inf)).softmax(-1)


@contextmanager
def record_attention(
    denoiser: nn.Module, images: int, tokens: int, times: tuple[float, float] = (-math.inf, math.inf)
) -> Iterator[AttentionSum]:
    """Sum the cross-attention of ``denoiser`` while the context is open; its predictions do not change.

    Args:
        denoiser: a :class:`ldm.models.dit.DiT` that is not compiled.
        images: number of rows recorded, the last of each call: guidance puts those of the null condition before them.
        tokens: number of tokens recorded, the first ones: all of the longest prompt.
        times: calls whose timestep lies between these two are recorded, in the units of the path's ``network_time``.

    Raises:
        UsageError: for a network of another kind.
    """
    if not isinstance(denoiser, DiT):
        raise UsageError(f"attention maps are read from a DiT; this model's denoiser is a {type(denoiser).__name__}")
    attention_sum = AttentionSum(images, tokens)
    recording = False

    def before_denoiser(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal recording
        timestep = named["timestep"] if "timestep" in named else arguments[2]
        recording = times[0] <= float(timestep.flatten()[0]) <= times[1]

    def after_attention(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if recording:
            with torch.no_grad():
                attention_sum.add(attention_probabilities(cast(Attention, module), *arguments))

    with ExitStack() as hooks:
        hooks.enter_context(denoiser.register_forward_pre_hook(before_denoiser, with_kwargs=True))
        for block in denoiser.blocks:
            hooks.enter_context(cast(DiTBlock, block).text_attention.register_forward_hook(after_attention))
        yield attention_sum


def word_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[tuple[int, int], list[int]]:
    """For each word of a prompt, by its span of characters, the positions of its tokens. Raises UsageError for a tokenizer
    without offsets."""
    if not tokenizer.is_fast:
        raise UsageError(f"{type(tokenizer).__name__} gives no offsets of its tokens, which attention maps need")
    spans = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    found = {
        word.span(): [number for number, (start, end) in enumerate(spans) if start < word.end() and word.start() < end]
        for word in WORD.finditer(prompt)
    }
    return {span: tokens for span, tokens in found.items() if tokens}  # tokenizers drop some symbols


@dataclass(frozen=True)
class WordMaps:
    """The attention maps of one prompt.

    Attributes:
        words: W, in the order of the prompt.
        maps: (W, h, w) float32, the share of the attention that each position of the image gives to a word.
        tokens: of the whole prompt, L with the special ones.
        token_maps: (L, h, w) float32; at each position they sum to 1.
    """

    words: list[str]
    maps: np.ndarray
    tokens: list[str]
    token_maps: np.ndarray


def generate_with_attention(
    pipeline: LatentDiffusionPipeline, settings: GenerationSettings, times: tuple[float, float] = (0.0, 1.0)
) -> tuple[Image.Image, WordMaps]:
    """An image and the attention maps of its prompt; the image is the same as without them.

    Args:
        times: the maps are means over the steps at these times, from 0 (data) to 1 (noise), and over all blocks and heads.

    Raises:
        UsageError: for a denoiser that is no DiT, a tokenizer without offsets, or times without a step.
    """
    prompt, positions, tokens = settings.prompt, dict[tuple[int, int], list[int]](), list[str]()
    pipeline.check_prompt(prompt)
    for encoder, ids in zip(pipeline.text_encoders, pipeline.tokenize([prompt])[0], strict=True):
        for span, numbers in word_tokens(encoder.tokenizer, prompt).items():
            here = [len(tokens) + number for number in numbers if number < len(ids)]  # the others are cut off
            positions.setdefault(span, []).extend(here)
        tokens += encoder.tokenizer.convert_ids_to_tokens(ids)
    # including both ends of the path, despite rounding
    low, high = sorted(pipeline.diffusion.path.network_time(torch.tensor(times, dtype=torch.float64)).tolist())
    rounding = 1e-5 * max(abs(low), abs(high))
    with record_attention(pipeline.transformer, 1, len(tokens), (low - rounding, high + rounding)) as attention:
        image = next(ImageGenerator(pipeline).generate([settings])).image
    grid = image.height // pipeline.size_unit, image.width // pipeline.size_unit
    token_maps = attention.mean()[0].T.unflatten(1, grid).numpy()  # (L, h, w)
    words = [prompt[start:end] for start, end in positions]
    maps = np.array([token_maps[numbers].sum(0) for numbers in positions.values()], dtype=np.float32).reshape(-1, *grid)
    return image, WordMaps(words, maps, tokens, token_maps)


def attention_grid(image: Image.Image, prompt: str, maps: WordMaps) -> Image.Image:
    """The image, then a heat map for each word: black for none of the attention, yellow for the word's greatest share."""
    enlarged = max(1, CELL // max(image.size))
    size = image.width * enlarged, image.height * enlarged
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.NEAREST), dtype=float)[..., None]
    images, captions = [image], [prompt]
    for word, shares in zip(maps.words, maps.maps, strict=True):
        heat = np.asarray(Image.fromarray(shares / shares.max()).resize(size, Image.Resampling.BILINEAR))
        colours = np.stack([np.interp(heat, np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], axis=-1)
        images.append(Image.fromarray((0.3 * grey + 0.7 * colours).round().astype(np.uint8)))
        captions.append(f"{word}: up to {shares.max():.1%}")
    return captioned_grid(images, captions, cell=CELL)


def save_maps(path: Path, maps: WordMaps) -> None:
    """Save ``words``, ``maps``, ``tokens`` and ``token_maps`` as an .npz file."""
    with atomic_file(path) as file:
        np.savez(file, **vars(maps))
