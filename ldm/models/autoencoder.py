"""Autoencoders and their latent spaces: the ``AutoencoderKL`` of stage one, every other of :mod:`ldm.models.autoencoder_kinds`,
and the one place where latents are normalised."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor, nn

from ldm.errors import LdmError, UsageError
from ldm.files import check_type
from ldm.models.autoencoder_kinds import KINDS, MAX_LAYERS, Autoencoder, Kind, kind_of
from ldm.models.directories import downloaded, loading, read_config, require_regular_files, variant_of
from ldm.models.fingerprint import network_hash
from ldm.models.pixels import PixelAutoencoder

IDENTITY = "identity"  # in the place of a directory: latents are pixels

log = logging.getLogger(__name__)


@dataclass
class AutoencoderConfig:
    """An ``AutoencoderKL`` (Rombach et al. 2022, arXiv 2112.10752), from scratch or from a directory of one.

    Of the first six fields, None means the directory's own value with ``init_from``, and else the default in parentheses.

    Attributes:
        block_out_channels: channels per level; each level after the first halves the image, so three levels are f4, four f8
            (128, 256, 512, 512).
        latent_channels: channels of the latents (4).
        layers_per_block: residual blocks per level of the encoder; the decoder has one more (2).
        norm_num_groups: groups of the GroupNorm; must divide all channels (32).
        mid_block_add_attention: self-attention at the lowest resolution (true).
        sample_size: side of the training images and of a tile, in pixels (256).
        init_from: an ``AutoencoderKL`` to start from (SD, SDXL, SD3, FLUX, ours): a directory, as ``save_pretrained`` writes
            it, or a name on the Hugging Face hub, such as ``stabilityai/sd-vae-ft-mse``.
        train: ``decoder`` freezes the encoder, so that the latents and their statistics stay bit for bit, and a denoiser
            trained on them remains valid.
        tiling: encode and decode images larger than ``sample_size`` in tiles, see :func:`enable_tiling`.
        slicing: encode and decode a batch image by image, which saves memory without gradients and slows training down.
    """

    block_out_channels: list[int] | None = None
    latent_channels: int | None = None
    layers_per_block: int | None = None
    norm_num_groups: int | None = None
    mid_block_add_attention: bool | None = None
    sample_size: int | None = None
    init_from: str | None = None
    train: Literal["all", "decoder"] = "all"
    tiling: bool = False
    slicing: bool = False

    @property
    def factor(self) -> int:
        """Image side over latent side."""
        return 2 ** (len(self._settings()["block_out_channels"]) - 1)

    def build(self) -> AutoencoderKL:
        """The network in training mode, with the encoder frozen if only the decoder trains. Raises UsageError for sizes that do
        not fit each other or the directory, or a directory that holds no autoencoder."""
        settings = self._settings()
        self._check(settings)
        network = self._from_directory(self.init_from, settings) if self.init_from else _from_scratch(settings)
        if self.tiling:
            enable_tiling(network)
        if self.slicing:
            network.enable_slicing()
        return network.train()

    def _settings(self) -> dict[str, Any]:
        """The first six fields with None replaced."""
        settings = {
            "block_out_channels": [128, 256, 512, 512],
            "latent_channels": 4,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "mid_block_add_attention": True,
            "sample_size": 256,
        }
        given = {field: getattr(self, field) for field in settings if getattr(self, field) is not None}
        if self.init_from:
            theirs = read_autoencoder_config(autoencoder_folder(self.init_from))
            if (kind := theirs["_class_name"]) != AutoencoderKL.__name__:
                raise UsageError(
                    f"{self.init_from} holds an {kind}, which cannot be trained, but used as it is; give an AutoencoderKL"
                )
            settings = {field: theirs[field] for field in settings} | {"sample_size": _side(theirs)}
            for field in given:
                if field != "sample_size" and given[field] != settings[field]:
                    raise UsageError(
                        f"{field} is {given[field]}, but {self.init_from} has {settings[field]}; leave {field} out, or change "
                        "init_from"
                    )
        return settings | given

    def _check(self, settings: dict[str, Any]) -> None:
        if self.train != "all" and not self.init_from:
            raise UsageError(f"train {self.train} keeps the encoder of init_from, which is missing; give it, or train: all")
        if not settings["block_out_channels"]:
            raise UsageError("block_out_channels is empty; give the channels of one level or more")
        if settings["layers_per_block"] > MAX_LAYERS:
            raise UsageError(f"layers_per_block is {settings['layers_per_block']}; give at most {MAX_LAYERS}")
        for field in ("latent_channels", "layers_per_block", "norm_num_groups", "sample_size"):
            if settings[field] < 1:
                raise UsageError(f"{field} is {settings[field]}; give 1 or more")
        for channels in settings["block_out_channels"]:
            if channels < 1 or channels % settings["norm_num_groups"]:
                raise UsageError(
                    f"block_out_channels holds {channels}, not a multiple of norm_num_groups {settings['norm_num_groups']}; "
                    "change either"
                )
        if settings["sample_size"] % self.factor:
            raise UsageError(
                f"sample_size {settings['sample_size']} is not a multiple of {self.factor}, the factor of "
                f"{len(settings['block_out_channels'])} block_out_channels; change either"
            )

    def _from_directory(self, path: str, settings: dict[str, Any]) -> AutoencoderKL:
        network = cast(AutoencoderKL, load_autoencoder(path).float()).requires_grad_(True)
        network.register_to_config(sample_size=settings["sample_size"])
        if self.train == "decoder":
            for frozen in (network.encoder, network.quant_conv):
                if frozen is not None:
                    frozen.requires_grad_(False)
        else:  # the directory's statistics will not hold for the new latents
            network.register_to_config(latents_mean=None, latents_std=None, shift_factor=None, scaling_factor=1.0)
        return network


def _from_scratch(settings: dict[str, Any]) -> AutoencoderKL:
    levels = len(settings["block_out_channels"])
    blocks: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    # scaling_factor: latents are normalised by latents_mean and latents_std instead
    network = AutoencoderKL(**blocks, **settings, scaling_factor=1.0)
    _initialise(network)
    return network


def _initialise(autoencoder: AutoencoderKL) -> None:
    """Orthogonal convolutions, residual branches that start at zero, and a narrow posterior.

    From torch's default a small autoencoder learns luminance first and leaves objects grey for long: on the built-in shapes at
    64 px it reached 19.0 dB after 120 steps, from here 22.3 (batch 8, one seed). With a posterior of standard deviation 1, the
    noise would drown the small latents of a new encoder.
    """
    for name, module in autoencoder.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight)
            nn.init.zeros_(cast(Tensor, module.bias))
        if name.endswith(".conv2"):
            nn.init.zeros_(cast(nn.Conv2d, module).weight)
    moments = cast(nn.Conv2d, autoencoder.quant_conv)  # the channels of the means, then those of the log-variances
    channels = autoencoder.config["latent_channels"]
    with torch.no_grad():
        moments.weight[channels:] = 0
        cast(Tensor, moments.bias)[channels:] = -6.0


def enable_tiling(autoencoder: Autoencoder) -> None:
    """Encode and decode images larger than its ``sample_size`` in tiles of that side, blended over a quarter of it.

    Memory then no longer grows with the image. Every tile is padded and normalised by itself, so the result differs a little
    from that of the whole image; the more, the narrower the last row or column of tiles is. Tiles begin every three quarters
    of a side. An ``AutoencoderDC`` names no size and has diffusers' own tiles of 512 pixels. Raises UsageError for an
    ``AutoencoderTiny``, which needs little memory.
    """
    if isinstance(autoencoder, AutoencoderTiny):  # diffusers' tiles of it are for 4 channels and a factor of 8 alone
        raise UsageError("an AutoencoderTiny does not work in tiles; leave tiling out")
    if isinstance(autoencoder, AutoencoderKL | AutoencoderKLFlux2):
        factor = downsampling_factor(autoencoder)
        # diffusers' tiles align only where a quarter of a tile is a whole number of latents
        tile = 4 * math.ceil(_side(autoencoder.config) / factor / 4)
        autoencoder.tile_latent_min_size, autoencoder.tile_sample_min_size = tile, tile * factor
    autoencoder.enable_tiling()


def _kind(autoencoder: object) -> Kind:
    """Raises UsageError for a network that is no known autoencoder."""
    if (kind := kind_of(autoencoder)) is None:
        raise UsageError(f"{type(autoencoder).__name__} is not among the autoencoders that can be used: {', '.join(KINDS)}")
    return kind


def downsampling_factor(autoencoder: Autoencoder) -> int:
    """Image side over latent side. Raises UsageError for any other network."""
    levels = _kind(autoencoder).levels
    return 2 ** (len(autoencoder.config[levels[0]]) - 1) if levels else 1


def has_posterior(autoencoder: Autoencoder) -> bool:
    """Whether it encodes an image to a Gaussian; otherwise to one latent, whose standard deviation is 0."""
    return _kind(autoencoder).posterior


def _side(config: Mapping[str, Any]) -> int:
    """``sample_size`` of an autoencoder's config, which may be a height and a width."""
    side = config["sample_size"]
    return side if isinstance(side, int) else max(side)


