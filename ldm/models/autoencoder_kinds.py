"""The classes of autoencoders whose latents a denoiser can be trained on, and the configs that each may have."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from pydantic import AfterValidator, Field, FiniteFloat
from typing_extensions import TypedDict

from ldm.models.pixels import PixelAutoencoder

MAX_LAYERS = 64  # blocks per level

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderKLFlux2 | AutoencoderDC | AutoencoderTiny | PixelAutoencoder

# What a config.json may hold. The bounds are far beyond any that is in use.
_Side = Annotated[int, Field(ge=1, le=2**16)]
_Count = Annotated[int, Field(ge=0, le=MAX_LAYERS)]
_Counts = Annotated[list[_Count], Field(min_length=1, max_length=12)]
_Widths = Annotated[list[Annotated[int, Field(ge=1, le=2**16)]], Field(min_length=1, max_length=12)]
_Colours = Annotated[int, Field(ge=3, le=3)]


def _blocks_after_first(counts: list[int]) -> list[int]:
    if not all(counts[1:]):
        raise ValueError("a level after the first should have 1 or more")
    return counts


class _Config(TypedDict, total=False):
    """Of any class."""

    in_channels: _Colours
    out_channels: _Colours
    latent_channels: Annotated[int, Field(ge=1, le=2**16)]
    force_upcast: bool | float
    scaling_factor: Annotated[FiniteFloat, Field(gt=0)]
    shift_factor: FiniteFloat | None
    latents_mean: list[FiniteFloat] | None
    latents_std: list[Annotated[FiniteFloat, Field(gt=0)]] | None


class _KLConfig(_Config, total=False):
    block_out_channels: _Widths
    layers_per_block: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    norm_num_groups: Annotated[int, Field(ge=1, le=2**16)]
    sample_size: _Side | Annotated[list[_Side], Field(min_length=2, max_length=2)]
    mid_block_add_attention: bool
    use_quant_conv: bool
    use_post_quant_conv: bool


class _Flux2Config(_KLConfig, total=False):
    decoder_block_out_channels: _Widths | None
    patch_size: Annotated[list[Annotated[int, Field(ge=1, le=16)]], Field(min_length=2, max_length=2)]
    batch_norm_eps: Annotated[FiniteFloat, Field(gt=0)]


class _DCConfig(_Config, total=False):
    attention_head_dim: Annotated[int, Field(ge=1, le=2**16)]
    encoder_block_out_channels: _Widths
    decoder_block_out_channels: _Widths
    # without blocks, the first level halves the image at once, and another none
    encoder_layers_per_block: Annotated[_Counts, AfterValidator(_blocks_after_first)]
    decoder_layers_per_block: Annotated[_Counts, AfterValidator(_blocks_after_first)]


class _TinyConfig(_Config, total=False):
    encoder_block_out_channels: _Widths
    decoder_block_out_channels: _Widths
    num_encoder_blocks: _Counts
    num_decoder_blocks: _Counts
    upsampling_scaling_factor: Literal[2]


class _PixelConfig(_Config, total=False):
    latent_channels: _Colours


class Kind(NamedTuple):
    """A class of autoencoders.

    Attributes:
        network: the class.
        config: what its config.json may hold.
        levels: entries of the config with an item for each level; each level after the first halves the image.
        posterior: whether it encodes an image to a Gaussian; otherwise to one latent.
    """

    network: type[Any]
    config: type[Any]
    levels: tuple[str, ...]
    posterior: bool


_KL_LEVELS = ("block_out_channels", "down_block_types", "up_block_types")
_ENDS = ("encoder", "decoder")
_DC_LEVELS = tuple(f"{end}_{name}" for name in ("block_out_channels", "layers_per_block", "qkv_multiscales") for end in _ENDS)
_TINY_LEVELS = tuple(name.format(end) for name in ("num_{}_blocks", "{}_block_out_channels") for end in _ENDS)

KINDS = {
    kind.network.__name__: kind
    for kind in (
        Kind(AutoencoderKL, _KLConfig, _KL_LEVELS, posterior=True),
        Kind(AutoencoderKLFlux2, _Flux2Config, _KL_LEVELS, posterior=True),
        Kind(AutoencoderDC, _DCConfig, _DC_LEVELS, posterior=False),
        Kind(AutoencoderTiny, _TinyConfig, _TINY_LEVELS, posterior=False),
        Kind(PixelAutoencoder, _PixelConfig, (), posterior=False),
    )
}


def kind_of(autoencoder: object) -> Kind | None:
    """The kind of a network, None for other networks. FSDP makes a subclass of each class."""
    return next((kind for kind in KINDS.values() if isinstance(autoencoder, kind.network)), None)
