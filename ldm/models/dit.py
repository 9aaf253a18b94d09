"""A diffusion transformer with text cross-attention (Peebles & Xie 2022, arXiv 2212.09748; PixArt-α, 2310.00426).

It is called like diffusers' ``PixArtTransformer2DModel``, so that either can replace the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UsageError
from ldm.models.compiling import any_length
from ldm.models.directories import MAX_LAYERS
from ldm.models.layers import (
    Activation,
    Attention,
    FeedForward,
    KeysValues,
    LayerNorm,
    Modulation,
    Norm,
    Rotation,
    is_autocast,
    make_norm,
    modulate,
    position_embedding,
    rotary_embedding,
)

AdaLN = Literal["single", "zero"]
Positions = Literal["sincos", "rope", "sincos_rope"]
NUM_SIZES = 6  # of micro-conditioning: see ldm.diffusion.conditioning.micro_conditions
Pooling = Literal["mean", "last", "none"]
CHOICES = {
    "pooled_text": get_args(Pooling),
    "adaln": get_args(AdaLN),
    "norm": get_args(Norm),
    "activation": get_args(Activation),
    "positions": get_args(Positions),
}


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the time modulates the first and the last."""

    def __init__(
        self,
        width: int,
        num_attention_heads: int,
        mlp_ratio: float,
        norm: Norm = "layer_norm",
        activation: Activation = "gelu",
        qk_norm: bool = True,
        modulation_table: bool = True,
    ):
        """``modulation_table``: add a learned table per block to the modulation, which all blocks share (adaLN-single)."""
        super().__init__()
        self.norm1 = make_norm(norm, width)
        self.attention = Attention(width, num_attention_heads, qk_norm=qk_norm, norm=norm)
        self.norm_text = make_norm(norm, width, affine=True)
        self.text_attention = Attention(width, num_attention_heads, context_width=width, qk_norm=qk_norm, norm=norm)
        self.norm2 = make_norm(norm, width)
        self.feed_forward = FeedForward(width, mlp_ratio, activation)
        self.modulation_table = nn.Parameter(torch.zeros(6, width)) if modulation_table else None

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor | KeysValues,
        text_mask: Tensor | None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """x (B, N, D), modulation (B, 6, D), text (B, L, D) or its keys and values, text_mask (B, 1, 1, L) -> (B, N, D)."""
        if self.modulation_table is not None:
            modulation = self.modulation_table + modulation
        parts = modulation[:, :, None].unbind(1)  # six of (B, 1, D)
        to_attention, to_feed_forward = Modulation(*parts[:3]), Modulation(*parts[3:])
        attended = self.attention(modulate(self.norm1(x), to_attention), rotation=rotation)
        x = torch.addcmul(x, to_attention.gate, attended)
        x = x + self.text_attention(self.norm_text(x), text, text_mask)
        return torch.addcmul(x, to_feed_forward.gate, self.feed_forward(modulate(self.norm2(x), to_feed_forward)))

    def text_keys_values(self, text: Tensor) -> KeysValues:
        """Keys and values of the text tokens (B, L, D), which :meth:`forward` takes in their place."""
        return self.text_attention.keys_values(text)


class DiTOutputLayer(nn.Module):
    """The last layers of a :class:`DiT`, whose own they are, as one module to be compiled. It has no weights."""

    def forward(self, norm: nn.Module, projection: nn.Module, x: Tensor, modulation: Tensor) -> Tensor:
        """x (B, N, D), modulation (B, 2·D) -> (B, N, patch²·C)."""
        shift, scale = modulation[:, None].chunk(2, dim=-1)  # each (B, 1, D)
        return projection(norm(x) * (1 + scale) + shift)


class EncodedText(NamedTuple):
    """A batch of captions as the blocks take them; see :meth:`DiT.encode_text`."""

    pooled: Tensor | None  # (B, D), added to the time embedding
    for_blocks: Sequence[Tensor | KeysValues]  # one per block: tokens (B, L, D), or their keys and values
    mask: Tensor | None  # (B, 1, 1, L), None if nothing is padding

    def allow_any_length(self) -> None:
        """Let compiled blocks take captions of all lengths L by one graph."""
        for given in self.for_blocks:
            for tensor in given if isinstance(given, KeysValues) else [given]:
                any_length(tensor, tensor.ndim - 2)
        if self.mask is not None:
            any_length(self.mask, 3)