def autoencoder_folder(path: str | Path) -> Path:
    """The directory of the autoencoder at ``path``, a directory or a name on the Hugging Face hub, which may also be that of a
    pipeline: its ``vae``, which is logged."""
    place = downloaded(path, "vae")
    for folder in (place, place / "vae"):
        if os.path.lexists(folder / "config.json"):
            if folder != place:
                log.warning("%s is a pipeline, its autoencoder %s is used", path, folder)
            return folder
    raise UsageError(f"{path} is not an autoencoder directory (no config.json); train one: ldm autoencoder fit --help")


def read_autoencoder_config(folder: Path) -> dict[str, Any]:
    """The config in an autoencoder's directory, with its class, and with diffusers' defaults for missing keys. Raises
    :class:`LdmError`, naming the key, for another class, and for values that no autoencoder has."""
    path = folder / "config.json"
    config = {"_class_name": AutoencoderKL.__name__} | read_config(path)
    if (kind := KINDS.get(str(config["_class_name"]))) is None:
        raise UsageError(f"{folder} holds a network of {config['_class_name']!r}; give one of: {', '.join(KINDS)}")
    check_type(config, str(path), kind.config)
    config = {name: parameter.default for name, parameter in inspect.signature(kind.network).parameters.items()} | config
    for name in kind.levels:
        first = kind.levels[0]
        if not isinstance(config[name], list | tuple) or len(config[name]) != len(config[first]):
            raise LdmError(f"{path}: {name} is {config[name]}, not one for each of {len(config[first])} {first}")
    return config


