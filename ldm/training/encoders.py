"""The frozen autoencoder and text encoder of stage two: those that made the latents, or that encode images on the fly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ldm.data.datamodule import ShardDataModule
from ldm.data.image_dataset import ImageDataset
from ldm.data.latent_dataset import padded_length
from ldm.data.latent_schema import common_info, path_of
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS
from ldm.data.moments import Moments
from ldm.data.quarantine import BadSample
from ldm.diffusion.conditioning import Condition
from ldm.errors import LdmError, UsageError
from ldm.latents.compute import PRECISIONS, Precision
from ldm.latents.image_encoder import load_matching
from ldm.machine import full_fp32
from ldm.models.autoencoder import (
    LatentNormalizer,
    autoencoder_hash,
    downsampling_factor,
    encode,
    in_float32,
    load_autoencoder,
    pixels_to_images,
    set_latent_statistics,
    statistics_hash,
)
from ldm.models.autoencoder_kinds import Autoencoder
from ldm.models.text_encoder import TextEncoder, always_mask

# enough for a channel's mean and standard deviation to a percent or two
STATISTICS_IMAGES = 2048

# mean and standard deviation of the latents, C numbers each
Statistics = tuple[Sequence[float], Sequence[float]]


@dataclass
class FrozenEncoders:
    """The networks that a denoiser is trained with. No module, so that they are neither optimised nor in checkpoints."""

    autoencoder: Autoencoder  # with the statistics of the training set's latents in its config
    text_encoder: TextEncoder
    latent_shapes: Sequence[tuple[int, int, int]]  # (C, h, w) of every size trained on, the most frequent first
    autoencoder_hash: str
    normalizer: LatentNormalizer = field(init=False)

    def __post_init__(self) -> None:
        self.normalizer = LatentNormalizer.of(self.autoencoder)

    @property
    def trained_on(self) -> dict[str, Any]:
        """What the pipeline's model_index.json says of them, to refuse others."""
        return {
            "autoencoder": self.autoencoder_hash,
            "text_encoder": self.text_encoder.hash,
            "latent_shape": list(self.latent_shapes[0]),
            "latent_statistics": statistics_hash(self.autoencoder),
            **({"latent_shapes": [list(shape) for shape in self.latent_shapes]} if len(self.latent_shapes) > 1 else {}),
        }

    @property
    def statistics(self) -> Statistics:
        """Those in the autoencoder's config."""
        return self.autoencoder.config["latents_mean"], self.autoencoder.config["latents_std"]

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        set_latent_statistics(self.autoencoder, mean, std)
        self.normalizer = LatentNormalizer.of(self.autoencoder).to(self.normalizer.mean.device)

    def to(self, device: torch.device, networks: bool) -> None:
        """Move the statistics, and the networks if images are to be encoded."""
        modules: list[nn.Module] = [self.normalizer, self.autoencoder, self.text_encoder.model]
        for module in modules if networks else modules[:1]:
            module.to(device)
        if networks and device.type == "cuda":
            always_mask(self.text_encoder.model)

    @torch.no_grad()
    @full_fp32()
    def encode(self, batch: dict[str, Any], precision: Precision = "fp32") -> dict[str, Tensor]:
        """Latents and text of a batch of images and captions, as latent shards of an export in ``precision`` hold them."""
        images = pixels_to_images(batch["image"])
        # within the autocast of training, whatever that is
        with torch.autocast(images.device.type, PRECISIONS[precision], enabled=precision != "fp32"):
            posterior = in_float32(encode(self.autoencoder, images))
            text = Condition(*self.text_encoder.encode(batch["caption"]))
        text, mask, _ = text.pad(padded_length(text.mask.shape[1]))
        return {"mean": posterior.mean, "std": posterior.std, "text": text.float(), "text_mask": mask}


