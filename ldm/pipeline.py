"""Words -> pictures, in diffusers' own terms: ``DiffusionPipeline.from_pretrained`` opens what training saves."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ldm.diffusion.guidance import ClassifierFree, Condition, Conversion, Guidance, GuidedDenoiser
from ldm.diffusion.sampling import Sampler
from ldm.diffusion.scheduler import Diffusion, check_scheduler, describe, diffusion_from, diffusion_of
from ldm.errors import UsageError, first_line
from ldm.files import read_json
from ldm.models.autoencoder import autoencoder_hash, decode_latents, downsampling_factor, images_to_pictures
from ldm.models.dit import text_computed_once
from ldm.models.text import encode_captions, max_tokens, text_encoder_hash

Step = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


class LatentDiffusionPipeline(DiffusionPipeline):
    """Text encoder, denoiser, scheduler and autoencoder of one trained model."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        trained_on: dict[str, Any] | None = None,
        diffusion: dict[str, Any] | None = None,
    ):
        """
        Args:
            trained_on: what the denoiser's latents were made with: sha256 of ``autoencoder`` and ``text_encoder``, and
                ``latent_shape``; kept in ``model_index.json``, see :meth:`check_parts`.
            diffusion: path and prediction of the denoiser, as :func:`ldm.diffusion.scheduler.describe` gives them; kept in
                ``model_index.json``. Where it is not given, what ``scheduler`` says of them holds.
        """
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler
        )
        self.register_to_config(trained_on=trained_on, diffusion=diffusion)
        if diffusion is None and scheduler is not None:
            self.register_to_config(diffusion=describe(*diffusion_of(scheduler)))
        self.vae_scale_factor = downsampling_factor(vae) if vae is not None else 8

    @property
    def diffusion(self) -> Diffusion:
        """What the denoiser was trained with; ``scheduler = make_scheduler(name, *pipeline.diffusion)`` is another sampler."""
        if self.config.diffusion is None:
            raise UsageError("the pipeline was made without a scheduler and without diffusion; give one of them")
        return diffusion_from(self.config.diffusion)

    def check_parts(self) -> None:
        """Refuse parts that do not fit the denoiser's training, as they are after loading in their own precision.

        Raises:
            UsageError: naming what it was trained with and what is there.
        """
        before = self.config.trained_on or {}
        now = {
            "autoencoder": ("vae", autoencoder_hash(self.vae)),
            "text_encoder": ("text_encoder", text_encoder_hash(self.tokenizer, self.text_encoder)),
        }
        for what, (folder, found) in now.items():
            if before.get(what, found) != found:
                raise UsageError(
                    f"{folder}/ of the pipeline is {what.replace('_', ' ')} {found[:12]}, but its denoiser was trained with "
                    f"{before[what][:12]}; put that one back"
                )
        check_scheduler(self.scheduler, *self.diffusion)
        config = self.transformer.config
        shape = [config.in_channels, config.sample_size]
        trained = before.get("latent_shape") or [*shape, config.sample_size]
        if shape != [trained[0], max(trained[1:])]:
            raise UsageError(
                f"transformer/ of the pipeline is made for latents of {shape[0]} channels and side {shape[1]}, but was trained "
                f"on {trained[0]} and {max(trained[1:])}; put its own config.json back"
            )

    def check_prompt(self, prompt: str) -> None:
        """Refuse a prompt that would not be drawn as written.

        Raises:
            UsageError: when it is empty or longer than the text encoder takes.
        """
        if not prompt.strip():
            raise UsageError("the prompt is empty; say what to draw")
        length, limit = len(self.tokenizer(prompt)["input_ids"]), max_tokens(self.tokenizer)
        if length > limit:
            raise UsageError(f"the prompt {prompt[:40]!r}… has {length} tokens, the text encoder takes {limit}; shorten it")

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of prompts; the empty string is the null condition."""
        return Condition(*encode_captions(self.tokenizer, self.text_encoder, prompts))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 30,
        guidance_scale: float = 3.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Step | None = None,
        guidance: Guidance | None = None,
        weak_transformer: ModelMixin | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """
        Args:
            prompt: one or several.
            negative_prompt: what guidance leads away from; one for all, or one per prompt.
            num_inference_steps: steps of the scheduler, each one call of the denoiser (``heun``: two).
            guidance_scale: w of ``null + w·(cond − null)``; 1 is no guidance.
            num_images_per_prompt: pictures per prompt.
            height, width: in pixels; the size trained on unless given.
            generator: one, or one per picture (then a picture does not depend on the batch it was drawn in).
            latents: starting noise (B, C, h, w) of unit variance, instead of drawing it.
            output_type: ``pil``; ``pt`` for (B, 3, H, W) in [0, 1]; ``latent`` for normalised latents.
            callback_on_step_end: called as ``(pipeline, step, timestep, {"latents": …})`` after each step.
            guidance: any rule of :mod:`ldm.diffusion.guidance`, in the place of ``guidance_scale``.
            weak_transformer: a weaker checkpoint of the same model that guidance leads away from, in the place of the negative
                prompt: autoguidance.

        Raises:
            UsageError: for a prompt or a size that cannot be drawn, or a scheduler that does not fit the denoiser.
            LdmError: when the denoiser's answer is not finite; names the step.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        for text in (*prompts, *filter(None, negatives)):
            self.check_prompt(text)
        if len(negatives) != len(prompts):
            raise UsageError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one per prompt")
        device = self._execution_device
        sampler = Sampler(self.scheduler, *self.diffusion, num_inference_steps, device)
        if latents is None:
            shape = self._latent_shape(len(prompts) * num_images_per_prompt, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        condition = self.encode(prompts).repeat(num_images_per_prompt)
        null = self.encode(negatives).repeat(num_images_per_prompt)
        guided = GuidedDenoiser(
            self.transformer,
            condition,
            null if weak_transformer is None else condition,
            guidance or ClassifierFree(guidance_scale),
            Conversion.of(*self.diffusion),
            weak_transformer,
        )
        denoisers = [self.transformer, *([] if weak_transformer is None else [weak_transformer])]
        with self.progress_bar(total=len(sampler)) as progress, text_computed_once(*denoisers):

            def after_step(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
                progress.update()
                if callback_on_step_end is None:
                    return latents
                return callback_on_step_end(self, step, timestep, {"latents": latents}).get("latents", latents)

            latents = sampler(guided, latents.to(device), generator, after_step)
        images = self._finish(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _latent_shape(self, batch: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        config, factor = self.transformer.config, self.vae_scale_factor
        height, width = height or config.sample_size * factor, width or config.sample_size * factor
        unit = factor * config.patch_size
        if height % unit or width % unit:
            raise UsageError(f"a picture of {width}x{height} cannot be drawn: give multiples of {unit} pixels")
        return batch, config.in_channels, height // factor, width // factor

    def _finish(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = decode_latents(self.vae, latents)
        return images_to_pictures(images) if output_type == "pil" else (images + 1) / 2


def load_pipeline(path: str | os.PathLike) -> LatentDiffusionPipeline:
    """The pipeline of a directory, on the GPU where there is one.

    Raises:
        UsageError: when ``path`` is anything else.
    """
    index = Path(path) / "model_index.json"
    if not index.is_file():
        raise UsageError(f"{path} is not a pipeline directory (no model_index.json); ldm denoiser fit makes one")
    content = read_json(index)
    kind = content.get("_class_name") if isinstance(content, dict) else None
    if kind != LatentDiffusionPipeline.__name__:
        raise UsageError(
            f"{index} is of a {kind}; give the directory of a LatentDiffusionPipeline, as ldm denoiser fit makes it"
        )
    try:
        pipeline = LatentDiffusionPipeline.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be opened ({first_line(error)}); restore it or train it again") from error
    try:
        pipeline.check_parts()
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