def load_autoencoder(path: str | Path, device: torch.device | str = "cpu") -> Autoencoder:
    """A frozen autoencoder, on ``device``, from a directory that its ``save_pretrained`` wrote, or from a pipeline's; for
    ``identity`` that of pixels.

    Weights of a variant (``fp16``) are taken where there are no others. Raises :class:`LdmError` if ``path`` holds none.
    """
    autoencoder = PixelAutoencoder() if str(path) == IDENTITY else _from_folder(autoencoder_folder(path))
    # keep local paths out of what is saved from it
    autoencoder.register_to_config(_name_or_path="")
    nn.Module.to(autoencoder, device)  # diffusers decorates its own `to` in a way that hides from types that it is a method
    return autoencoder.eval().requires_grad_(False)


def _from_folder(folder: Path) -> Autoencoder:
    kind = read_autoencoder_config(folder)["_class_name"]
    require_regular_files(folder)
    with loading(f"{folder} cannot be loaded as an {kind}", "give the directory of one"):
        autoencoder, info = KINDS[kind].network.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            disable_mmap=True,  # a mapped file that is cut while the network is used ends the process
            variant=variant_of(folder, "diffusion_pytorch_model"),
        )
    if missing := info["missing_keys"]:  # diffusers would leave these random
        raise UsageError(f"{folder} lacks {len(missing)} weights of an {kind}, {missing[0]} first; copy or train it anew")
    return autoencoder


