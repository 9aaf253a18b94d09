"""Figures of a trained model: how well the autoencoder gives pictures back, how well the pipeline does what words say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm.data.images import ImageDataset
from ldm.data.shapes_scorer import score
from ldm.losses import PerceptualLoss
from ldm.models.autoencoder import images_to_pictures, pixels_to_images, reconstruct

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline

Progress = Callable[[int, int], None]


def draw(
    pipeline: LatentDiffusionPipeline,
    prompts: Sequence[str],
    seed: int,
    batch_size: int = 16,
    on_progress: Progress | None = None,
    **settings: object,
) -> list[Image.Image]:
    """One picture per prompt; picture i starts from noise of seed ``seed + i``, whatever the batch it is drawn in.

    Args:
        settings: passed on to the pipeline (``num_inference_steps``, ``guidance_scale``, ``negative_prompt``, …).
    """
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        few = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + row) for row in range(len(few))]
        pictures += pipeline(few, generator=generators, **settings).images
        if on_progress is not None:
            on_progress(len(pictures), len(prompts))
    return pictures


@torch.inference_mode()
def reconstruction_figures(
    autoencoder: AutoencoderKL,
    dataset: ImageDataset,
    perceptual: PerceptualLoss | None = None,
    samples: int = 256,
    batch_size: int = 32,
    on_progress: Progress | None = None,
) -> dict[str, float]:
    """PSNR (dB), SSIM and LPIPS of pictures through the posterior's mode and back, over the first ``samples``."""
    psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean")
    ssim = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
    distances: list[float] = []
    few = Subset(dataset, range(min(samples, len(dataset))))
    done = 0
    for batch in DataLoader(few, batch_size, collate_fn=dataset.collate):
        images = pixels_to_images(batch["image"].to(autoencoder.device))
        again = reconstruct(autoencoder, images)
        psnr.update(again.cpu(), images.cpu())
        ssim.update(again.cpu(), images.cpu())
        if perceptual is not None:
            distances += [float(perceptual(again.cpu(), images.cpu()))] * len(images)
        done += len(images)
        if on_progress is not None:
            on_progress(done, len(few))
    figures = {"psnr": float(psnr.compute()), "ssim": float(ssim.compute())}
    return figures | ({"lpips": float(np.mean(distances))} if distances else {})


@torch.inference_mode()
def original_and_reconstruction(
    autoencoder: AutoencoderKL, dataset: ImageDataset, samples: int
) -> tuple[list[Image.Image], list[Image.Image]]:
    """The first ``samples`` pictures and their reconstructions."""
    batch = dataset.collate([dataset[index] for index in range(samples)])
    images = pixels_to_images(batch["image"].to(autoencoder.device))
    return images_to_pictures(images), images_to_pictures(reconstruct(autoencoder, images))


def shape_accuracy(pictures: Sequence[Image.Image | Path], prompts: Sequence[str]) -> dict[str, float]:
    """What the shapes scorer reads back from the pixels, per attribute; ``prompt_accuracy`` is all of them right."""
    return score([np.asarray(picture.convert("RGB")) for picture in pictures], list(prompts))
