"""Pixels as latents, for denoisers that are trained on the images themselves (JiT, Li & He 2025, arXiv 2511.13720)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


class PixelAutoencoder(ModelMixin, AutoencoderMixin, ConfigMixin):
    """Its latents are the images (B, 3, H, W) in [−1, 1]. It is called and saved like diffusers' autoencoders."""

    unit: Tensor

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 3,
        scaling_factor: float = 1.0,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ):
        """The arguments are those of ``AutoencoderKL``; ``latent_channels`` is 3."""
        super().__init__()
        self.use_tiling = self.use_slicing = False  # pixels need neither
        # diffusers takes a network's device and dtype from its weights
        self.register_buffer("unit", torch.ones(()))

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        return EncoderOutput(latent=x) if return_dict else (x,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        return DecoderOutput(sample=z) if return_dict else (z,)