def autoencoder_hash(autoencoder: Autoencoder, dtype: torch.dtype | None = None) -> str:
    """Hex sha256 of weights, rounded to ``dtype`` if given, and architecture, without the latent statistics, which are measured
    after training."""
    architecture = {k: v for k, v in autoencoder.config.items() if not k.startswith(("_", "latents_"))}
    if not isinstance(autoencoder, AutoencoderKL):  # of which hashes were recorded before there were others
        architecture["_class_name"] = _kind(autoencoder).network.__name__
    return network_hash(autoencoder, architecture, dtype)


def statistics_hash(autoencoder: Autoencoder) -> str:
    """Hex sha256 of the statistics that normalise its latents, which :func:`autoencoder_hash` leaves out."""
    normalizer = LatentNormalizer.of(autoencoder)
    return hashlib.sha256(torch.stack([normalizer.mean, normalizer.std]).cpu().numpy().tobytes()).hexdigest()


def pixels_to_images(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) in any memory format -> float32 in [−1, 1], contiguous."""
    images = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    # At 256 px this takes almost half the time of decoding the JPEG: hence no division, and on the CPU one image at a time,
    # which fits into the cache.
    for image, source in zip(images, pixels, strict=True) if images.device.type == "cpu" else ((images, pixels),):
        image.copy_(source).sub_(127.5).mul_(1 / 127.5)
    return images


def images_to_pil(images: Tensor) -> list[Image.Image]:
    """[−1, 1] (B, 3, H, W) -> B PIL images."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(image) for image in pixels.cpu().numpy()]


def encode(autoencoder: Autoencoder, images: Tensor) -> DiagonalGaussianDistribution:
    """The posterior of images (B, 3, H, W) in [−1, 1]; latents from it are not normalised. Of an autoencoder without
    one it is a point: ``deterministic``, with a standard deviation of 0."""
    (found,) = autoencoder.encode(images, return_dict=False)
    if isinstance(found, DiagonalGaussianDistribution):
        return found
    return DiagonalGaussianDistribution(torch.cat([found, torch.zeros_like(found)], 1), deterministic=True)


def in_float32(posterior: DiagonalGaussianDistribution) -> DiagonalGaussianDistribution:
    """The posterior computed from its parameters in float32."""
    return DiagonalGaussianDistribution(posterior.parameters.float(), posterior.deterministic)


def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w), not normalised -> images (B, 3, H, W), not clamped."""
    return cast(DecoderOutput, autoencoder.decode(latents)).sample  # pyright: ignore[reportArgumentType]  takes any Tensor


def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [−1, 1], encoded to the posterior's mode and decoded."""
    return decode(autoencoder, encode(autoencoder, images).mode()).float().clamp(-1, 1)


def set_latent_statistics(autoencoder: Autoencoder, mean: Sequence[float], std: Sequence[float]) -> None:
    """Store the per-channel mean and standard deviation of the training set's latents in the autoencoder's config.

    Raises :class:`LdmError` as :class:`LatentNormalizer` does.
    """
    LatentNormalizer(mean, std)
    autoencoder.register_to_config(latents_mean=list(mean), latents_std=list(std))


