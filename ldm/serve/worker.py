"""From an order to an image: the one place of the server that calls the pipeline."""

from __future__ import annotations

import base64
import dataclasses
import io
import secrets
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.scheduler import samplers_for
from ldm.errors import LdmError
from ldm.inference.generate import check_settings, scheduler_for
from ldm.inference.metadata import encode_png, provenance_of, scheduler_name
from ldm.inference.settings import GenerationSettings
from ldm.machine import is_out_of_memory
from ldm.pipeline import LatentDiffusionPipeline
from ldm.serve.request import Order

PREVIEWS = 8  # of one image: each is one more decoding
PREVIEW_SIDE = 512  # pixels, at most


@dataclass(frozen=True)
class JobProgress:
    """How far an image is. ``preview`` is a data URI of what the denoiser takes it for so far."""

    step: int
    steps: int
    preview: str


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image: PNG bytes with its settings inside, those of the image it started from, and seconds it took."""

    id: str
    settings: GenerationSettings
    png: bytes
    start: bytes | None
    seconds: float


class Worker:
    """Draws orders with a pipeline, one after the other."""

    def __init__(self, pipeline: LatentDiffusionPipeline, model_path: Path):
        self.pipeline, self.name = pipeline, model_path.resolve().name
        self._provenance = provenance_of(pipeline, model_path)
        pipeline.set_progress_bar_config(disable=True)
        # orders are checked while another one is drawn, and these two hold what they are doing
        copied = {name: deepcopy(getattr(pipeline, name)) for name in ("tokenizer", "scheduler")}
        self._checker = LatentDiffusionPipeline(**pipeline.components | copied, diffusion=pipeline.config.diffusion)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of an image whose settings say none."""
        return (self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor,) * 2

    @property
    def unit(self) -> int:
        """What widths and heights are multiples of, in pixels."""
        return self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size

    @property
    def schedulers(self) -> list[str]:
        """Names that settings may choose from."""
        return samplers_for(*self.pipeline.diffusion)

    def check(self, settings: GenerationSettings) -> None:
        """Refuse what the model cannot draw; one thread may call it while another one draws.

        Raises:
            UsageError: naming the setting.
        """
        for text in filter(None, (settings.prompt, settings.negative)):
            self._checker.check_prompt(text)
        # what it starts from has been looked at, and is no file
        check_settings(self._checker, dataclasses.replace(settings, image=None, strength=None))

    def draw(self, order: Order, report: Callable[[JobProgress], None]) -> GeneratedImage:
        """
        Args:
            report: called after every step; what it raises ends the drawing.

        Raises:
            LdmError: when the image cannot be drawn.
        """
        settings, began, preview = order.settings, time.monotonic(), ""

        def after_step(pipeline: LatentDiffusionPipeline, step: int, _: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
            nonlocal preview
            steps = pipeline.num_timesteps
            if step % max(1, steps // PREVIEWS) == 0:
                preview = _data_uri(pipeline.decode(tensors["pred_original_sample"])[0])
            report(JobProgress(step + 1, steps, preview))
            return {}

        own, self.pipeline.scheduler = self.pipeline.scheduler, scheduler_for(self.pipeline, settings)
        try:
            image = self.pipeline(
                settings.prompt,
                negative_prompt=settings.negative,
                num_inference_steps=settings.steps,
                guidance=settings.rule(),
                width=settings.width,
                height=settings.height,
                generator=[torch.Generator().manual_seed(settings.seed)],
                image=order.start,
                strength=settings.strength,
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=["pred_original_sample"],
            ).images[0]
            png = self._png(image, settings)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise LdmError("there is not enough memory for an image of this size; make it smaller") from error
            raise
        finally:
            self.pipeline.scheduler = own
        start = None if order.start is None else _encoded(order.start, "PNG")
        return GeneratedImage(secrets.token_hex(8), settings, png, start, time.monotonic() - began)

    def _png(self, image: Image.Image, settings: GenerationSettings) -> bytes:
        scheduler = self.pipeline.scheduler
        provenance = dataclasses.replace(
            self._provenance, scheduler=scheduler_name(scheduler), sampler=type(scheduler).__name__
        )
        return encode_png(image, settings, provenance)


def _encoded(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def _data_uri(image: Image.Image) -> str:
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return f"data:image/jpeg;base64,{base64.b64encode(_encoded(image, 'JPEG')).decode()}"
