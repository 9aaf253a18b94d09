"""Words -> images, in diffusers' own terms: ``DiffusionPipeline.from_pretrained`` opens what training saves."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ldm.data.decode import DecodeError, decode_image
from ldm.diffusion.conditioning import Condition
from ldm.diffusion.editing import KnownPart, invert, latent_mask
from ldm.diffusion.guidance import ClassifierFree, Conversion, Guidance, GuidedDenoiser
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.scheduler import Diffusion, check_scheduler, diffusion_config, diffusion_from, diffusion_of
from ldm.errors import UsageError, first_line
from ldm.files import read_json
from ldm.models import dit as dit  # diffusers opens a saved denoiser only where its module is imported
from ldm.models.autoencoder import LatentNormalizer, autoencoder_hash, decode_latents, downsampling_factor
from ldm.models.image_processor import Images, PreparedImages, to_output
from ldm.models.text_encoder import encode_captions, max_tokens, text_encoder_hash

# (pipeline, step, timestep, tensors) -> those of them to go on with
Callback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
STRENGTH = 0.6  # keeps what an image shows, and leaves colours and details to the prompt


class LatentDiffusionPipeline(DiffusionPipeline):
    """Text encoder, denoiser, scheduler and autoencoder of one trained model."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents", "pred_original_sample")
    _interrupt = False
    _num_timesteps = 0

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
            diffusion: path and prediction of the denoiser, as :func:`ldm.diffusion.scheduler.diffusion_config` gives them;
                kept in ``model_index.json``. Where it is not given, what ``scheduler`` says of them holds.
        """
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler
        )
        self.register_to_config(trained_on=trained_on, diffusion=diffusion)
        if diffusion is None and scheduler is not None:
            self.register_to_config(diffusion=diffusion_config(*diffusion_of(scheduler)))
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
        embeddings, mask = encode_captions(self.tokenizer, self.text_encoder, prompts)
        return Condition(embeddings.to(self.transformer.dtype), mask)

    @torch.no_grad()
    def encode_images(self, image: Images, height: int | None = None, width: int | None = None) -> Tensor:
        """Normalised latents (B, C, h, w) of images; their sizes are dealt with as :meth:`__call__` does."""
        return self._latents(self.canvas(image, None, height, width).images.to(self._execution_device))

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Images of normalised latents (B, C, h, w), as :meth:`__call__` gives them; of previews too."""
        return latents if output_type == "latent" else to_output(decode_latents(self.vae, latents), output_type)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set ``pipeline._interrupt``: the walk then ends and its latents are decoded as they are."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Calls of the denoiser in the latest walk."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
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
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance: Guidance | None = None,
        weak_transformer: ModelMixin | None = None,
        image: Images | None = None,
        strength: float | None = None,
        mask_image: Images | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images from words, from images, or both.

        With ``image`` it is image-to-image; with ``mask_image``, or where ``image`` is transparent, the rest is kept and only
        that part drawn: inpainting, and outpainting of an image on a larger, transparent canvas.

        Args:
            prompt: one or several, B; it may be empty where there are an ``image``, for variations of it, or ``latents``.
            negative_prompt: what guidance leads away from; one for all, or one per prompt.
            num_inference_steps: steps of the scheduler, each one call of the denoiser (``heun``: two).
            guidance_scale: w of ``null + w·(cond − null)``; 1 is no guidance.
            num_images_per_prompt: N, images per prompt.
            height, width: in pixels; those of ``image``, or the size trained on, unless given.
            generator: one, or one per image (then an image does not depend on the batch it was drawn in).
            latents: noise (B·N, C, h, w) of unit variance, instead of drawing it.
            output_type: ``pil``; ``np`` for (B·N, H, W, 3) and ``pt`` for (B·N, 3, H, W), float32 in [0, 1]; ``latent`` for
                normalised latents (B·N, C, h, w), before the pixels of ``image`` are put back.
            return_dict: false gives ``(images,)``.
            callback_on_step_end: called as ``(pipeline, step, timestep, tensors)`` after each call of the denoiser; ``latents``
                in the dict that it returns are gone on with. It may set ``pipeline._interrupt = True`` to end the walk.
            callback_on_step_end_tensor_inputs: which tensors it is given, both (B·N, C, h, w): ``latents``, the scheduler's
                state, and ``pred_original_sample``, the clean image's latents as the denoiser sees them now; they are
                previewed by :meth:`decode`.
            guidance: any rule of :mod:`ldm.diffusion.guidance`, in the place of ``guidance_scale``.
            weak_transformer: a weaker checkpoint of the same model that guidance leads away from, in the place of the negative
                prompt: autoguidance.
            image: PIL images or tensors (3, H, W) or (B, 3, H, W) in [0, 1], one, or one per prompt, all of one size. Scaled
                and cut to ``height`` and ``width`` where they are given; of any size without.
            strength: share of the steps that is walked, in (0, 1]: how far to go from ``image``. 1 draws what there would be
                without it, from the same noise. 0.6, and with a mask 1, unless given.
            mask_image: of the image's size, white where it is to be redrawn. Outside, and farther from it than one latent
                (``vae_scale_factor`` pixels), where the two are blended, the image's pixels stay identical.

        Raises:
            UsageError: for a prompt, an image or a size that cannot be drawn, or a scheduler that does not fit the denoiser.
            LdmError: when the denoiser's answer is not finite; names the step.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise UsageError(f"no tensor {name!r} for a callback; choose from: {', '.join(self._callback_tensor_inputs)}")
        if output_type not in OUTPUT_TYPES:
            raise UsageError(f"output_type is {output_type!r}; choose from: {', '.join(OUTPUT_TYPES)}")
        if image is None and not (strength is None and mask_image is None):
            raise UsageError("strength and mask_image are of an image; give image, too")
        canvas = None if image is None else self.canvas(image, mask_image, height, width)
        prompts = self._prompts(prompt, canvas, may_be_empty=canvas is not None or latents is not None)
        device, count = self._execution_device, len(prompts) * num_images_per_prompt
        if canvas is not None:
            canvas = canvas.to(device, count)
            height, width = canvas.images.shape[-2:]
            strength = strength if strength is not None else STRENGTH if canvas.mask is None else 1.0
        sampler = Sampler(self.scheduler, *self.diffusion, num_inference_steps, device, 1.0 if strength is None else strength)
        if latents is None:
            shape = self.latent_shape(count, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents, x0, known = latents.to(device, torch.float32), None, None
        if canvas is not None:
            x0 = self._latents(canvas.images)
            if canvas.mask is not None:
                known = KnownPart(x0, latents, latent_mask(canvas.mask, self.vae_scale_factor))
        guided = self._guided(
            prompts, negative_prompt, num_images_per_prompt, guidance or ClassifierFree(guidance_scale), weak_transformer
        )
        self._interrupt, self._num_timesteps = False, len(sampler)
        with self.progress_bar(total=len(sampler)) as progress:
            for step in sampler.walk(guided, latents, generator, x0):
                if known is not None:
                    known.put_back(sampler, step)
                progress.update()
                if callback_on_step_end is not None:
                    tensors = {"latents": step.latents, "pred_original_sample": step.x0}
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    step.latents = (callback_on_step_end(self, step.number, step.timestep, given) or {}).get(
                        "latents", step.latents
                    )
                if self.interrupt:
                    break
        images = step.latents
        if output_type != "latent":
            images = decode_latents(self.vae, images)
            images = images if canvas is None else canvas.finish(images, band=self.vae_scale_factor)
            images = to_output(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def invert(
        self,
        image: Images,
        prompt: str | Sequence[str] = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """The noise that images would be drawn from: DDIM inversion, see :func:`ldm.diffusion.editing.invert`.

        ``pipeline(prompt, latents=noise, num_inference_steps=…, guidance_scale=1.0)`` draws them again, with another prompt an
        edited image. Both ways along the pipeline's scheduler; it should be deterministic, best ``ddim`` or ``euler``.

        Args:
            image, height, width: as :meth:`__call__` takes them, without a mask; B images.
            prompt: what they show; one for all, or one per image. It may be empty.
            num_inference_steps: as many as it will be drawn again in.
            guidance_scale: the same as it will be drawn again with; away from 1 the way back is less exact.

        Returns:
            Noise (B, C, h, w), float32, for ``latents``.
        """
        canvas = self.canvas(image, None, height, width)
        prompts = self._prompts(prompt, canvas, may_be_empty=True)
        canvas = canvas.to(self._execution_device, len(prompts))
        sampler = Sampler(self.scheduler, *self.diffusion, num_inference_steps, self._execution_device)
        x0 = self._latents(canvas.images)
        guided = self._guided(prompts, "", 1, ClassifierFree(guidance_scale))
        with self.progress_bar(total=num_inference_steps) as progress:
            noise = invert(sampler, guided, x0, on_step=progress.update)
        self.maybe_free_model_hooks()
        return noise

    def _prompts(self, prompt: str | Sequence[str], canvas: PreparedImages | None, may_be_empty: bool) -> list[str]:
        """One per image but for repeats."""
        prompts, images = [prompt] if isinstance(prompt, str) else list(prompt), 1 if canvas is None else len(canvas.images)
        for text in prompts:
            if not may_be_empty or text.strip():
                self.check_prompt(text)
        prompts = prompts * images if len(prompts) == 1 else prompts
        if images not in (1, len(prompts)):
            raise UsageError(f"{images} images for {len(prompts)} prompts; give one, or one per prompt")
        return prompts

    def canvas(self, image: Images, mask: Images | None, height: int | None, width: int | None) -> PreparedImages:
        """Images to start from, as :meth:`__call__` takes them, ready for the autoencoder.

        Raises:
            UsageError: for what is no image, a mask that does not fit, or a size that cannot be drawn.
        """
        if height or width:
            self.latent_shape(1, height, width)
        canvas = PreparedImages.of(image, mask, height, width, self.vae_scale_factor * self.transformer.config.patch_size)
        trained = self.transformer.config.sample_size * self.vae_scale_factor
        if not (height and width) and max(canvas.height, canvas.width) > 4 * trained:
            raise UsageError(
                f"image is {canvas.width}x{canvas.height}, but the model was trained on {trained}x{trained}; give height and "
                "width to draw it at"
            )
        return canvas

    def _latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> normalised latents: the posterior's mode, as its noise is small beside what sampling adds."""
        posterior = self.vae.encode(images.to(self.vae.dtype), return_dict=False)[0]
        return LatentNormalizer.of(self.vae).normalize(posterior.mode().float())

    def _guided(
        self,
        prompts: Sequence[str],
        negative_prompt: str | Sequence[str],
        repeats: int,
        guidance: Guidance,
        weak: ModelMixin | None = None,
    ) -> GuidedDenoiser:
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        for text in filter(None, negatives):
            self.check_prompt(text)
        if len(negatives) != len(prompts):
            raise UsageError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one per prompt")
        condition, null = (self.encode(texts).repeat(repeats) for texts in (prompts, negatives))
        null = null if weak is None else condition
        return GuidedDenoiser(self.transformer, condition, null, guidance, Conversion.of(*self.diffusion), weak)

    def latent_shape(self, batch: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """(B, C, h, w) of images of ``height`` and ``width`` pixels, the size trained on unless given.

        Raises:
            UsageError: for a size that the patches do not divide.
        """
        config, factor = self.transformer.config, self.vae_scale_factor
        height, width = height or config.sample_size * factor, width or config.sample_size * factor
        unit = factor * config.patch_size
        if height % unit or width % unit:
            raise UsageError(f"an image of {width}x{height} cannot be drawn: give multiples of {unit} pixels")
        return batch, config.in_channels, height // factor, width // factor


def read_image(path: str | os.PathLike) -> Image.Image:
    """An image file to start from: RGB, or RGBA where it has transparency; upright, in sRGB.

    Raises:
        UsageError: naming the file, when it is none.
    """
    try:
        data = Path(path).read_bytes()
        image = decode_image(data)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give a JPEG, PNG or WebP image") from None
    except DecodeError as error:
        raise UsageError(f"{path}: {error}; give a JPEG, PNG or WebP image") from None
    with Image.open(io.BytesIO(data)) as file:
        if file.has_transparency_data:
            image.putalpha(ImageOps.exif_transpose(file).convert("RGBA").getchannel("A"))
    return image


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