def published_statistics(autoencoder: Autoencoder) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel by which diffusers' own pipelines normalise its latents: from a shift and a scale
    (SD, SDXL, FLUX, Sana), or from the batch norm of FLUX.2 over patches of latents, as those of whole channels."""
    config = autoencoder.config
    if isinstance(autoencoder, AutoencoderKLFlux2):
        # a patch has its pixels one after another, channel by channel
        means, variances = (x.double().view(config["latent_channels"], -1) for x in _batch_norm(autoencoder))
        mean = means.mean(1)
        return mean.tolist(), (variances.mean(1) + means.var(1, correction=0)).sqrt().tolist()
    shift, scale = config.get("shift_factor") or 0.0, config["scaling_factor"] or math.nan
    return [shift] * config["latent_channels"], [1 / scale] * config["latent_channels"]


def _batch_norm(autoencoder: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel and pixel of a patch, (channels · pixels,) each."""
    norm = autoencoder.bn
    return cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var) + norm.eps


class LatentNormalizer(nn.Module):
    """Per-channel normalisation of latents to zero mean and unit standard deviation.

    The statistics are float32 buffers of shape (C,), outside the state dict: the autoencoder's config stores them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        """Raises :class:`LdmError` for statistics by which nothing can be normalised."""
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)
        if self.mean.shape != self.std.shape or not (self.mean.isfinite() & self.std.isfinite()).all():
            raise LdmError(f"statistics of latents must be a finite mean and standard deviation a channel, not {mean}, {std}")
        if not (self.std > 0).all():
            raise LdmError(
                f"channel {int(self.std.argmin())} of the latents has a standard deviation of {float(self.std.min()):g}, so it "
                "cannot be normalised; use another autoencoder, or restore the statistics"
            )

    @classmethod
    def of(cls, autoencoder: Autoencoder) -> LatentNormalizer:
        """The normalisation of an autoencoder's config, on the autoencoder's device.

        Directories from elsewhere carry others instead, see :func:`published_statistics`. Raises :class:`LdmError` where the
        config has none that can be used.
        """
        config = autoencoder.config
        mean, std, channels = config.get("latents_mean"), config.get("latents_std"), config["latent_channels"]
        if mean is None or std is None:
            mean, std = published_statistics(autoencoder)
        if len(mean) != channels:
            raise LdmError(f"the autoencoder's config has statistics of {len(mean)} channels, but {channels} latent_channels")
        return cls(mean, std).to(autoencoder.device)

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the encoder gives them -> zero mean, unit standard deviation per channel."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) -> latents as the decoder takes them."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean.to(like)[:, None, None], self.std.to(like)[:, None, None]  # (C, 1, 1)


def without_overflow(autoencoder: Autoencoder, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What an autoencoder computes of ``x`` in its own dtype.

    What overflows in half precision, as in SDXL's autoencoder in fp16, is computed again in float32, in which the autoencoder
    then stays. Raises LdmError for values that are not finite in float32 either.
    """
    while not (result := compute(x.to(autoencoder.dtype))).isfinite().all():
        if autoencoder.dtype == torch.float32:
            raise LdmError("the autoencoder gives values that are not finite; put back the one that the latents were made with")
        log.warning("the autoencoder overflows in %s and is used in float32 from now on", str(autoencoder.dtype)[6:])
        nn.Module.to(autoencoder, torch.float32)
    return result.float()


def decode_latents(autoencoder: Autoencoder, normalised: Tensor) -> Tensor:
    """Normalised latents (B, C, h, w) -> images (B, 3, H, W) in [−1, 1]; see :func:`without_overflow`."""
    z = LatentNormalizer.of(autoencoder).denormalize(normalised)
    return without_overflow(autoencoder, lambda z: decode(autoencoder, z), z).clamp(-1, 1)


def encode_latents(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [−1, 1] -> normalised latents (B, C, h, w), the posteriors' modes, whose noise
    is small beside what sampling adds; see :func:`without_overflow`."""
    z = without_overflow(autoencoder, lambda images: encode(autoencoder, images).mode(), images)
    return LatentNormalizer.of(autoencoder).normalize(z)
