"""Settings to images: many at constant memory, in batches of those that differ in words and seed alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor

from ldm.diffusion.sampler import Sampler
from ldm.diffusion.scheduler import make_scheduler
from ldm.errors import LdmError, UsageError
from ldm.files import read_json
from ldm.inference.prompts import fit_prompt
from ldm.inference.settings import GenerationSettings
from ldm.machine import is_out_of_memory
from ldm.models.autoencoder import enable_tiling
from ldm.pipeline import LatentDiffusionPipeline, load_pipeline, read_image

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PREVIEWED = 4  # images of a batch: each preview decodes them


class GenerationStep(NamedTuple):
    """How far a batch is.

    Attributes:
        settings: of its images.
        done, total: calls of the denoiser.
        guesses: the first images as the denoiser sees them now, where a preview is due.
    """

    settings: list[GenerationSettings]
    done: int
    total: int
    guesses: list[Image.Image]


OnStep = Callable[[GenerationStep], None]


def open_pipeline(
    path: str | Path, device: str | None = None, dtype: str = "fp32", compiled: bool = False, tiled: bool = False
) -> LatentDiffusionPipeline:
    """The pipeline of a directory, made ready.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``; the GPU unless given, where there is one.
        dtype: of its weights: ``fp32``, ``bf16`` or ``fp16``.
        compiled: compile the denoiser's blocks with ``torch.compile``: minutes at first, faster from then on.
        tiled: decode images larger than those that the autoencoder was trained on in tiles.

    Raises:
        UsageError: for a directory that holds none, or what this machine or this model does not have.
    """
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    device = device or here[:2][-1]
    if device not in here:
        raise UsageError(f"device {device} is not on this machine; choose one of: {', '.join(here)}")
    if dtype == "fp16" and device == "cpu":
        raise UsageError("dtype fp16 is for GPUs; on the cpu give bf16 or fp32")
    if dtype == "bf16" and device != "cpu":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise UsageError(f"{torch.cuda.get_device_name()} has no bf16; give dtype fp16 or fp32")
    pipeline = load_pipeline(path).to(device, DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    if tiled:
        enable_tiling(pipeline.vae)
    if compiled:
        network = pipeline.transformer
        if not network._repeated_blocks:
            raise UsageError(f"{type(network).__name__} does not say which of its parts to compile; draw without compiling")
        network.compile_repeated_blocks()
    return pipeline


def scheduler_for(pipeline: LatentDiffusionPipeline, settings: GenerationSettings) -> SchedulerMixin:
    """The scheduler that settings name, the pipeline's own where they name none.

    Raises:
        UsageError: for a name that does not fit the model; lists those that do.
    """
    if settings.scheduler is None:
        return pipeline.scheduler
    choice = {} if settings.eta is None else {"eta": settings.eta}
    return make_scheduler(settings.scheduler, *pipeline.diffusion, **choice)


def in_common(settings: GenerationSettings) -> GenerationSettings:
    """What images must have in common to be drawn in one batch: all but words and seed."""
    return dataclasses.replace(settings, prompt="any", negative="", seed=0)


def check_settings(pipeline: LatentDiffusionPipeline, settings: GenerationSettings) -> None:
    """Refuse what the pipeline could not draw, before anything is drawn; words are looked at by :func:`fit_prompt`.

    Raises:
        UsageError: naming the setting.
    """
    strength = 1.0 if settings.strength is None else settings.strength
    Sampler(scheduler_for(pipeline, settings), *pipeline.diffusion, settings.steps, strength=strength)
    if settings.image is None:
        pipeline.latent_shape(1, settings.height, settings.width)
    else:
        image, mask = (None if path is None else read_image(path) for path in (settings.image, settings.mask))
        pipeline.canvas(image, mask, settings.height, settings.width)
    if settings.weak is not None:
        _check_weak(pipeline, Path(settings.weak))


def generate_images(
    pipeline: LatentDiffusionPipeline,
    settings: Sequence[GenerationSettings],
    batch_size: int = 1,
    on_step: OnStep | None = None,
    preview_every: int = 0,
) -> Iterator[tuple[int, GenerationSettings, Image.Image]]:
    """Draw images, as many at a time as ``batch_size``; no more than these are held.

    Every image has its own generator, so that it is the same in every batch but for rounding (at most 1 of 255 in fp32), and
    bit for bit where the batch has the same shape.

    Args:
        settings: one per image; those that can be drawn together are, so that the order may change.
        on_step: called after every call of the denoiser; what it raises ends the drawing.
        preview_every: every so many calls it is given the images as the denoiser sees them; 0 is never.

    Yields:
        The number in ``settings``, the settings, and the image.

    Raises:
        UsageError: for settings that the pipeline cannot draw.
        LdmError: when the denoiser's answer is not finite, or memory does not suffice.
    """
    alike: dict[GenerationSettings, list[int]] = {}
    for number, one in enumerate(settings):
        alike.setdefault(in_common(one), []).append(number)
    for common, numbers in alike.items():
        given = _given(pipeline, common)
        for start in range(0, len(numbers), batch_size):
            few = numbers[start : start + batch_size]
            batch = [settings[number] for number in few]
            images = _draw(pipeline, common, batch, given, on_step, preview_every)
            yield from zip(few, batch, images, strict=True)


def _given(pipeline: LatentDiffusionPipeline, common: GenerationSettings) -> dict[str, Any]:
    """The pipeline's arguments that are read from files."""
    given: dict[str, Any] = {}
    if common.image is not None:
        given["image"] = read_image(common.image)
    if common.mask is not None:
        given["mask_image"] = read_image(common.mask)
    if common.strength is not None:
        given["strength"] = common.strength
    if common.weak is not None:
        _check_weak(pipeline, Path(common.weak))
        weak = load_pipeline(common.weak).transformer
        given["weak_transformer"] = weak.to(pipeline.transformer.device, pipeline.transformer.dtype)
    return given