@dataclass
class DiTOutput(Transformer2DModelOutput):
    """``sample`` (B, C, H, W), and ``activations``: number of a requested block -> its output (B, N, D)."""

    activations: dict[int, Tensor] = field(default_factory=dict)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        limit = MAX_LAYERS if name == "num_layers" else math.inf
        if type(value) is not int or not 1 <= value <= limit:
            raise UsageError(f"DiT: {name} is {value!r}; give a whole number from 1" + f" to {limit}" * (limit < math.inf))


def _check_choices(**choices: str) -> None:
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise UsageError(f"DiT: {name} is {value!r}; choose from: {', '.join(CHOICES[name])}")


def _patch_embed(in_channels: int, patch_size: int, bottleneck: int | None, width: int) -> nn.Module:
    """Latents (B, C, H, W) -> patches as tokens (B, D, H / patch, W / patch)."""
    if bottleneck is None:
        return nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
    _check_sizes(patch_bottleneck=bottleneck)
    project = nn.Conv2d(in_channels, bottleneck, patch_size, stride=patch_size, bias=False)
    return nn.Sequential(project, nn.Conv2d(bottleneck, width, 1))


def caption_widths(caption_channels: int | Sequence[int]) -> list[int]:
    """Features per token of each text encoder, from the config of a denoiser."""
    return [*caption_channels] if isinstance(caption_channels, (list, tuple)) else [cast(int, caption_channels)]


def pooling_of(pooled_text: bool | Sequence[Pooling], caption_channels: int | Sequence[int]) -> list[Pooling]:
    """How the tokens of each text encoder are pooled. Raises UsageError where the lists are of different lengths."""
    number = len(caption_widths(caption_channels))
    if isinstance(pooled_text, bool):
        return ["mean" if pooled_text else "none"] * number
    if len(pooled_text) != number or not number:
        raise UsageError(
            f"DiT: pooled_text is of {len(pooled_text)} text encoders, caption_channels of {number}; give one each"
        )
    return [*pooled_text]


def mean_token(tokens: Tensor, weights: Tensor) -> Tensor:
    """The mean (B, D) of those tokens (B, L, D) whose weights (B, L, 1) are 1."""
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def last_token(tokens: Tensor, weights: Tensor) -> Tensor:
    """The last (B, D) of those tokens (B, L, D) whose weights (B, L, 1) are 1."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[:, None] * weights.bool()  # (B, L, 1)
    return tokens.gather(1, places.argmax(1, keepdim=True).expand(-1, 1, tokens.shape[-1]))[:, 0]


def _text_projections(channels: int, width: int, pooling: Pooling) -> dict[str, nn.Module]:
    """The projections of one text encoder's tokens and, unless there is none, of its pooled vector."""
    embed = nn.Sequential(LayerNorm(channels), nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width))
    if pooling == "none":
        return {"text_embed": embed}
    return {"text_embed": embed, "pooled_embed": nn.Sequential(LayerNorm(channels), nn.Linear(channels, width))}


