"""A diffusion transformer with text cross-attention (Peebles & Xie 2022, arXiv 2212.09748; PixArt-α, 2310.00426).

Its call is that of diffusers' ``PixArtTransformer2DModel``, so that either stands in for the other from YAML.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UsageError
from ldm.models.layers import Attention, FeedForward, Modulation, modulate, position_embedding


class DiTBlock(nn.Module):
    """Self-attention, text cross-attention, feed-forward. The time modulates the first and the last (adaLN-single: one
    projection for all blocks, plus a learned table per block)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, num_heads)
        self.norm_text = nn.LayerNorm(width, eps=1e-6)
        self.text_attention = Attention(width, num_heads, context_width=width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.feed_forward = FeedForward(width, mlp_ratio)
        self.modulation_table = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, modulation: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        """x (B, N, D), modulation (B, 6, D), text (B, L, D), text_mask (B, 1, 1, L) -> (B, N, D)."""
        parts = (self.modulation_table + modulation)[:, :, None].unbind(1)  # six of (B, 1, D)
        to_attention, to_feed_forward = Modulation(*parts[:3]), Modulation(*parts[3:])
        x = x + to_attention.gate * self.attention(modulate(self.norm1(x), to_attention))
        x = x + self.text_attention(self.norm_text(x), text, text_mask)
        return x + to_feed_forward.gate * self.feed_forward(modulate(self.norm2(x), to_feed_forward))


class DiT(ModelMixin, ConfigMixin):
    """Latents, a time and a caption -> what the prediction asks for, in the shape of the latents."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ("DiTBlock",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 32,
        patch_size: int = 2,
        width: int = 384,
        num_layers: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        text_width: int = 384,
        pooled_text: bool = True,
    ):
        """
        Args:
            in_channels: channels of the latents.
            sample_size: side of the latents trained on, in latent pixels; other sizes can be drawn too.
            patch_size: side of a token, in latent pixels.
            width: features per token.
            num_layers: number of blocks.
            num_heads: attention heads; divides ``width``.
            mlp_ratio: hidden features of the feed-forward over ``width``.
            text_width: features per token of the text encoder.
            pooled_text: also add the mean of the caption's tokens to the time embedding, so that what the caption says as a
                whole reaches every layer at once; small models learn their words sooner.
        """
        super().__init__()
        if sample_size % patch_size:
            raise UsageError(f"model.denoiser: sample_size {sample_size} is not a multiple of patch_size {patch_size}")
        self.gradient_checkpointing = False
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.time_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, width)
        self.text_embed = nn.Sequential(
            nn.LayerNorm(text_width), nn.Linear(text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.pooled_embed = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width)) if pooled_text else None
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList([DiTBlock(width, num_heads, mlp_ratio) for _ in range(num_layers)])
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.proj_out = nn.Linear(width, patch_size**2 * in_channels)
        self._initialise()

    def _initialise(self) -> None:
        """Every block starts as the identity and the output as zero (adaLN-zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.config.width, -1))
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.time_embed.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear_2.weight, std=0.02)
        zero = [self.modulation[1], self.modulation_out[1], self.proj_out]
        zero += [block.text_attention.to_out for block in self.blocks]
        for linear in zero:
            nn.init.zeros_(linear.weight)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """
        Args:
            hidden_states: noisy latents (B, C, H, W).
            encoder_hidden_states: text embeddings (B, L, text_width).
            timestep: (B,), in the units of the path's ``network_time``.
            encoder_attention_mask: (B, L), 1 where a token stands, 0 where padding does.

        Returns:
            ``sample`` of shape (B, C, H, W).
        """
        patch = self.config.patch_size
        height, width = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        if (height * patch, width * patch) != tuple(hidden_states.shape[-2:]):
            raise ValueError(f"latents of {tuple(hidden_states.shape[-2:])} are not divisible by patch_size {patch}")
        text = encoder_hidden_states.to(self.dtype)
        mask = torch.ones(text.shape[:2], device=text.device) if encoder_attention_mask is None else encoder_attention_mask
        positions = position_embedding(self.config.width, height, width, self.config.sample_size // patch)
        x = self.patch_embed(hidden_states.to(self.dtype)).flatten(2).transpose(1, 2)  # (B, N, D)
        x = x + positions.to(x)
        time = self.time_embed(self.time_features(timestep.expand(len(x))).to(self.dtype))  # (B, D)
        if self.pooled_embed is not None:
            weights = mask.to(text.dtype)[..., None]
            time = time + self.pooled_embed((text * weights).sum(1) / weights.sum(1).clamp(min=1))
        modulation = self.modulation(time).unflatten(1, (6, -1))  # (B, 6, D)
        text = self.text_embed(text)  # (B, L, D)
        text_mask = mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, text, text_mask, use_reentrant=False)
            else:
                x = block(x, modulation, text, text_mask)
        shift, scale = self.modulation_out(time)[:, None].chunk(2, dim=-1)  # each (B, 1, D)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)  # (B, N, patch²·C)
        x = x.unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))  # (B, h, w, p, p, C)
        sample = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