def _draw(
    pipeline: LatentDiffusionPipeline,
    common: GenerationSettings,
    batch: list[GenerationSettings],
    given: dict[str, Any],
    on_step: OnStep | None,
    preview_every: int,
) -> list[Image.Image]:
    def after_step(_: LatentDiffusionPipeline, number: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        if on_step is not None:
            due = preview_every > 0 and (number + 1) % preview_every == 0
            guesses = pipeline.decode(tensors["pred_original_sample"][:PREVIEWED]) if due else []
            on_step(GenerationStep(batch, number + 1, pipeline.num_timesteps, guesses))

    own, pipeline.scheduler = pipeline.scheduler, scheduler_for(pipeline, common)
    try:
        return pipeline(
            [fit_prompt(pipeline.tokenizer, one.prompt).kept for one in batch],
            negative_prompt=[fit_prompt(pipeline.tokenizer, one.negative).kept for one in batch],
            num_inference_steps=common.steps,
            guidance=common.rule(),
            width=common.width,
            height=common.height,
            generator=[torch.Generator().manual_seed(one.seed) for one in batch],
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=("pred_original_sample",),
            **given,
        ).images
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise LdmError(
                f"there is not enough memory for {len(batch)} images at a time; make the batch or the size smaller, or "
                "decode in tiles"
            ) from error
        raise
    finally:
        pipeline.scheduler = own


def _check_weak(pipeline: LatentDiffusionPipeline, path: Path) -> None:
    """Refuse a pipeline whose denoiser is not another checkpoint of the same model, by its configs alone."""
    index = path / "model_index.json"
    if not index.is_file():
        raise UsageError(f"weak {path} is not a pipeline directory (no model_index.json); ldm denoiser fit makes one")
    weak, config, ours = read_json(index), read_json(path / "transformer" / "config.json"), pipeline.config
    theirs = (weak.get("diffusion") or {}) | (weak.get("trained_on") or {}) | config
    needed = (ours.diffusion or {}) | (ours.trained_on or {}) | pipeline.transformer.config
    for name in ("path", "prediction", "autoencoder", "text_encoder", "latent_shape", "in_channels", "sample_size"):
        if name in theirs and name in needed and theirs[name] != needed[name]:
            raise UsageError(f"weak {path} was trained with another {name}; give an earlier checkpoint of the same model")
