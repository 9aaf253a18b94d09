"""From a request to an image: the only place of the server that calls the pipeline."""

from __future__ import annotations

import base64
import dataclasses
import io
import secrets
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from ldm.diffusion.scheduler import samplers_for
from ldm.errors import LdmError, is_out_of_memory
from ldm.inference.generate import ImageGenerator, batch_key, scheduler_for, select_adapters
from ldm.inference.inputs import Inputs
from ldm.inference.metadata import encode_png, provenance_of
from ldm.inference.settings import GenerationSettings
from ldm.models.adapter_file import ADAPTER_NAME, AdapterFile
from ldm.pipeline import LatentDiffusionPipeline
from ldm.serve.request import GenerationRequest

PREVIEWS = 8  # per image: each costs one decoding
PREVIEW_SIDE = 512  # pixels, at most
# of files and folders that say nothing about an adapter
PLAIN_NAMES = (Path(ADAPTER_NAME).stem, "adapter")


@dataclass(frozen=True)
class JobProgress:
    """Progress of an image. ``preview`` is a data URI of the denoiser's current prediction of it."""

    step: int
    steps: int
    preview: str


@dataclass(frozen=True)
class StoredImage:
    """A finished image as PNG with its settings inside; ``start`` is the PNG of the image it started from."""

    id: str
    settings: GenerationSettings
    png: bytes
    start: bytes | None
    seconds: float


@dataclass(frozen=True)
class OfferedAdapter:
    """An adapter that images can be generated with: how settings name it, what it is called, the weight that the page begins
    with, and the words that call up what it was trained on."""

    reference: str
    name: str
    weight: float
    trigger_words: list[str]


class Worker:
    """Generates images with a pipeline, one after the other."""

    def __init__(
        self, pipeline: LatentDiffusionPipeline, model_path: Path, adapters: Sequence[str] = (), any_base: bool = False
    ):
        """
        Args:
            adapters: files, each with its weight as in ``style=0.8``, that settings can choose.
            any_base: they may be of another base of the same architecture.

        Raises:
            UsageError: for an adapter of another model.
        """
        self.pipeline, self.name, self._inputs = pipeline, model_path.resolve().name, Inputs(any_base)
        self._provenance = provenance_of(pipeline, model_path)
        pipeline.set_progress_bar_config(disable=True)
        # requests are checked while an image is generated, and a tokenizer is not safe in two threads
        parts = pipeline.components
        parts |= {name: deepcopy(part) for name, part in parts.items() if name.startswith("tokenizer")}
        diffusion, trained_on = pipeline.config["diffusion"], pipeline.config["trained_on"]
        checked = LatentDiffusionPipeline(**parts, diffusion=diffusion, trained_on=trained_on)
        checked.warned = pipeline.warned  # once is enough
        self._checker = ImageGenerator(checked)
        offered = self._inputs.named(GenerationSettings(lora=tuple(adapters))).adapters()
        # loaded now, so that a wrong one is refused before the server starts
        select_adapters(pipeline, offered, self._inputs)
        self.adapters = [self._offered(reference, weight) for reference, weight in offered]

    def _offered(self, reference: str, weight: float) -> OfferedAdapter:
        path = self._inputs.file(reference)
        # of "runs/dog/adapter/pytorch_lora_weights.safetensors" this is "dog"
        named = [part for part in (path.stem, *reversed(path.resolve().parent.parts)) if part not in PLAIN_NAMES]
        return OfferedAdapter(reference, named[0], weight, AdapterFile.read(path).trigger_words)

    @property
    def size(self) -> tuple[int, int]:
        """Default width and height."""
        height, width = self.pipeline.default_size
        return width, height

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of all images trained on, the default first."""
        return [(width, height) for height, width in self.pipeline.trained_sizes]

    @property
    def classes(self) -> list[str] | None:
        """The classes that are its prompts; none of them where it takes no prompt. None: it takes any."""
        return self.pipeline.classes

    @property
    def unit(self) -> int:
        """Pixels that widths and heights are multiples of."""
        return self.pipeline.size_unit

    @property
    def schedulers(self) -> list[str]:
        """Names that settings can choose from."""
        return samplers_for(*self.pipeline.diffusion)

    @property
    def recommended(self) -> dict[str, Any]:
        """Settings that are the defaults of this model."""
        return self.pipeline.recommended_settings()

    def complete(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings as JSON, with the recommended ones where none are given."""
        return self.pipeline.with_recommended(settings)

    def check(self, settings: GenerationSettings) -> None:
        """Raise :class:`UsageError` for settings that the model cannot use; thread-safe beside :meth:`generate`."""
        pipeline = self._checker.pipeline
        if settings.image is None or settings.prompt.strip():
            pipeline.check_prompt(settings.prompt)
        if settings.negative.strip():
            pipeline.check_prompt(settings.negative)
        # the start image was checked by parse_request, and is not a file; adapters were, and are not changed meanwhile
        self._checker.prepare(batch_key(dataclasses.replace(settings, image=None, strength=None, lora=None)))

    def generate(self, request: GenerationRequest, report: Callable[[JobProgress], None]) -> StoredImage:
        """Generate an image; raises :class:`LdmError` when memory is short.

        ``report`` is called after every step; an exception that it raises ends the generation.
        """
        settings, began, preview = request.settings, time.monotonic(), ""

        def after_step(_: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
            nonlocal preview
            steps = self.pipeline.num_timesteps
            if step % max(1, steps // PREVIEWS) == 0:
                preview = _data_uri(self.pipeline.decode(tensors["pred_original_sample"])[0])
            report(JobProgress(step + 1, steps, preview))
            return {}

        try:
            prepared = request.start and self.pipeline.prepare_images(request.start, None, settings.height, settings.width)
            composite = prepared is not None and prepared.mask is not None
            select_adapters(self.pipeline, settings.adapters(), self._inputs)
            scheduler, size = scheduler_for(self.pipeline, settings), (settings.height, settings.width)
            image = self.pipeline(
                settings.prompt,
                negative_prompt=settings.negative,
                sampler=self.pipeline.make_sampler(settings.steps, settings.strength, prepared, scheduler, *size),
                guidance=settings.rule(),
                width=settings.width,
                height=settings.height,
                generator=[torch.Generator().manual_seed(settings.seed)],
                image=prepared,
                **settings.size_condition(),
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=["pred_original_sample"],
                return_dict=False,
            )[0][0]
            png = encode_png(image, settings, self._provenance.of_scheduler(scheduler, composite))
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise LdmError("not enough memory for an image of this size; make it smaller") from error
            raise
        start = None if request.start is None else _encoded(request.start, "PNG")
        return StoredImage(secrets.token_hex(8), settings, png, start, time.monotonic() - began)


def _encoded(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def _data_uri(image: Image.Image) -> str:
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return f"data:image/jpeg;base64,{base64.b64encode(_encoded(image, 'JPEG')).decode()}"
