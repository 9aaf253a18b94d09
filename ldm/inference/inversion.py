"""DDIM inversion of an image, written as files: its noise, the image generated from it, and edits by other prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.functional.image import peak_signal_noise_ratio

from ldm.diffusion.scheduler import SAMPLERS, make_scheduler, samplers_for
from ldm.inference.metadata import provenance_of, save_png
from ldm.inference.settings import GenerationSettings
from ldm.models.autoencoder import images_to_pil
from ldm.models.image_processor import PreparedImages
from ldm.pipeline import LatentDiffusionPipeline


class Inversion(NamedTuple):
    """How near an inverted image comes back.

    Attributes:
        autoencoder_psnr: of the autoencoder's reconstruction, in dB from the image.
        sampling_psnr: of the image generated from the noise, in dB from that reconstruction.
        noise_std: of the noise; 1 is what sampling starts from.
    """

    autoencoder_psnr: float
    sampling_psnr: float
    noise_std: float


def write_inversion(
    pipeline: LatentDiffusionPipeline,
    image: Image.Image,
    prompt: str,
    edits: Sequence[str],
    folder: Path,
    model: str | Path,
    source: str,
    steps: int = 50,
    guidance: float = 3.0,
    height: int | None = None,
    width: int | None = None,
    on_image: Callable[[int], None] | None = None,
) -> Inversion:
    """Write ``noise.safetensors``, ``reconstruction.png`` (by the autoencoder alone), ``redrawn.png`` (from the noise), and
    ``edit-1.png`` and so on (from the noise by another prompt) to ``folder``.

    The pipeline gets the scheduler whose steps inversion follows.

    Args:
        prompt: what the image shows; it may be empty.
        model: directory of the pipeline, for the images' metadata.
        source: the image's hash, as :func:`ldm.inference.inputs.reference` gives it.
        guidance: scale for the edits; inversion and ``redrawn.png`` are without guidance.
        height, width: in pixels; the image's own unless given.
        on_image: called with the number of files written so far, of ``3 + len(edits)``.
    """
    name = next(name for name in samplers_for(*pipeline.diffusion) if SAMPLERS[name].invertible)
    pipeline.scheduler = make_scheduler(name, *pipeline.diffusion)
    provenance = provenance_of(pipeline, model)
    redrawn = GenerationSettings(prompt, steps=steps, guidance=1.0, scheduler=name, width=width, height=height, image=source)
    edited = [replace(redrawn, prompt=edit, guidance=guidance) for edit in edits]
    # without the rows and columns that the pipeline adds to reach its sizes
    (original,) = images_to_pil(PreparedImages.of(image, None, height, width, unit=1).images)

    def save(images: Sequence[Image.Image], name: str, settings: GenerationSettings) -> Image.Image:
        cropped = images[0].crop((0, 0, *original.size))
        save_png(cropped, folder / name, [settings], provenance, inverted_with=prompt)
        return cropped

    report = on_image or (lambda done: None)
    reconstruction = save(pipeline.decode(pipeline.encode_images(image, height, width)), "reconstruction.png", redrawn)
    report(1)
    noise = pipeline.invert(image, prompt, steps, height=height, width=width)
    save_file({"noise": noise.cpu()}, folder / "noise.safetensors")
    report(2)
    generated = []
    for number, one in enumerate([redrawn, *edited]):
        (images,) = pipeline(
            one.prompt, latents=noise, num_inference_steps=steps, guidance_scale=one.guidance, return_dict=False
        )
        generated.append(save(images, f"edit-{number}.png" if number else "redrawn.png", one))
        report(3 + number)
    return Inversion(psnr(reconstruction, original), psnr(generated[0], reconstruction), float(noise.std()))


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB."""
    both = [torch.from_numpy(np.array(each, dtype=np.float32)) for each in (image, reference)]
    return float(peak_signal_noise_ratio(both[0], both[1], data_range=255.0))
