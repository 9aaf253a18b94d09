"""The frozen autoencoder and text encoder of stage two: those that made the latents, or that encode images on the fly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ldm.data.datamodule import ShardDataModule
from ldm.data.image_dataset import ImageDataset
from ldm.data.latent_dataset import padded_length
from ldm.data.latent_schema import TextInfo, common_info, path_of
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS
from ldm.data.moments import Moments
from ldm.data.quarantine import BadSample
from ldm.data.sources import ShardSource
from ldm.diffusion.conditioning import Condition, join_encoders
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
from ldm.models.dit import caption_widths
from ldm.models.text_encoder import MAX_ENCODERS, UNCONDITIONAL, TextChoice, TextEncoder, TextEncoderConfig, always_mask
from ldm.pipeline import TEXT_PARTS

# enough for a channel's mean and standard deviation to a percent or two
STATISTICS_IMAGES = 2048

# mean and standard deviation of the latents, C numbers each
Statistics = tuple[Sequence[float], Sequence[float]]


@dataclass
class FrozenEncoders:
    """The networks that a denoiser or a matcher is trained with. No module, so that they are neither optimised nor saved in
    checkpoints."""

    autoencoder: Autoencoder  # with the statistics of the training set's latents in its config
    text_encoders: list[TextEncoder]  # whose tokens the denoiser takes together
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
            **{name: encoder.hash for name, encoder in zip(TEXT_PARTS, self.text_encoders, strict=False)},
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
        texts = [encoder.model for encoder in self.text_encoders]
        modules: list[nn.Module] = [self.normalizer, self.autoencoder, *texts]
        for module in modules if networks else modules[:1]:
            module.to(device)
        if networks and device.type == "cuda":
            for model in texts:
                always_mask(model)

    @torch.no_grad()
    @full_fp32()
    def encode_images(self, pixels: Tensor, precision: Precision = "fp32") -> dict[str, Tensor]:
        """Latents of images (B, 3, H, W), as latent shards of an export in ``precision`` hold them."""
        images = pixels_to_images(pixels)
        with _computing(images.device, precision):
            posterior = in_float32(encode(self.autoencoder, images))
        return {"mean": posterior.mean, "std": posterior.std}

    def encode(self, batch: dict[str, Any], precision: Precision = "fp32") -> dict[str, Tensor]:
        """Both of a batch: of its ``image`` and ``caption``."""
        return self.encode_images(batch["image"], precision) | self.encode_captions(batch["caption"], precision)

    @full_fp32()
    def encode_captions(
        self, captions: list[str], precision: Precision = "fp32", differentiable: bool = False
    ) -> dict[str, Tensor]:
        """Text of captions, likewise. ``differentiable``: see :func:`ldm.models.text_encoder.embed`."""
        with _computing(self.text_encoders[0].model.device, precision), torch.set_grad_enabled(differentiable):
            encoded = [Condition(*encoder.encode(captions, differentiable)) for encoder in self.text_encoders]
            text = join_encoders(encoded)
        text, mask, _ = text.pad(padded_length(text.mask.shape[1]))
        return {"text": text.float(), "text_mask": mask}


def encoders_of_latents(
    data: ShardDataModule,
    autoencoder: Path,
    trained: Mapping[str, Any],
    text_encoder: TextChoice | None = None,
    name: str = "denoiser",
) -> FrozenEncoders:
    """The encoders that made the latents.

    Args:
        autoencoder: its directory, or ``identity``.
        trained: the config of the network that is trained.
        text_encoder: see :meth:`ldm.models.text_encoder.TextEncoder.load`, as many as the data choose; None: where they were
            at the export.
        name: of the network that is trained, in messages.

    Raises:
        UsageError: these are other encoders, or the network does not fit the latents.
    """
    require_format(data, LATENT_SHARDS, f"a {name} without online", "set online, or encode the images: ldm latents export")
    info = common_info(data.train_set.sources)
    common_info((*data.train_set.sources, *data.validation_set.sources))
    folder = data.train_set.sources[0].spec
    network = load_matching(autoencoder, data.train_set.sources[0])
    shapes = [(info.latent_shapes[0][0], height, width) for height, width in data.train_set.used_sizes]
    texts = [info.text_encoders[number] for number in data.text_encoders]
    named = " + ".join(text.name for text in texts)
    _require_sizes(name, trained, shapes, [text.width for text in texts], f"{folder} was exported with {named}")
    given: Sequence[str | TextEncoderConfig | None] = [None] * len(several([text.name for text in texts]))
    if text_encoder is not None:
        given = several(text_encoder)
        if len(given) != len(texts):
            raise UsageError(f"{len(given)} text encoders are given for the embeddings of {len(texts)} ({named}); give as many")
    encoders = [_load_exported(data.train_set.sources[0], text, place) for text, place in zip(texts, given, strict=True)]
    set_latent_statistics(network, info.latents_mean, info.latents_std)
    return FrozenEncoders(network, encoders, shapes, info.autoencoder)


def _computing(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of a computation in ``precision``, within the autocast of training, whatever that is."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def _load_exported(source: ShardSource, text: TextInfo, given: str | TextEncoderConfig | None) -> TextEncoder:
    """A text encoder of an export: from where it was, or is now. Raises UsageError for another one."""
    where = given or (text.name if text.folder is None else path_of(source, text.folder))
    if isinstance(where, str):
        where = TextEncoderConfig(where, **cast(Any, text.settings))
    try:
        encoder = TextEncoder.load(where)
    except LdmError as error:
        if given is not None:
            raise
        moved = (
            f"{source.spec} was exported with text encoder {text.name} ({text.hash[:12]}); if it has moved, give it as "
            "text_encoder"
        )
        raise UsageError(f"{error}. {moved}") from None
    if encoder.hash != text.hash:
        raise UsageError(
            f"{source.spec} was exported with text encoder {text.hash[:12]}, but {where.name} is {encoder.hash[:12]}; "
            "give the one it was exported with as text_encoder, or export again"
        )
    return encoder


def several(choice: TextChoice) -> list[str | TextEncoderConfig]:
    """One text encoder or several as a list. Raises UsageError for more than a pipeline has."""
    given = [choice] if isinstance(choice, str | TextEncoderConfig) else [*choice]
    if not 1 <= len(given) <= MAX_ENCODERS or (len(given) > 1 and UNCONDITIONAL in given):
        raise UsageError(f"{len(given)} text encoders are given; give 1 to {MAX_ENCODERS}, and none by itself")
    return given


def encoders_of_images(
    data: ShardDataModule,
    autoencoder: Path,
    text_encoder: TextChoice,
    trained: Mapping[str, Any],
    statistics: Statistics | None,
    device: torch.device,
    name: str = "denoiser",
) -> FrozenEncoders:
    """The encoders to encode images and captions with.

    Args:
        autoencoder: its directory, or ``identity``.
        text_encoder: see :meth:`ldm.models.text_encoder.TextEncoder.load`; one or several.
        trained: the config of the network that is trained.
        statistics: of the latents, from a checkpoint; None: those of the directory, measured if it has none.
        device: to measure on.
        name: of the network that is trained, in messages.

    Raises:
        UsageError: if images, encoders and network do not fit one another.
    """
    require_format(data, IMAGE_SHARDS, f"a {name} with online", "set online to false, or give the images' shards")
    if data.validation_whole:
        raise UsageError("validation_whole is for stage one; set it to false")
    assert isinstance(data.train_set, ImageDataset)
    network, encoders = load_autoencoder(autoencoder, device), [TextEncoder.load(one) for one in several(text_encoder)]
    for source in (*data.train_set.sources, *data.validation_set.sources):
        named = isinstance(data.augmentation.caption, Mapping)
        if source.manifest.captioned is False and not named and not encoders[0].is_unconditional:
            raise UsageError(
                f"{source.spec} has no captions; a {name} needs one for every image: pack it with captions (a denoiser can "
                "also be unconditional, with text_encoder none)"
            )
    factor = downsampling_factor(network)
    sizes = image_sizes(data.train_set, factor)
    if isinstance(sizes, BadSample):
        raise UsageError(f"{sizes}, so the images' size is unknown; set image_size")
    shapes = [(network.config["latent_channels"], height // factor, width // factor) for height, width in sizes]
    named = " + ".join(encoder.name for encoder in encoders)
    _require_sizes(name, trained, shapes, [encoder.width for encoder in encoders], f"captions are encoded by {named}")
    if statistics is None and (network.config.get("latents_mean") is None or network.config.get("latents_std") is None):
        statistics = measure_statistics(network, data.train_set, data.batch_size)
    if statistics is not None:
        set_latent_statistics(network, *statistics)
    return FrozenEncoders(network, encoders, shapes, autoencoder_hash(network))


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


def _require_sizes(
    name: str,
    trained: Mapping[str, Any],
    latent_shapes: Sequence[tuple[int, int, int]],
    caption_channels: Sequence[int],
    text: str,
) -> None:
    """Refuse latents and embeddings that the network ``name`` is not made for; ``text`` names the origin of the embeddings.

    ``sample_size`` only says to which grid positions are scaled: a stage at a higher resolution keeps that of the one before.
    """
    (channels, *_), side, patch = latent_shapes[0], trained["sample_size"], trained["patch_size"]
    for key in ("in_channels", "out_channels"):
        if (trained.get(key) or channels) != channels:  # a DiT has no out_channels, and PixArt's may be None
            raise UsageError(f"the {name}'s {key} is {trained[key]}, but the latents need {channels}; change it")
    for _, height, width in latent_shapes:
        if height % patch or width % patch:
            raise UsageError(
                f"latents of {width} x {height} are not multiples of the {name}'s patch_size {patch}; change it, or the "
                "images' size"
            )
    if all(max(height, width) != side for _, height, width in latent_shapes):
        sizes = ", ".join(f"{width} x {height}" for _, height, width in latent_shapes[:3])
        more = ", …" if len(latent_shapes) > 3 else ""
        rank_zero_info(f"positions in latents of {sizes}{more} are scaled to the {name}'s sample_size {side}")
    if caption_widths(trained["caption_channels"]) != [*caption_channels]:
        needed = caption_channels[0] if len(caption_channels) == 1 else [*caption_channels]
        raise UsageError(
            f"the {name}'s caption_channels is {trained['caption_channels']}, but {text} of width {needed}; change it"
        )