class DiT(ModelMixin, PeftAdapterMixin, ConfigMixin):
    """Noisy latents, a time and a caption -> the prediction, in the shape of the latents.

    diffusers' ``enable_gradient_checkpointing()`` and ``compile_repeated_blocks()`` work on it.
    """

    blocks: nn.ModuleList

    _supports_gradient_checkpointing = True
    _no_split_modules = ("DiTBlock",)
    _repeated_blocks = ("DiTBlock",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 32,
        patch_size: int = 2,
        width: int = 384,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        mlp_ratio: float = 4.0,
        caption_channels: int | list[int] = 384,
        pooled_text: bool | list[Pooling] = True,
        adaln: AdaLN = "single",
        norm: Norm = "layer_norm",
        activation: Activation = "gelu",
        qk_norm: bool = True,
        positions: Positions = "sincos",
        micro_conditioning: bool = False,
        patch_bottleneck: int | None = None,
    ):
        """
        Args:
            in_channels: channels of the latents, 3 for pixels.
            sample_size: side of the grid of positions, in latent pixels: positions in latents of any height and width are
                scaled to it, each axis by itself, as PixArt does. The side of the latents in training, or in the first stage
                of several of rising resolution.
            patch_size: side of a token, in latent pixels.
            width: features per token; a multiple of 4.
            num_layers: number of blocks.
            num_attention_heads: attention heads; must divide ``width``.
            mlp_ratio: hidden features of the feed-forward, as a multiple of ``width``.
            caption_channels: features per token of the text encoder; a list for several encoders, whose tokens are projected
                separately and attended to together.
            pooled_text: also add the mean of the text tokens to the time embedding, so that the caption as a whole reaches
                every layer directly; small models learn the meaning of words sooner. A list says it for each text encoder:
                ``mean``, ``last`` (the last token: the pooled vector of CLIP, and the only token of a causal language model
                that has seen the whole caption) or ``none``. The projected vectors are added.
            adaln: how the time reaches the blocks: ``single``, one projection for all blocks and a table per block
                (PixArt-α), or ``zero``, a projection per block (DiT), with a third more parameters.
            norm: of tokens, queries and keys. On a CPU ``layer_norm`` is faster.
            activation: of the feed-forward. ``swiglu`` gets two thirds of the hidden features, for equal parameters.
            qk_norm: normalise queries and keys, for stability at high learning rates.
            positions: ``sincos`` is added to the tokens, ``rope`` rotates queries and keys of self-attention by their
                position, ``sincos_rope`` does both (LightningDiT, Yao et al. 2025, arXiv 2501.01423).
            micro_conditioning: also condition on the size of the original image, on where it was cropped, and on the size in
                pixels, embedded and added to the time embedding (SDXL, Podell et al. 2023, arXiv 2307.01952), so that a model
                trained on small and on cropped images need not generate blurred or cut ones.
            patch_bottleneck: features that a patch is projected to before it becomes a token, by a linear layer without an
                activation between the two, for large patches of pixels (JiT, Li & He 2025, arXiv 2511.13720); None: a patch
                becomes a token at once.
        """
        super().__init__()
        _check_sizes(
            in_channels=in_channels,
            sample_size=sample_size,
            patch_size=patch_size,
            width=width,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
        )
        widths, pooling = caption_widths(caption_channels), pooling_of(pooled_text, caption_channels)
        for channels, pooled in zip(widths, pooling, strict=True):
            _check_sizes(caption_channels=channels)
            _check_choices(pooled_text=pooled)
        _check_choices(adaln=adaln, norm=norm, activation=activation, positions=positions)
        if not (isinstance(mlp_ratio, (int, float)) and 0 < mlp_ratio < math.inf):
            raise UsageError(f"DiT: mlp_ratio is {mlp_ratio!r}; give a number greater than 0")
        if "rope" in positions and width % (4 * num_attention_heads):
            raise UsageError(f"DiT: positions {positions} needs a width that is a multiple of 4 x {num_attention_heads} heads")
        for name, divisor in (("num_attention_heads ", num_attention_heads), ("", 4)):
            if width % divisor:
                raise UsageError(f"DiT: width {width} is not a multiple of {name}{divisor}")
        if sample_size % patch_size:
            raise UsageError(f"DiT: sample_size {sample_size} is not a multiple of patch_size {patch_size}")
        self.gradient_checkpointing = False
        self.patch_embed = _patch_embed(in_channels, patch_size, patch_bottleneck, width)
        self.time_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, width)
        projections = [_text_projections(channels, width, pooled) for channels, pooled in zip(widths, pooling, strict=True)]
        self.text_embed, self.pooled_embed = projections[0]["text_embed"], projections[0].get("pooled_embed")
        self.further_texts = nn.ModuleList(map(nn.ModuleDict, projections[1:]))
        self.size_embed = TimestepEmbedding(NUM_SIZES * 256, width) if micro_conditioning else None
        # adaLN-zero's projections are stacked into one linear layer: a single matrix product for all blocks
        stacked = num_layers if adaln == "zero" else 1
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, stacked * 6 * width))
        self.blocks = nn.ModuleList(
            [
                DiTBlock(width, num_attention_heads, mlp_ratio, norm, activation, qk_norm, adaln == "single")
                for _ in range(num_layers)
            ]
        )
        self.norm_out = make_norm(norm, width)
        self.modulation_out = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.proj_out = nn.Linear(width, patch_size**2 * in_channels)
        self.output = DiTOutputLayer()
        self._initialise()

    def _initialise(self) -> None:
        """Every block starts as the identity, and the network's output as zero (adaLN-zero)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        for layer in self.patch_embed.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.flatten(1))
        for embed in filter(None, (self.time_embed, self.size_embed)):
            nn.init.normal_(embed.linear_1.weight, std=0.02)
            nn.init.normal_(embed.linear_2.weight, std=0.02)
        to_text = [cast(DiTBlock, block).text_attention.to_out for block in self.blocks]
        for linear in (self.modulation[1], self.modulation_out[1], self.proj_out, *to_text):
            nn.init.zeros_(cast(nn.Linear, linear).weight)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | EncodedText,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        return_activations: Sequence[int] = (),
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> DiTOutput | tuple[Tensor] | tuple[Tensor, dict[int, Tensor]]:
        """
        Args:
            hidden_states: noisy latents (B, C, H, W).
            encoder_hidden_states: text embeddings (B, L, caption_channels), of several encoders filled up with zeros to the
                widest; or the result of :meth:`encode_text`.
            timestep: (B,), in the units of the path's ``network_time``.
            encoder_attention_mask: (B, L), 0 for padding and 1 for tokens, of several encoders the number of a token's from 1;
                None if nothing is padding.
            return_activations: numbers of the blocks, from 0, whose outputs to return.
            added_cond_kwargs: with ``micro_conditioning`` its ``time_ids`` (B, 6), those of SDXL: see
                :func:`ldm.diffusion.conditioning.micro_conditions`.

        Raises:
            UsageError: for latents, text embeddings or block numbers that do not fit the network.
        """
        config, patch = self.config, self.config["patch_size"]
        height, width = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        if (height * patch, width * patch) != tuple(hidden_states.shape[-2:]):
            raise UsageError(
                f"latents of {tuple(hidden_states.shape[-2:])} are not divisible by patch_size {patch}; change either"
            )
        if unknown := [number for number in return_activations if not 0 <= number < len(self.blocks)]:
            raise UsageError(f"there is no block {unknown[0]} to return; give numbers from 0 to {len(self.blocks) - 1}")
        grid = (height, width, config["sample_size"] // patch, hidden_states.device)
        dtype = self._token_dtype(hidden_states)
        x = self.patch_embed(hidden_states.to(dtype)).flatten(2).transpose(1, 2)
        # Without contiguous() all later sums keep the memory layout of an image: 1.4x the time of a bf16 forward on a CPU.
        x = x.contiguous().to(dtype)  # (B, N, D)
        if "sincos" in config["positions"]:
            x = x + position_embedding(config["width"], *grid).to(x)
        rotation = None
        if "rope" in config["positions"]:
            rotation = rotary_embedding(config["width"] // config["num_attention_heads"], *grid)
        if isinstance(encoder_hidden_states, EncodedText):
            text = encoder_hidden_states
        else:
            # trimming reads the mask's values, which on a GPU would synchronise with the host at every step
            trim = encoder_hidden_states.device.type == "cpu"
            sizes = (added_cond_kwargs or {}).get("time_ids")
            text = self._embed_text(encoder_hidden_states, encoder_attention_mask, sizes, trim)
        time = self.time_embed(self.time_features(timestep.expand(len(x))).to(dtype))  # (B, D)
        if text.pooled is not None:
            time = time + text.pooled
        modulation = self.modulation(time).to(dtype)
        modulations = modulation.unflatten(1, (-1, 6, config["width"])).unbind(1)  # 1 or num_layers of (B, 6, D)
        modulations *= len(self.blocks) // len(modulations)
        text.allow_any_length()
        activations = {}
        for number, (block, modulation, tokens) in enumerate(zip(self.blocks, modulations, text.for_blocks, strict=True)):
            arguments = (x, modulation, tokens, text.mask, rotation)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
            if number in return_activations:
                activations[number] = x
        x = self.output(self.norm_out, self.proj_out, x, self.modulation_out(time).to(dtype))  # (B, N, patch²·C)
        x = x.unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))  # (B, h, w, p, p, C)
        sample = x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *hidden_states.shape[-2:])  # (B, C, H, W)
        if return_dict:
            return DiTOutput(sample, activations)
        return (sample, activations) if return_activations else (sample,)

    def _token_dtype(self, x: Tensor) -> torch.dtype:
        """dtype of the tokens, which are sums over all blocks, of the norms and of the modulation: fp32 under autocast, and
        else that of the weights, which FSDP gathers in bf16."""
        return torch.float32 if is_autocast(x) else self.dtype

    @apply_forward_hook
    def encode_text(
        self, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None = None, time_ids: Tensor | None = None
    ) -> EncodedText:
        """The part of :meth:`forward` that depends on captions and sizes alone, for a sampler to compute once.

        The result takes the place of ``encoder_hidden_states`` in :meth:`forward`; the arguments are as there.
        """
        text = self._embed_text(encoder_hidden_states, encoder_attention_mask, time_ids, trim=True)
        (tokens, *_) = text.for_blocks
        return text._replace(for_blocks=[cast(DiTBlock, block).text_keys_values(cast(Tensor, tokens)) for block in self.blocks])

    def _embed_text(self, embeddings: Tensor, mask: Tensor | None, sizes: Tensor | None, trim: bool) -> EncodedText:
        """``trim``: cut padding that all captions share, and drop the mask where no padding is left."""
        if embeddings.shape[-1] != (widest := max(caption_widths(self.config["caption_channels"]))):
            raise UsageError(
                f"text embeddings are {embeddings.shape[-1]} wide, but the denoiser takes {widest}; "
                "encode captions with the text encoder that it was trained with, or change caption_channels"
            )
        text = embeddings.to(self._token_dtype(embeddings))
        if mask is not None and trim:
            length = 1 + max(mask.any(0).nonzero().flatten().tolist(), default=0)
            text, mask = text[:, :length], mask[:, :length]
        tokens, pooled = self._project_text(text, mask)
        if mask is not None:
            mask = None if trim and mask.all() else mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        if self.size_embed is not None:
            if sizes is None or sizes.shape != (len(text), NUM_SIZES):
                found = "none" if sizes is None else tuple(sizes.shape)
                raise UsageError(f"a denoiser with micro_conditioning takes time_ids ({len(text)}, {NUM_SIZES}), found {found}")
            embedded = self.size_embed(self.time_features(sizes.flatten()).view(len(text), -1).to(text.dtype))
            pooled = embedded if pooled is None else pooled + embedded
        return EncodedText(pooled, [tokens] * len(self.blocks), mask)

    def _project_text(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, L, D) and, where any is pooled, the sum of the pooled vectors (B, D) of all text encoders."""
        channels, pooled_text = self.config["caption_channels"], self.config["pooled_text"]
        widths, pooling = caption_widths(channels), pooling_of(pooled_text, channels)
        embeds = [self.text_embed, *(cast(nn.ModuleDict, one)["text_embed"] for one in self.further_texts)]
        pools = [self.pooled_embed, *(dict(cast(nn.ModuleDict, one).items()).get("pooled_embed") for one in self.further_texts)]
        if mask is None and len(widths) > 1:
            raise UsageError("tokens of several text encoders need the mask that says which encoder's each is; give it")
        tokens, vectors = [], []
        for number, (width, embed, pool, how) in enumerate(zip(widths, embeds, pools, pooling, strict=True), 1):
            own = text[..., :width]
            weights = (
                torch.ones_like(text[..., :1]) if mask is None else (mask == number).to(text.dtype)[..., None]
            )  # (B, L, 1)
            projected = embed(own)
            tokens.append(projected if len(widths) == 1 else projected * weights.to(projected.dtype))
            if pool is not None:
                vectors.append(pool(last_token(own, weights) if how == "last" else mean_token(own, weights)))
        return (tokens[0] if len(tokens) == 1 else sum(tokens)), (sum(vectors) if vectors else None)  # pyright: ignore[reportReturnType]


def transformer_blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a denoiser: items of its module lists whose class it names as diffusers' models do. Raises
    UsageError for a network that does not name the class of its blocks."""
    # of diffusers' two attributes, PixArt has only the second
    names = getattr(network, "_repeated_blocks", None) or getattr(network, "_no_split_modules", None) or ()
    items = (item for modules in network.modules() if isinstance(modules, nn.ModuleList) for item in modules)
    # FSDP replaces the class of each by a subclass
    blocks = [item for item in items if any(kind.__name__ in names for kind in type(item).__mro__)]
    if not blocks:
        raise UsageError(
            f"{type(network).__name__} does not name the class of its blocks in _repeated_blocks, as compiling, FSDP and Muon "
            "need; name it there, or train with DDP and AdamW, without compiling"
        )
    return blocks
