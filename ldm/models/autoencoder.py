"""The KL autoencoder (``diffusers.AutoencoderKL``) and its latent space: the one place where latents are normalised."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from ldm.errors import UsageError, first_line
from ldm.models.identity import network_hash


@dataclass
class AutoencoderConfig:
    """An ``AutoencoderKL`` from scratch (Rombach et al. 2022, arXiv 2112.10752).

    Attributes:
        widths: channels per level; each level after the first halves the picture, so three levels are f4, four f8.
        latent_channels: channels of the latents.
        layers_per_block: residual blocks per level of the encoder (the decoder has one more).
        norm_groups: groups of the GroupNorm; divides every width.
        mid_attention: self-attention at the lowest resolution.
        sample_size: side of the pictures in pixels.
    """

    widths: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    latent_channels: int = 4
    layers_per_block: int = 2
    norm_groups: int = 32
    mid_attention: bool = True
    sample_size: int = 256

    @property
    def factor(self) -> int:
        """Picture side over latent side."""
        return 2 ** (len(self.widths) - 1)

    def build(self) -> AutoencoderKL:
        """The network, freshly initialised.

        Raises:
            UsageError: where the sizes do not fit one another.
        """
        if self.sample_size % self.factor:
            raise UsageError(
                f"model.autoencoder.sample_size {self.sample_size} is not a multiple of {self.factor}, the factor of "
                f"{len(self.widths)} widths; change sample_size or the number of widths"
            )
        for width in self.widths:
            if width % self.norm_groups:
                raise UsageError(
                    f"model.autoencoder.widths holds {width}, not a multiple of norm_groups {self.norm_groups}; change either"
                )
        network = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * len(self.widths),
            up_block_types=["UpDecoderBlock2D"] * len(self.widths),
            block_out_channels=self.widths,
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_groups,
            mid_block_add_attention=self.mid_attention,
            sample_size=self.sample_size,
            scaling_factor=1.0,  # latents are normalised by latents_mean and latents_std instead
        )
        _initialise(network)
        return network


def _initialise(autoencoder: AutoencoderKL) -> None:
    """Start as a chain of orthogonal convolutions with silent residual branches and a narrow posterior.

    From torch's default a small autoencoder finds luminance first and leaves objects grey for long: on the built-in shapes at
    64 px it stood at 19.0 dB after 120 steps, from here at 22.3 (batch 8, one seed). A posterior of standard deviation 1 would
    drown the latents in noise until they have grown.
    """
    for name, module in autoencoder.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith(".conv2"):
            nn.init.zeros_(module.weight)
    channels = autoencoder.config.latent_channels  # quant_conv gives means, then log-variances
    with torch.no_grad():
        autoencoder.quant_conv.weight[channels:] = 0
        autoencoder.quant_conv.bias[channels:] = -6.0


def load_autoencoder(path: str | Path) -> AutoencoderKL:
    """A frozen autoencoder from a directory that ``AutoencoderKL.save_pretrained`` wrote.

    Raises:
        UsageError: when ``path`` holds none.
    """
    if not (Path(path) / "config.json").is_file():
        raise UsageError(f"{path} is not an autoencoder directory (no config.json); train one: ldm autoencoder fit --help")
    try:
        autoencoder = AutoencoderKL.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be loaded as an AutoencoderKL: {first_line(error)}") from error
    return autoencoder.eval().requires_grad_(False)


def autoencoder_hash(autoencoder: AutoencoderKL) -> str:
    """Hex sha256 of weights and architecture; not of the latent statistics, which are measured after it is trained."""
    architecture = {k: v for k, v in autoencoder.config.items() if not k.startswith(("_", "latents_"))}
    return network_hash(autoencoder, architecture)


def pixels_to_images(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W), in whatever memory order -> float32 in [−1, 1], contiguous."""
    images = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    # At 256 px this costs nearly half of what decoding the JPEG does; hence no division, and on the CPU picture by picture,
    # which stay in its cache.
    for image, its_pixels in zip(images, pixels, strict=True) if images.device.type == "cpu" else ((images, pixels),):
        image.copy_(its_pixels).sub_(127.5).mul_(1 / 127.5)
    return images


def images_to_pictures(images: Tensor) -> list[Image.Image]:
    """[−1, 1] (B, 3, H, W) -> B PIL pictures."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(picture) for picture in pixels.cpu().numpy()]


def reconstruct(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Images through the posterior's mode and back, (B, 3, H, W) in [−1, 1]."""
    z = autoencoder.encode(images).latent_dist.mode()
    return autoencoder.decode(z).sample.float().clamp(-1, 1)


def set_latent_statistics(autoencoder: AutoencoderKL, mean: list[float], std: list[float]) -> None:
    """Keep the per-channel mean and standard deviation of the training set's latents in the autoencoder's own config."""
    autoencoder.register_to_config(latents_mean=list(mean), latents_std=list(std))


def _statistics(autoencoder: AutoencoderKL, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std as (1, C, 1, 1). Directories from elsewhere carry a scale and a shift instead (SD, SDXL, FLUX)."""
    config = autoencoder.config
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    else:
        mean = torch.full((config.latent_channels,), config.shift_factor or 0.0)
        std = torch.full((config.latent_channels,), 1 / config.scaling_factor)
    return mean.view(1, -1, 1, 1).to(like), std.view(1, -1, 1, 1).to(like)


def normalise_latents(autoencoder: AutoencoderKL, z: Tensor) -> Tensor:
    """Latents as the encoder gives them -> zero mean, unit standard deviation per channel, (B, C, h, w)."""
    mean, std = _statistics(autoencoder, z)
    return (z - mean) / std


def decode_latents(autoencoder: AutoencoderKL, normalised: Tensor) -> Tensor:
    """Normalised latents (B, C, h, w) -> images (B, 3, H, W) in [−1, 1]."""
    mean, std = _statistics(autoencoder, normalised)
    z = (normalised * std + mean).to(autoencoder.dtype)
    return autoencoder.decode(z, return_dict=False)[0].float().clamp(-1, 1)
