"""A small model of images and text: it gives an image and a caption vectors that are close where the two belong together.

It is trained on the user's own images (:mod:`ldm.training.matcher`), from latents or pixels, clean or noisy, and on the output
of a frozen text encoder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import TypedDict

from ldm.errors import UsageError
from ldm.files import read_json, require_version, write_json
from ldm.models.autoencoder import (
    autoencoder_hash,
    downsampling_factor,
    encode_latents,
    load_autoencoder,
    statistics_hash,
)
from ldm.models.autoencoder_kinds import Autoencoder
from ldm.models.directories import MAX_LAYERS, loading, read_config, require_regular_files
from ldm.models.dit import mean_token
from ldm.models.fingerprint import network_hash
from ldm.models.layers import Attention, FeedForward, LayerNorm, position_embedding
from ldm.models.text_encoder import TextEncoder

Loss = Literal["contrastive", "sigmoid"]
# where the scale of the cosines begins, the bias of the sigmoid loss, and the largest scale (Radford et al. 2021; Zhai et al.
# 2023)
SCALES, BIAS, MAX_SCALE = {"contrastive": 1 / 0.07, "sigmoid": 10.0}, -10.0, 100.0

INDEX_NAME, FORMAT_VERSION = "matcher.json", 1


class Matched(NamedTuple):
    """Images and captions as vectors (B, E) of length 1; ``scale`` and ``bias`` (1,) make their cosines the logits of the
    loss: scale · cosine + bias."""

    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor

    @property
    def logits(self) -> Tensor:
        """Of every image with every caption, (B, B)."""
        return self.scale * self.images @ self.texts.T + self.bias


class MatcherBlock(nn.Module):
    """Self-attention and feed-forward, each of normalised tokens and added to them."""

    def __init__(self, width: int, num_attention_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attention = Attention(width, num_attention_heads)
        self.feed_forward = FeedForward(width, mlp_ratio)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D), mask (B, 1, 1, N), True where a token takes part -> (B, N, D)."""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.feed_forward(self.norm2(x))