def encoders_of_latents(
    data: ShardDataModule, autoencoder: Path, denoiser: Mapping[str, Any], text_encoder: str | None = None
) -> FrozenEncoders:
    """The encoders that made the latents.

    Args:
        autoencoder: its directory, or ``identity``.
        denoiser: its config.
        text_encoder: see :meth:`ldm.models.text_encoder.TextEncoder.load`; None: where it was at the export.

    Raises:
        UsageError: these are other encoders, or the denoiser does not fit the latents.
    """
    require_format(data, LATENT_SHARDS, "stage two without online", "set online, or encode the images: ldm latents export")
    info = common_info(data.train_set.sources)
    common_info((*data.train_set.sources, *data.validation_set.sources))
    folder = data.train_set.sources[0].spec
    network = load_matching(autoencoder, data.train_set.sources[0])
    shapes = by_frequency(info.latent_shapes, data.train_set.groups)
    text = info.text_encoders[data.text_encoder]
    _require_sizes(denoiser, shapes, text.width, f"{folder} was exported with {text.name}")
    where = text_encoder or (text.name if text.folder is None else path_of(data.train_set.sources[0], text.folder))
    try:
        encoder = TextEncoder.load(where)
    except LdmError as error:
        if text_encoder is not None:
            raise
        moved = (
            f"{folder} was exported with text encoder {text.name} ({text.hash[:12]}); if it has moved, give it as text_encoder"
        )
        raise UsageError(f"{error}. {moved}") from None
    if encoder.hash != text.hash:
        raise UsageError(
            f"{folder} was exported with text encoder {text.hash[:12]}, but {where} is {encoder.hash[:12]}; "
            "give the one it was exported with as text_encoder, or export again"
        )
    set_latent_statistics(network, info.latents_mean, info.latents_std)
    return FrozenEncoders(network, encoder, shapes, info.autoencoder)


