"""How well an autoencoder reconstructs images, and what its latents are like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm.data.image_dataset import ImageDataset
from ldm.data.quarantine import Quarantine
from ldm.errors import UsageError
from ldm.evaluation.metrics import LatentHealth, ReconstructionFID
from ldm.losses.perceptual import PerceptualLoss
from ldm.models.autoencoder import decode, downsampling_factor, encode, images_to_pil, pixels_to_images, reconstruct
from ldm.models.autoencoder_kinds import Autoencoder

#: the window of the structural similarity reaches so far, less one, over an edge
SSIM_SIDE = 6


@torch.no_grad()  # not inference_mode: what is moved and filled here may be used in training afterwards
def reconstruction_metrics(
    autoencoder: Autoencoder,
    dataset: ImageDataset,
    perceptual: PerceptualLoss | None = None,
    samples: int = 256,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
    fid: ReconstructionFID | None = None,
    health: LatentHealth | None = None,
) -> dict[str, float | list[float]]:
    """Metrics of the reconstructions of the first ``samples`` images from the posterior's mode, and of their latents.

    Images may have several sizes; each is cut to multiples of the autoencoder's downsampling factor.

    Args:
        perceptual, fid, health: what to measure beside PSNR and SSIM; moved to the autoencoder's device and reset.
        batch_size: images read at once; those of one size go through the autoencoder together.

    Returns:
        ``samples``, the images measured (less than asked for where there are no more or some cannot be used); means over
        them of ``psnr`` (dB), ``ssim`` and ``lpips``; the FID under its own ``name``; and of the health ``latent_mean`` and so
        on, a value for each channel, and ``latent_dead``.

    Raises:
        UsageError: for an image smaller than the factor, or a FID of a single image.
        LdmError: where too many samples cannot be used.
    """
    device, factor = autoencoder.device, downsampling_factor(autoencoder)
    similarity = MetricCollection(
        {
            "psnr": PeakSignalNoiseRatio(data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean"),
            "ssim": StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0)),
        },
        compute_groups=False,
    ).to(device)
    lpips = MeanMetric().to(device)
    for given in (perceptual, fid, health):
        if given is not None:
            given.to(device)
    for metric in (fid, health):
        if metric is not None:
            metric.reset()
    total, measured = min(samples, len(dataset)), 0
    for pixels in _batches(dataset, total, batch_size):
        images = trim(pixels_to_images(pixels.to(device)), factor)
        if min(images.shape[-2:]) < SSIM_SIDE:
            raise UsageError(
                f"SSIM needs images of {SSIM_SIDE} pixels a side, not {tuple(images.shape[-2:])}; take larger ones"
            )
        posterior = encode(autoencoder, images)
        reconstruction = decode(autoencoder, posterior.mode()).float().clamp(-1, 1)
        similarity.update(reconstruction, images)
        if perceptual is not None:
            lpips.update(perceptual(reconstruction, images), weight=len(images))
        if fid is not None:
            fid.update(images, real=True)
            fid.update(reconstruction, real=False)
        if health is not None:
            health.update(posterior)
        measured += len(images)
        if on_progress is not None:
            on_progress(measured, total)
    if fid is not None and measured < 2:
        raise UsageError(f"a FID needs two images or more, not {measured}; measure more, or leave it out")
    metrics: dict[str, float | list[float]] = {"samples": measured}
    metrics |= {name: float(value) for name, value in similarity.compute().items()}
    if perceptual is not None:
        metrics["lpips"] = float(lpips.compute())
    if fid is not None:
        metrics[fid.name] = float(fid.compute())
    if health is not None:
        metrics |= {f"latent_{name}": value.tolist() for name, value in health.compute().items()}
    return metrics


def _batches(dataset: ImageDataset, count: int, batch_size: int) -> Iterator[Tensor]:
    """The first ``count`` images that can be used, uint8 (B, 3, H, W), each batch of one size."""
    quarantine = Quarantine(count, adjustable=False)
    for start in range(0, count, batch_size):
        samples = dataset.__getitems__(range(start, min(start + batch_size, count)))
        quarantine.add(sample["bad"] for sample in samples)
        # the image that replaces a bad sample would count twice
        good = sorted((sample for sample in samples if not sample["bad"]), key=_size)
        for _, of_one_size in groupby(good, key=_size):
            yield dataset.collate([*of_one_size])["image"]


def _size(sample: dict[str, Any]) -> tuple[int, ...]:
    return sample["image"].shape


def trim(images: Tensor, factor: int) -> Tensor:
    """Cut (B, 3, H, W) at its lower and right edge to multiples of ``factor``. Raises UsageError where nothing would be
    left."""
    height, width = images.shape[-2:]
    if min(height, width) < factor:
        raise UsageError(
            f"an image of {width} x {height} cannot be shrunk by the autoencoder's factor {factor}; give an image_size of "
            f"{factor} or more"
        )
    return images[..., : height // factor * factor, : width // factor * factor]


def metric_texts(metrics: Mapping[str, float | list[float]]) -> dict[str, str]:
    """What :func:`reconstruction_metrics` gave, for a table; of a value per channel the least and the greatest."""
    return {name: _text(value) for name, value in metrics.items()}


def _text(value: float | list[float]) -> str:
    if isinstance(value, list):
        return " .. ".join(dict.fromkeys(_text(extreme) for extreme in (min(value), max(value))))
    return f"{value:.4g}"


@torch.inference_mode()
def original_and_reconstruction(
    autoencoder: Autoencoder, dataset: ImageDataset, samples: int
) -> tuple[list[Image.Image], list[Image.Image]]:
    """The first ``samples`` images and their reconstructions."""
    batch = dataset.collate([dataset[index] for index in range(samples)])
    images = pixels_to_images(batch["image"].to(autoencoder.device))
    return images_to_pil(images), images_to_pil(reconstruct(autoencoder, images))
