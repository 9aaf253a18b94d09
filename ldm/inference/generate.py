"""Settings -> images, in constant memory: a batch holds images that differ in prompt and seed alone."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.scheduler import Scheduler, make_scheduler
from ldm.errors import LdmError, UsageError, is_out_of_memory
from ldm.files import read_json
from ldm.inference.inputs import Inputs
from ldm.inference.prompts import Fit, fit_prompts
from ldm.inference.settings import GenerationSettings
from ldm.models.autoencoder import enable_tiling
from ldm.models.compiling import Compile, compile_blocks
from ldm.models.dit import transformer_blocks
from ldm.models.image_processor import PreparedImages
from ldm.pipeline import TEXT_PARTS, LatentDiffusionPipeline, load_pipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PREVIEWED = 4  # images of a batch, since each preview decodes them
MAX_FITS = 4096  # prompts whose tokens are kept


class GenerationStep(NamedTuple):
    """The progress of a batch.

    Attributes:
        settings: of its images.
        done, total: denoiser evaluations.
        previews: the first images as the denoiser predicts them now, where a preview is due.
    """

    settings: list[GenerationSettings]
    done: int
    total: int
    previews: list[Image.Image]


class GeneratedImage(NamedTuple):
    """An image, its number among the settings given, its settings, and what its batch shared."""

    number: int
    settings: GenerationSettings
    image: Image.Image
    prepared: Prepared


OnStep = Callable[[GenerationStep], None]


def open_pipeline(
    path: str | Path, device: str | None = None, dtype: str = "fp32", compiled: Compile = False, tiled: bool = False
) -> LatentDiffusionPipeline:
    """The pipeline of a directory, on its device and in its precision.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``; the GPU unless given, where there is one.
        dtype: of its weights: ``fp32``, ``bf16`` or ``fp16``.
        compiled: compile the denoiser's blocks with ``torch.compile``: minutes at first, faster from then on. ``cuda_graphs``
            also replays each block as a CUDA graph: faster for one or a few images at a time.
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
    pipeline = load_pipeline(path, "cpu").to(device, DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    if tiled:
        enable_tiling(pipeline.vae)
    if compiled:
        network = pipeline.transformer
        compile_blocks(network, transformer_blocks(network), compiled, network.device)
    return pipeline


def scheduler_for(pipeline: LatentDiffusionPipeline, settings: GenerationSettings) -> Scheduler:
    """The scheduler that settings name, the pipeline's own where they name none. UsageError lists the names that fit the
    model."""
    if settings.scheduler is None:
        return pipeline.scheduler
    choice = {} if settings.eta is None else {"eta": settings.eta}
    return make_scheduler(settings.scheduler, *pipeline.diffusion, **choice)


def select_adapters(pipeline: LatentDiffusionPipeline, adapters: Sequence[tuple[str, float]], inputs: Inputs) -> None:
    """Let these adapters, each by its reference among the inputs and with its weight, act in the denoiser, and no others; new
    ones are loaded. Raises UsageError for one of another model."""
    loaded = getattr(pipeline.transformer, "peft_config", {})
    names, weights = [], []
    for found, weight in adapters:
        name = found.removeprefix("sha256:")
        if name not in loaded:
            pipeline.load_lora_weights(inputs.file(found), name, force=inputs.any_base)
        if weight:  # DoRA's with a weight of 0 would still scale
            names, weights = [*names, name], [*weights, weight]
    if names:
        pipeline.enable_lora()
        pipeline.set_adapters(names, weights)
    elif getattr(pipeline.transformer, "peft_config", {}):
        pipeline.disable_lora()


def batch_key(settings: GenerationSettings) -> GenerationSettings:
    """The settings that images of one batch share: all but the prompts and the seed."""
    return dataclasses.replace(settings, prompt="any", negative="", seed=0)


class Prepared(NamedTuple):
    """What the images of a batch share: the sampler, and the image that they start from."""

    sampler: Sampler
    image: PreparedImages | None

    @property
    def composite(self) -> bool:
        """Whether a part of the image is kept."""
        return self.image is not None and self.image.mask is not None


class ImageGenerator:
    """Generates images with a pipeline. What images have in common is prepared once: the sampler, the image to start from, the
    weaker model of autoguidance, the tokens and embeddings of the prompts.

    Only what was used last is kept, so that memory does not grow with the number of images.
    """

    def __init__(
        self,
        pipeline: LatentDiffusionPipeline,
        strict: bool = False,
        warn: Callable[[str], None] = warnings.warn,
        inputs: Inputs | None = None,
    ) -> None:
        """
        Args:
            strict: :meth:`check` refuses a prompt that the text encoder does not take whole, instead of warning: one that is
                too long, or holds words that it does not know.
            warn: receives such a warning, once for each prompt, with the words that the text encoder does not see.
            inputs: the files that settings name by their hashes; a path in settings is added to them.
        """
        self.inputs = inputs or Inputs()
        self.pipeline, self.strict, self.warn = pipeline, strict, warn
        self._warned: set[Any] = set()
        self._tokens: tuple[str, ...] | None = ()  # that the text encoder knows now; None: an unknown part of them
        self._fits: dict[str, list[Fit]] = {}  # by each text encoder
        self.prepare = functools.lru_cache(8)(self._prepare)
        self._encoded = functools.lru_cache(8)(self._encode)
        self._weak = functools.lru_cache(1)(self._load_weak)

    def check(self, settings: GenerationSettings) -> None:
        """Raise UsageError, before anything is generated, for settings that the pipeline cannot use."""
        named = self.inputs.named(settings)
        self._use_tokens(named)
        if settings.image is None or settings.prompt.strip():
            self.pipeline.require_prompt(settings.prompt)
        if settings.negative.strip():
            self.pipeline.require_prompt(settings.negative)
        for text, fits in self.fit((settings.prompt, settings.negative)).items():
            if (text, self._tokens) in self._warned:
                continue
            messages, unknown = [], {}
            for encoder, fit in zip(self.pipeline.text_encoders, fits, strict=True):
                if fit.cut:
                    messages.append(
                        f"the prompt {text[:40]!r}… is too long for the text encoder, which does not see: {fit.cut!r}"
                    )
                words = encoder.unknown_words([fit.kept])
                unknown = dict.fromkeys(words if fit is fits[0] else (word for word in unknown if word in words))
            if unknown:
                words = ", ".join(map(repr, unknown))
                messages.append(f"the text encoder does not know these words of the prompt {text[:40]!r}: {words}; change them")
            for message in messages:
                if self.strict:
                    raise UsageError(message)
                self.warn(message)
            self._warned.add((text, self._tokens))
        self.prepare(batch_key(named))

    def generate(
        self,
        settings: Sequence[GenerationSettings],
        batch_size: int = 1,
        on_step: OnStep | None = None,
        preview_every: int = 0,
    ) -> Iterator[GeneratedImage]:
        """Generate images, ``batch_size`` at a time; no more than these are held in memory.

        Every image has its own generator, so that it is the same in every batch but for rounding (at most 1 of 255 in fp32),
        and bit for bit where the batch has the same shape.

        Args:
            settings: one per image; those that can share a batch do, so that the order may change.
            on_step: called after each denoiser evaluation; an exception in it ends the generation.
            preview_every: it gets previews every so many evaluations; 0 is never.

        Raises:
            UsageError: for settings that the pipeline cannot use.
            LdmError: when the denoiser's output is not finite, or memory does not suffice.
        """
        alike: dict[GenerationSettings, list[int]] = {}
        for number, one in enumerate(settings):
            alike.setdefault(batch_key(self.inputs.named(one)), []).append(number)
        for shared, numbers in alike.items():
            prepared = self.prepare(shared)
            for start in range(0, len(numbers), batch_size):
                chosen = numbers[start : start + batch_size]
                batch = [settings[number] for number in chosen]
                images = self._generate(shared, batch, on_step, preview_every)
                for number, one, image in zip(chosen, batch, images, strict=True):
                    yield GeneratedImage(number, one, image, prepared)

    def fit(self, texts: Iterable[str]) -> dict[str, list[Fit]]:
        """Texts as each text encoder takes them; new ones are tokenised together."""
        wanted = [*dict.fromkeys(texts)]
        if len(self._fits) > MAX_FITS:
            self._fits.clear()
        if new := [text for text in wanted if text not in self._fits]:
            fits = [fit_prompts(encoder, new) for encoder in self.pipeline.text_encoders]
            self._fits |= {text: [of_encoder[text] for of_encoder in fits] for text in new}
        return {text: self._fits[text] for text in wanted}

    def _prepare(self, shared: GenerationSettings) -> Prepared:
        """What images of one :func:`batch_key` share; as ``prepare`` each is made once. Raises UsageError, naming the setting
        that the pipeline cannot use."""
        pipeline, image = self.pipeline, None
        scheduler = scheduler_for(pipeline, shared)
        pipeline.size_condition(pipeline.default_size, **shared.size_condition())
        if shared.image is None:
            pipeline.latent_shape(1, shared.height, shared.width)
        else:
            mask = None if shared.mask is None else self.inputs.image(shared.mask, background=(0, 0, 0))
            image = pipeline.prepare_images(self.inputs.image(shared.image), mask, shared.height, shared.width)
        if shared.weak is not None:
            _check_weak(pipeline, self.inputs.model(shared.weak))
        if shared.lora:
            select_adapters(pipeline, shared.adapters(), self.inputs)
        sampler = pipeline.make_sampler(shared.steps, shared.strength, image, scheduler, shared.height, shared.width)
        return Prepared(sampler, image)

    def _use_tokens(self, settings: GenerationSettings) -> None:
        """Have the text encoder know the learned tokens of settings, and no others."""
        wanted = settings.embedding or ()
        if wanted == self._tokens:
            return
        self._tokens = None
        self._fits.clear()
        self._encoded.cache_clear()
        self.pipeline.unload_textual_inversion()
        for found in wanted:
            self.pipeline.load_textual_inversion(self.inputs.file(found))
        self._tokens = wanted

    def _encode(self, prompts: tuple[str, ...], negatives: tuple[str, ...]) -> tuple[Condition, Condition]:
        fits = self.fit(prompts + negatives)
        prompt, negative = ([[fit.tokens for fit in fits[text]] for text in texts] for texts in (prompts, negatives))
        return self.pipeline.embed(prompt), self.pipeline.embed(negative)

    def _load_weak(self, found: str) -> ModelMixin:
        network = self.pipeline.transformer
        return load_pipeline(self.inputs.model(found), "cpu").transformer.to(network.device, network.dtype)

    def _generate(
        self, shared: GenerationSettings, batch: list[GenerationSettings], on_step: OnStep | None, preview_every: int
    ) -> list[Image.Image]:
        pipeline, (sampler, image) = self.pipeline, self.prepare(shared)
        select_adapters(pipeline, shared.adapters(), self.inputs)
        self._use_tokens(shared)

        def after_step(_: DiffusionPipeline, number: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
            if on_step is not None:
                due = preview_every > 0 and (number + 1) % preview_every == 0
                previews = pipeline.decode(tensors["pred_original_sample"][:PREVIEWED]) if due else []
                on_step(GenerationStep(batch, number + 1, len(sampler), previews))

        try:
            prompt, negative = self._encoded(tuple(one.prompt for one in batch), tuple(one.negative for one in batch))
            (images,) = pipeline(
                prompt_embeds=prompt.embeddings,
                prompt_attention_mask=prompt.mask,
                negative_prompt_embeds=negative.embeddings,
                negative_prompt_attention_mask=negative.mask,
                sampler=sampler,
                guidance=shared.rule(),
                width=shared.width,
                height=shared.height,
                image=image,
                **shared.size_condition(),
                weak_transformer=None if shared.weak is None else self._weak(shared.weak),
                generator=[torch.Generator().manual_seed(one.seed) for one in batch],
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=("pred_original_sample",),
                return_dict=False,
            )
            return images
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise LdmError(
                    f"there is not enough memory for {len(batch)} images at a time; make the batch or the size smaller, or "
                    "decode in tiles"
                ) from error
            raise


def _check_weak(pipeline: LatentDiffusionPipeline, path: Path) -> None:
    """Refuse a pipeline whose denoiser is not another checkpoint of the same model, by its configs alone."""
    kind = dict[str, Any]
    weak, config = read_json(path / "model_index.json", kind), read_json(path / "transformer" / "config.json", kind)
    ours, theirs = pipeline.config, {}
    for part in (weak.get("diffusion"), weak.get("trained_on"), config):
        theirs |= part if isinstance(part, dict) else {}
    needed = (ours["diffusion"] or {}) | (ours["trained_on"] or {}) | pipeline.transformer.config
    for name in ("path", "prediction", "autoencoder", *TEXT_PARTS, "latent_shape", "in_channels", "sample_size"):
        if name in theirs and name in needed and theirs[name] != needed[name]:
            raise UsageError(f"weak {path} was trained with another {name}; give an earlier checkpoint of the same model")