def encoders_of_images(
    data: ShardDataModule,
    autoencoder: Path,
    text_encoder: str,
    denoiser: Mapping[str, Any],
    statistics: Statistics | None,
    device: torch.device,
) -> FrozenEncoders:
    """The encoders to encode images and captions with.

    Args:
        autoencoder: its directory, or ``identity``.
        text_encoder: see :meth:`ldm.models.text_encoder.TextEncoder.load`.
        denoiser: its config.
        statistics: of the latents, from a checkpoint; None: those of the directory, measured if it has none.
        device: to measure on.

    Raises:
        UsageError: if images, encoders and denoiser do not fit one another.
    """
    require_format(data, IMAGE_SHARDS, "stage two with online", "set online to false, or give the images' shards")
    for source in (*data.train_set.sources, *data.validation_set.sources):
        if source.manifest.captioned is False:
            raise UsageError(f"{source.spec} has no captions; stage two needs one for every image")
    if data.validation_whole:
        raise UsageError("validation_whole is for stage one; set it to false")
    assert isinstance(data.train_set, ImageDataset)
    network, encoder = load_autoencoder(autoencoder, device), TextEncoder.load(text_encoder)
    factor = downsampling_factor(network)
    sizes = image_sizes(data.train_set, factor)
    if isinstance(sizes, BadSample):
        raise UsageError(f"{sizes}, so the images' size is unknown; set image_size")
    shapes = [(network.config["latent_channels"], height // factor, width // factor) for height, width in sizes]
    _require_sizes(denoiser, shapes, encoder.width, f"captions are encoded by {encoder.name}")
    if statistics is None and (network.config.get("latents_mean") is None or network.config.get("latents_std") is None):
        statistics = measure_statistics(network, data.train_set, data.batch_size)
    if statistics is not None:
        set_latent_statistics(network, *statistics)
    return FrozenEncoders(network, encoder, shapes, autoencoder_hash(network))


@torch.no_grad()
@full_fp32()
def measure_statistics(autoencoder: Autoencoder, dataset: ImageDataset, batch_size: int) -> Statistics:
    """Mean and standard deviation of latents sampled from the posteriors of up to 2,048 images spread over the set.

    They are computed from the posteriors' own means and variances: nothing is random.
    """
    number = min(len(dataset), STATISTICS_IMAGES)
    chosen = np.arange(number) * len(dataset) // number
    groups = np.zeros(number, np.int64) if dataset.groups is None else dataset.groups[chosen]
    moments = []
    for own in (chosen[groups == group] for group in np.unique(groups[groups >= 0])):
        for few in np.array_split(own, -(-len(own) // batch_size)):
            images = pixels_to_images(dataset.batch(few.tolist())["image"].to(autoencoder.device))
            posterior = encode(autoencoder, images)
            moments.append(Moments.of(posterior.mean.cpu().numpy(), posterior.std.cpu().numpy()))
    total = Moments.merge(moments)
    return total.mean.tolist(), total.std.tolist()


def require_format(data: ShardDataModule, wanted: str, stage: str, fix: str) -> None:
    """Refuse shards of another kind."""
    for source in (*data.train_set.sources, *data.validation_set.sources):
        if source.manifest.format != wanted:
            raise UsageError(f"{source.spec} holds {source.manifest.format}, but {stage} trains on {wanted}; {fix}")


def image_sizes(dataset: ImageDataset, factor: int) -> list[tuple[int, int]] | BadSample:
    """Height and width of the images, the most frequent first, all multiples of ``factor``; or why they are unknown."""
    if dataset.buckets is not None:
        dataset.buckets.require_multiples(factor, "the autoencoder's downsampling factor")
        return dataset.used_sizes
    height = width = dataset.image_size
    if height is None or width is None:
        first = dataset.attempt(0)
        if isinstance(first, BadSample):
            return first
        height, width = first["image"].shape[1:]
    if height % factor or width % factor:
        raise UsageError(
            f"images of {width} x {height} in {dataset.sources[0].spec} are not multiples of the autoencoder's downsampling "
            f"factor {factor}; set image_size to one"
        )
    return [(height, width)]


def by_frequency(shapes: Sequence[tuple[int, int, int]], groups: np.ndarray | None) -> list[tuple[int, int, int]]:
    """The shapes (C, h, w) that samples have, the most frequent first.

    ``groups``: each sample's place in ``shapes``, −1 for those that are not trained on; None where all have the first.
    """
    counts = np.bincount(np.zeros(1, int) if groups is None else groups[groups >= 0], minlength=len(shapes))
    return [shapes[place] for place in np.argsort(-counts, kind="stable").tolist() if counts[place]]


def _require_sizes(
    denoiser: Mapping[str, Any], latent_shapes: Sequence[tuple[int, int, int]], caption_channels: int, text: str
) -> None:
    """Refuse latents and embeddings that the denoiser is not made for; ``text`` names the origin of the embeddings.

    ``sample_size`` only says to which grid positions are scaled: a stage at a higher resolution keeps that of the one before.
    """
    (channels, *_), side, patch = latent_shapes[0], denoiser["sample_size"], denoiser["patch_size"]
    for name in ("in_channels", "out_channels"):
        if (denoiser.get(name) or channels) != channels:  # a DiT has no out_channels, and PixArt's may be None
            raise UsageError(f"the denoiser's {name} is {denoiser[name]}, but the latents need {channels}; change it")
    for _, height, width in latent_shapes:
        if height % patch or width % patch:
            raise UsageError(
                f"latents of {width} x {height} are not multiples of the denoiser's patch_size {patch}; change it, or the "
                "images' size"
            )
    if all(max(height, width) != side for _, height, width in latent_shapes):
        sizes = ", ".join(f"{width} x {height}" for _, height, width in latent_shapes[:3])
        more = ", …" if len(latent_shapes) > 3 else ""
        rank_zero_info(f"positions in latents of {sizes}{more} are scaled to the denoiser's sample_size {side}")
    if denoiser["caption_channels"] != caption_channels:
        raise UsageError(
            f"the denoiser's caption_channels is {denoiser['caption_channels']}, but {text} of width {caption_channels}; "
            "change it"
        )
