"""From an order to a picture: the one place of the server that calls the pipeline."""

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
from ldm.drawing.draw import check_settings, scheduler_for
from ldm.drawing.metadata import encode_png, provenance_of, scheduler_name
from ldm.drawing.settings import PictureSettings
from ldm.errors import LdmError
from ldm.machine import is_out_of_memory
from ldm.pipeline import LatentDiffusionPipeline
from ldm.serve.order import Order

PREVIEWS = 8  # of one picture: each is one more decoding
PREVIEW_SIDE = 512  # pixels, at most


@dataclass(frozen=True)
class Progress:
    """How far a picture is. ``preview`` is a data URI of what the denoiser takes it for so far."""

    step: int
    steps: int
    preview: str


@dataclass(frozen=True)
class Picture:
    """A finished picture: PNG bytes with its settings inside, those of the picture it started from, and seconds it took."""

    id: str
    settings: PictureSettings
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
        """Width and height of a picture whose settings say none."""
        return (self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor,) * 2

    @property
    def unit(self) -> int:
        """What widths and heights are multiples of, in pixels."""
        return self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size

    @property
    def schedulers(self) -> list[str]:
        """Names that settings may choose from."""
        return samplers_for(*self.pipeline.diffusion)

    def check(self, settings: PictureSettings) -> None:
        """Refuse what the model cannot draw; one thread may call it while another one draws.

        Raises:
            UsageError: naming the setting.
        """
        for text in filter(None, (settings.prompt, settings.negative)):
            self._checker.check_prompt(text)
        # what it starts from has been looked at, and is no file
        check_settings(self._checker, dataclasses.replace(settings, image=None, strength=None))

    def draw(self, order: Order, report: Callable[[Progress], None]) -> Picture:
        """
        Args:
            report: called after every step; what it raises ends the drawing.

        Raises:
            LdmError: when the picture cannot be drawn.
        """
        settings, began, preview = order.settings, time.monotonic(), ""

        def after_step(pipeline: LatentDiffusionPipeline, step: int, _: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
            nonlocal preview
            steps = pipeline.num_timesteps
            if step % max(1, steps // PREVIEWS) == 0:
                preview = _data_uri(pipeline.decode(tensors["pred_original_sample"])[0])
            report(Progress(step + 1, steps, preview))
            return {}

        own, self.pipeline.scheduler = self.pipeline.scheduler, scheduler_for(self.pipeline, settings)
        try:
            picture = self.pipeline(
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
            png = self._png(picture, settings)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise LdmError("there is not enough memory for a picture of this size; make it smaller") from error
            raise
        finally:
            self.pipeline.scheduler = own
        start = None if order.start is None else _encoded(order.start, "PNG")
        return Picture(secrets.token_hex(8), settings, png, start, time.monotonic() - began)

    def _png(self, picture: Image.Image, settings: PictureSettings) -> bytes:
        scheduler = self.pipeline.scheduler
        provenance = dataclasses.replace(
            self._provenance, scheduler=scheduler_name(scheduler), sampler=type(scheduler).__name__
        )
        return encode_png(picture, settings, provenance)


def _encoded(picture: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format)
    return buffer.getvalue()


def _data_uri(picture: Image.Image) -> str:
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return f"data:image/jpeg;base64,{base64.b64encode(_encoded(picture, 'JPEG')).decode()}"