class Matcher(ModelMixin, ConfigMixin):
    """Two transformers: over patches of latents or pixels (Dosovitskiy et al. 2021, arXiv 2010.11929), and over the tokens of a
    frozen text encoder. The mean of the tokens of each is projected to a space that they share."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ("MatcherBlock",)
    _repeated_blocks = ("MatcherBlock",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 32,
        patch_size: int = 2,
        width: int = 256,
        num_layers: int = 6,
        num_attention_heads: int = 4,
        mlp_ratio: float = 4.0,
        caption_channels: int = 384,
        text_layers: int = 2,
        embedding_size: int = 256,
        noisy: bool = False,
        loss: Loss = "contrastive",
    ):
        """
        Args:
            in_channels: channels of the latents, 3 for pixels.
            sample_size: side of the grid of positions, in latent pixels: positions in latents of any height and width are
                scaled to it, each axis by itself, as in the denoiser.
            patch_size: side of a token, in latent pixels.
            width: features per token, of images and of text; a multiple of 4.
            num_layers: blocks of the transformer over the image.
            num_attention_heads: attention heads; must divide ``width``.
            mlp_ratio: hidden features of the feed-forward, as a multiple of ``width``.
            caption_channels: features per token of the text encoder.
            text_layers: blocks of the transformer over the text encoder's tokens.
            embedding_size: numbers of the vector of an image or of a caption.
            noisy: the image may be noisy, and its time is given (GLIDE, Nichol et al. 2022, arXiv 2112.10741).
            loss: that it is trained with: ``contrastive`` among all captions of a batch, or ``sigmoid``, each pair by itself.
        """
        super().__init__()
        sizes = {
            **dict(in_channels=in_channels, sample_size=sample_size, patch_size=patch_size, width=width),
            **dict(num_layers=num_layers, num_attention_heads=num_attention_heads, caption_channels=caption_channels),
            **dict(text_layers=text_layers, embedding_size=embedding_size),
        }
        _check(sizes, mlp_ratio, loss)
        self.gradient_checkpointing = False
        # a convolution before the patches: with it, transformers learn in fewer steps (Xiao et al. 2021, arXiv 2106.14881)
        stem = nn.Conv2d(in_channels, width // 2, 3, padding=1)
        self.patch_embed = nn.Sequential(stem, nn.GELU(), nn.Conv2d(width // 2, width, patch_size, stride=patch_size))
        self.time_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0) if noisy else None
        self.time_embed = TimestepEmbedding(256, width) if noisy else None
        self.text_embed = nn.Sequential(LayerNorm(caption_channels), nn.Linear(caption_channels, width))
        self.image_blocks, self.text_blocks = (
            nn.ModuleList(MatcherBlock(width, num_attention_heads, mlp_ratio) for _ in range(number))
            for number in (num_layers, text_layers)
        )
        self.image_norm, self.text_norm = LayerNorm(width), LayerNorm(width)
        self.image_proj, self.text_proj = (nn.Linear(width, embedding_size, bias=False) for _ in range(2))
        # of one number, not of none: FSDP shards no scalars
        self.log_scale = nn.Parameter(torch.tensor([math.log(SCALES[loss])]))
        self.bias = nn.Parameter(torch.tensor([BIAS])) if loss == "sigmoid" else None

    def forward(self, images: Tensor, t: Tensor | None, text: Tensor, mask: Tensor) -> Matched:
        """Images and captions of a batch; the arguments are those of :meth:`encode_images` and :meth:`encode_texts`."""
        found, texts = self.encode_images(images, t).float(), self.encode_texts(text, mask).float()
        scale = self.log_scale.float().exp().clamp(max=MAX_SCALE)
        bias = torch.zeros_like(scale) if self.bias is None else self.bias.float()
        return Matched(F.normalize(found, dim=1), F.normalize(texts, dim=1), scale, bias)

    def encode_images(self, images: Tensor, t: Tensor | None = None) -> Tensor:
        """Normalised latents or pixels (B, C, H, W), and with ``noisy`` their times in [0, 1] (B,), by default 0, for no noise
        -> (B, E)."""
        height, width = (side // self.config["patch_size"] for side in images.shape[2:])
        if min(height, width) < 1 or [height, width] != [side / self.config["patch_size"] for side in images.shape[2:]]:
            raise UsageError(
                f"latents of {images.shape[3]} x {images.shape[2]} are not multiples of the matcher's patch_size "
                f"{self.config['patch_size']}; change the images' size"
            )
        span = self.config["sample_size"] // self.config["patch_size"]
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = x + position_embedding(x.shape[2], height, width, span, x.device)
        if self.time_features is not None and self.time_embed is not None:
            t = torch.zeros(len(x), device=x.device) if t is None else t
            x = x + self.time_embed(self.time_features(1000 * t).to(x.dtype))[:, None]
        elif t is not None:
            raise UsageError("the matcher was made for images without noise and takes no time; train one with noisy true")
        x = self._blocks(self.image_blocks, x, None)
        return self.image_proj(self.image_norm(x).mean(1))

    def encode_texts(self, text: Tensor, mask: Tensor) -> Tensor:
        """Token embeddings (B, L, C) of a text encoder, and their mask (B, L), 0 for padding -> (B, E)."""
        x = self._blocks(self.text_blocks, self.text_embed(text), mask.bool()[:, None, None])
        return self.text_proj(mean_token(self.text_norm(x), mask[..., None].to(x.dtype)))

    def _blocks(self, blocks: nn.ModuleList, x: Tensor, mask: Tensor | None) -> Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(block, x, mask, use_reentrant=False))
            else:
                x = block(x, mask)
        return x


def _check(sizes: dict[str, int], mlp_ratio: float, loss: str) -> None:
    """Raise UsageError for a config of which no network can be made."""
    for name, value in sizes.items():
        limit = MAX_LAYERS if name.endswith("layers") else 2**24
        if type(value) is not int or not 1 <= value <= limit:
            raise UsageError(f"Matcher: {name} is {value!r}; give a whole number from 1 to {limit}")
    if not (isinstance(mlp_ratio, int | float) and 0 < mlp_ratio < math.inf):
        raise UsageError(f"Matcher: mlp_ratio is {mlp_ratio!r}; give a number greater than 0")
    for name, divisor in (("num_attention_heads ", sizes["num_attention_heads"]), ("", 4)):
        if sizes["width"] % divisor:
            raise UsageError(f"Matcher: width {sizes['width']} is not a multiple of {name}{divisor}")
    if sizes["sample_size"] % sizes["patch_size"]:
        raise UsageError(f"Matcher: sample_size {sizes['sample_size']} is not a multiple of patch_size {sizes['patch_size']}")
    if loss not in SCALES:
        raise UsageError(f"Matcher: loss is {loss!r}; choose from: {', '.join(SCALES)}")


# -- the directory -------------------------------------------------------------------------------------------------------

LatentShape = Annotated[list[Annotated[int, Field(ge=1, le=2**16)]], Field(min_length=3, max_length=3)]
_PARTS = {"autoencoder": "vae", "text_encoder": "text_encoder", "latent_statistics": "vae"}  # and their folders


class TrainedOn(TypedDict):
    """What a matcher was trained with: sha256 of the networks and of the latents' statistics; C, h, w of the latents of most
    images, and of all sizes where there are several."""

    autoencoder: str
    text_encoder: str
    latent_statistics: str
    latent_shape: LatentShape
    latent_shapes: NotRequired[Annotated[list[LatentShape], Field(min_length=1)]]


class MatcherIndex(TypedDict):
    """``matcher.json``."""

    format_version: Any
    matcher: str  # sha256 of its weights and config
    trained_on: TrainedOn
    path: dict[str, Any] | None  # the probability path of its noise, class_path and init_args; None: it knows none


@dataclass
class ImageTextModel:
    """A trained matcher with the networks that it was trained with, for images and texts as they are.

    Attributes:
        matcher, autoencoder, text_encoder: on one device; the statistics of the latents are in the autoencoder's config.
        trained_on: see :class:`TrainedOn`.
        path: see :class:`MatcherIndex`.
    """

    matcher: Matcher
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    trained_on: TrainedOn
    path: dict[str, Any] | None = None

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of the images that it was trained on, the most frequent first."""
        factor = downsampling_factor(self.autoencoder)
        shapes = self.trained_on.get("latent_shapes") or [self.trained_on["latent_shape"]]
        return [(height * factor, width * factor) for _, height, width in shapes]

    @cached_property
    def hash(self) -> str:
        """Hex sha256 of all that determines its vectors."""
        known = json.dumps([matcher_hash(self.matcher), self.trained_on], sort_keys=True)
        return hashlib.sha256(known.encode()).hexdigest()

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] of any size, on its device -> (B, E). They are resized, if need be, to that size
        trained on whose proportions are the nearest, with a bicubic filter against aliasing."""
        height, width = images.shape[2:]
        if (height, width) not in self.sizes:
            size = min(self.sizes, key=lambda size: abs(math.log(size[0] * width / (size[1] * height))))
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.matcher.encode_images(encode_latents(self.autoencoder, images)).float()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, E); cut where the text encoder takes no more."""
        embeddings, mask = self.text_encoder.encode(texts)
        return self.matcher.encode_texts(embeddings, mask).float()

    def save(self, folder: Path) -> None:
        """Write all parts, and ``matcher.json`` with their fingerprints, into an empty folder."""
        self.matcher.save_pretrained(folder / "matcher")
        cast(Any, self.autoencoder).save_pretrained(folder / "vae")
        self.text_encoder.model.save_pretrained(folder / "text_encoder")
        self.text_encoder.tokenizer.save_pretrained(folder / "tokenizer")
        found = {"format_version": FORMAT_VERSION, "matcher": matcher_hash(self.matcher), "trained_on": self.trained_on}
        write_json(folder / INDEX_NAME, found | {"path": self.path})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> ImageTextModel:
        """That of a directory of :meth:`save`, frozen. Raises UsageError for another one, and for parts that have changed."""
        folder = Path(path)
        if not is_matcher(folder):
            raise UsageError(f"{folder} is not the directory of a matcher (no {INDEX_NAME}); train one: ldm matcher fit")
        index = read_json(folder / INDEX_NAME, MatcherIndex)
        require_version(index["format_version"], FORMAT_VERSION, f"{folder / INDEX_NAME}: the matcher")
        autoencoder, text_encoder = (
            load_autoencoder(folder / "vae", device),
            TextEncoder.load(str(folder / "text_encoder"), device),
        )
        made = cls(_load_network(folder / "matcher", device), autoencoder, text_encoder, index["trained_on"], index["path"])
        found = {
            "autoencoder": autoencoder_hash(autoencoder),
            "text_encoder": text_encoder.hash,
            "latent_statistics": statistics_hash(autoencoder),
        }
        changed = [f"{_PARTS[part]}/" for part, value in found.items() if value != index["trained_on"][part]]
        if matcher_hash(made.matcher) != index["matcher"]:
            changed.append("matcher/")
        if changed:
            raise UsageError(f"{folder}: {', '.join(dict.fromkeys(changed))} is not what was saved; put it back")
        return made


def matcher_hash(matcher: Matcher) -> str:
    """Hex sha256 of weights and config."""
    config = {name: value for name, value in matcher.config.items() if not name.startswith("_")}
    return network_hash(matcher, config)


def is_matcher(path: str | Path) -> bool:
    """Whether it is the directory of a saved matcher."""
    return os.path.lexists(Path(path) / INDEX_NAME)


def _load_network(folder: Path, device: torch.device | str) -> Matcher:
    """The network alone."""
    if not (folder / "config.json").exists():
        raise UsageError(f"{folder} does not exist or has no config.json; restore it")
    require_regular_files(folder)
    read_config(folder / "config.json")
    with loading(f"{folder} cannot be loaded as a matcher", "restore it"):
        options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True, "disable_mmap": True}
        matcher, info = cast("tuple[Matcher, dict[str, Any]]", Matcher.from_pretrained(folder, **options))
    if missing := info["missing_keys"]:
        raise UsageError(f"{folder} lacks {len(missing)} weights of a matcher, {missing[0]} first; restore it")
    nn.Module.to(matcher, device)
    return matcher.eval().requires_grad_(False)
