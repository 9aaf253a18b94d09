"""Prompts -> images, in diffusers' own terms: ``DiffusionPipeline.from_pretrained`` opens what training saves."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ldm.data.decode import decode_image
from ldm.diffusion.conditioning import Condition
from ldm.diffusion.editing import KnownPart, invert, latent_mask
from ldm.diffusion.guidance import ClassifierFree, Conversion, Guidance, GuidedDenoiser
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.scheduler import Diffusion, Scheduler, check_scheduler, diffusion_config, diffusion_from, diffusion_of
from ldm.errors import LdmError, UsageError, first_line
from ldm.files import read_bytes, read_json, require_version
from ldm.images import MAX_IMAGE_BYTES, DecodeError
from ldm.models import dit as dit  # diffusers opens a saved denoiser only where its module is imported
from ldm.models.autoencoder import (
    LatentNormalizer,
    autoencoder_hash,
    decode_latents,
    downsampling_factor,
    statistics_hash,
)
from ldm.models.image_processor import Images, PreparedImages, to_output
from ldm.models.text_encoder import embed, max_tokens, pad_tokens, text_encoder_hash

FORMAT_VERSION = 1  # of model_index.json
# (pipeline, step, timestep, tensors) -> those of them that are replaced
Callback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
GIVE_AN_IMAGE = "give a JPEG, PNG or WebP image"
STRENGTH = 0.6  # keeps what an image shows, and leaves colours and details to the prompt
# names that the DiT's config once had; diffusers would ignore them and build a network of another size
RENAMED = {"text_width": "caption_channels", "num_heads": "num_attention_heads"}


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
        format_version: int | None = None,
    ):
        """
        Args:
            trained_on: what the denoiser's latents were made with: sha256 of ``autoencoder``, ``text_encoder`` and
                ``latent_statistics``, and ``latent_shape``; kept in ``model_index.json``, see :meth:`check_parts`.
            diffusion: path and prediction of the denoiser, as :func:`ldm.diffusion.scheduler.diffusion_config` gives them;
                kept in ``model_index.json``. Where it is not given, it is derived from ``scheduler``.
            format_version: of the ``model_index.json`` that it was loaded from; it is saved as the present one.

        Raises:
            LdmError: for a newer format.
        """
        require_version(format_version, FORMAT_VERSION, "model_index.json: the pipeline")
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler
        )
        self.register_to_config(trained_on=trained_on, diffusion=diffusion, format_version=FORMAT_VERSION)
        if diffusion is None and scheduler is not None:
            self.register_to_config(diffusion=diffusion_config(*diffusion_of(cast(Scheduler, scheduler))))
        self.vae_scale_factor = downsampling_factor(vae) if vae is not None else 8

    @cached_property
    def diffusion(self) -> Diffusion:
        """What the denoiser was trained with; ``scheduler = make_scheduler(name, *pipeline.diffusion)`` is another sampler."""
        if self.config["diffusion"] is None:
            raise UsageError("the pipeline was made without a scheduler and without diffusion; give one of them")
        return diffusion_from(self.config["diffusion"])

    def check_parts(self) -> None:
        """Raise UsageError for parts that do not fit the denoiser's training, as they are after loading in their own
        precision."""
        before = self.config["trained_on"] or {}
        now = {
            "autoencoder": ("vae/ of the pipeline is autoencoder", autoencoder_hash(self.vae)),
            "text_encoder": (
                "text_encoder/ of the pipeline is text encoder",
                text_encoder_hash(self.tokenizer, self.text_encoder),
            ),
            "latent_statistics": ("vae/config.json of the pipeline has latent statistics", statistics_hash(self.vae)),
        }
        for what, (place, found) in now.items():
            if before.get(what, found) != found:
                raise UsageError(
                    f"{place} {found[:12]}, but its denoiser was trained with {before[what][:12]}; put that one back"
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
        """Raise UsageError, naming the prompt, where it is empty or longer than the text encoder takes."""
        require_prompt(prompt)
        self.tokenize([prompt])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special ones included, for :meth:`embed`. Raises UsageError for a text that is longer than
        the text encoder takes."""
        tokens, limit = self.tokenizer([*texts])["input_ids"], max_tokens(self.tokenizer)
        for text, ids in zip(texts, tokens, strict=True):
            if len(ids) > limit:
                raise UsageError(f"the prompt {text[:40]!r}… has {len(ids)} tokens, the text encoder takes {limit}; shorten it")
        return tokens

    def embed(self, tokens: Sequence[Sequence[int]]) -> Condition:
        """The condition of texts by their token ids, as :meth:`tokenize` gives them."""
        embeddings, mask = embed(self.text_encoder, *pad_tokens(self.tokenizer, tokens))
        return Condition(embeddings.to(self.transformer.dtype), mask)

    @torch.no_grad()
    def encode_images(self, image: Images, height: int | None = None, width: int | None = None) -> Tensor:
        """Normalised latents (B, C, h, w) of images, scaled and cut as :meth:`__call__` does."""
        return self._latents(self.prepare_images(image, None, height, width).images.to(self._execution_device))

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Images of normalised latents (B, C, h, w), as :meth:`__call__` gives them; of previews too."""
        return latents if output_type == "latent" else to_output(decode_latents(self.vae, latents), output_type)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set ``pipeline._interrupt``: sampling then ends and its latents are decoded as they are."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Function evaluations of the denoiser in the latest call."""
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
        image: Images | PreparedImages | None = None,
        strength: float | None = None,
        mask_image: Images | None = None,
        encoded_prompts: tuple[Condition, Condition] | None = None,
        sampler: Sampler | None = None,
    ) -> Any:  # untyped, as in diffusers: ``images`` are of the type that ``output_type`` says
        """Generate images from prompts, from images, or both.

        With ``image`` it is image-to-image; with ``mask_image``, or where ``image`` is transparent, only that part is generated
        and the rest is kept: inpainting, and outpainting of an image on a larger, transparent one.

        Args:
            prompt: one or several, B; it may be empty where there are an ``image``, for variations of it, or ``latents``.
            negative_prompt: what guidance leads away from; one for all, or one per prompt.
            num_inference_steps: steps of the scheduler, each one function evaluation (``heun``: two).
            guidance_scale: w of ``null + w·(cond − null)``; 1 is no guidance.
            num_images_per_prompt: N, images per prompt.
            height, width: in pixels; those of ``image``, or the size trained on, unless given.
            generator: one, or one per image (then an image does not depend on the batch it is generated in).
            latents: noise (B·N, C, h, w) of unit variance, instead of random noise.
            output_type: ``pil``; ``np`` for (B·N, H, W, 3) and ``pt`` for (B·N, 3, H, W), float32 in [0, 1]; ``latent`` for
                normalised latents (B·N, C, h, w), before the pixels of ``image`` are put back.
            return_dict: false gives ``(images,)``.
            callback_on_step_end: called as ``(pipeline, step, timestep, tensors)`` after each function evaluation; sampling
                continues from ``latents`` in the dict that it returns. It may set ``pipeline._interrupt = True`` to end it.
            callback_on_step_end_tensor_inputs: which tensors it is given, both (B·N, C, h, w): ``latents``, the scheduler's
                state, and ``pred_original_sample``, the denoiser's present prediction of the clean latents, for previews by
                :meth:`decode`.
            guidance: any rule of :mod:`ldm.diffusion.guidance`, in the place of ``guidance_scale``.
            weak_transformer: a weaker checkpoint of the same model that guidance leads away from, in the place of the negative
                prompt: autoguidance.
            image: PIL images or tensors (3, H, W) or (B, 3, H, W) in [0, 1], one, or one per prompt, all of one size. Scaled
                and cut to ``height`` and ``width`` where they are given; of any size without.
            strength: share of the steps that is taken, in (0, 1]: how far to go from ``image``. 1 gives what there would be
                without it, from the same noise. 0.6, and with a mask 1, unless given.
            mask_image: of the image's size, white where it is to be regenerated; transparent parts of it count as black.
                Outside, and farther from it than one latent (``vae_scale_factor`` pixels), where the two are blended, the
                image's pixels stay identical.
            encoded_prompts: conditions of B prompts and of their negative prompts, as :meth:`embed` gives them, in the place
                of these.
            sampler: as :meth:`make_sampler` gives it, in the place of ``num_inference_steps`` and ``strength``: it serves many
                calls.

        Raises:
            UsageError: for a prompt, an image or a size that the model cannot take, or a scheduler that does not fit the
                denoiser.
            LdmError: when the denoiser's prediction is not finite; names the step.
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
        prepared = None if image is None else self.prepare_images(image, mask_image, height, width)
        if encoded_prompts is None:
            may_be_empty = prepared is not None or latents is not None
            encoded_prompts = self._encode(prompt, negative_prompt, prepared, may_be_empty)
        condition, null = (encoded.repeat(num_images_per_prompt) for encoded in encoded_prompts)
        device, count = self._execution_device, len(condition.mask)
        if sampler is None:
            sampler = self.make_sampler(num_inference_steps, strength, prepared)
        if prepared is not None:
            prepared = prepared.to(device, count)
            height, width = prepared.images.shape[-2:]
        if latents is None:
            shape = self.latent_shape(count, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents, x0, known = latents.to(device, torch.float32), None, None
        if prepared is not None:
            x0 = self._latents(prepared.images)
            if prepared.mask is not None:
                known = KnownPart(x0, latents, latent_mask(prepared.mask, self.vae_scale_factor))
        guided = self._guided(condition, null, guidance or ClassifierFree(guidance_scale), weak_transformer)
        self._interrupt, self._num_timesteps = False, len(sampler)
        with self._progress(len(sampler)) as progress:
            for step in sampler.steps(guided, latents, generator, x0):
                if known is not None:
                    known.put_back(sampler, step)
                progress.update()
                if callback_on_step_end is not None:
                    tensors = {"latents": step.latents, "pred_original_sample": step.x0}
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, step.number, step.timestep, given) or {}
                    step.latents = changed.get("latents", step.latents)
                latents = step.latents
                if self.interrupt:
                    break
        images: Any = latents
        if output_type != "latent":
            images = decode_latents(self.vae, latents)
            images = images if prepared is None else prepared.finish(images, band=self.vae_scale_factor)
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
        """The noise from which images would be generated: DDIM inversion, see :func:`ldm.diffusion.editing.invert`.

        ``pipeline(prompt, latents=noise, num_inference_steps=…, guidance_scale=1.0)`` reconstructs them, with another prompt an
        edited image. Both ways along the pipeline's scheduler; it should be deterministic, best ``ddim`` or ``euler``.

        Args:
            image, height, width: as :meth:`__call__` takes them, without a mask; B images.
            prompt: what they show; one for all, or one per image. It may be empty.
            num_inference_steps: as many as they will be reconstructed in.
            guidance_scale: the same as they will be reconstructed with; away from 1 the inversion is less exact.

        Returns:
            Noise (B, C, h, w), float32, for ``latents``.
        """
        prepared = self.prepare_images(image, None, height, width)
        condition, null = self._encode(prompt, "", prepared, may_be_empty=True)
        prepared = prepared.to(self._execution_device, len(condition.mask))
        sampler = self.make_sampler(num_inference_steps)
        x0 = self._latents(prepared.images)
        guided = self._guided(condition, null, ClassifierFree(guidance_scale))
        with self._progress(num_inference_steps) as progress:
            noise = invert(sampler, guided, x0, on_step=progress.update)
        self.maybe_free_model_hooks()
        return noise

    def make_sampler(
        self,
        num_inference_steps: int,
        strength: float | None = None,
        image: PreparedImages | None = None,
        scheduler: Scheduler | None = None,
    ) -> Sampler:
        """The sampler of a number of steps from noise, or from ``image``; of the pipeline's scheduler unless given. Raises
        UsageError for a scheduler that does not fit the denoiser, or steps that it cannot take."""
        if strength is None:
            strength = 1.0 if image is None or image.mask is not None else STRENGTH
        return Sampler(
            scheduler or self.scheduler, *self.diffusion, num_inference_steps, self._execution_device, strength=strength
        )

    def prepare_images(
        self, image: Images | PreparedImages, mask: Images | None, height: int | None, width: int | None
    ) -> PreparedImages:
        """Images to start from, as :meth:`__call__` takes them, ready for the autoencoder; once is enough for many calls.
        Raises UsageError for what is no image, a mask that does not fit, or a size that the model cannot take."""
        if isinstance(image, PreparedImages):
            return image
        if height or width:
            self.latent_shape(1, height, width)
        config = self.transformer.config
        prepared = PreparedImages.of(image, mask, height, width, self.vae_scale_factor * config.patch_size)
        trained = config.sample_size * self.vae_scale_factor
        if not (height and width) and max(prepared.height, prepared.width) > 4 * trained:
            raise UsageError(
                f"image is {prepared.width}x{prepared.height}, but the model was trained on {trained}x{trained}; give height "
                "and width to generate it at"
            )
        return prepared

    def _encode(
        self,
        prompt: str | Sequence[str],
        negative: str | Sequence[str],
        image: PreparedImages | None,
        may_be_empty: bool,
    ) -> tuple[Condition, Condition]:
        """Conditions of prompts and negative prompts, a row per image but for repeats; the tokenizer is called once."""
        prompts, images = [prompt] if isinstance(prompt, str) else [*prompt], 1 if image is None else len(image.images)
        if not may_be_empty:
            for text in prompts:
                require_prompt(text)
        prompts = prompts * images if len(prompts) == 1 else prompts
        if images not in (1, len(prompts)):
            raise UsageError(f"{images} images for {len(prompts)} prompts; give one, or one per prompt")
        negatives = [negative] * len(prompts) if isinstance(negative, str) else [*negative]
        if len(negatives) != len(prompts):
            raise UsageError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one per prompt")
        tokens = self.tokenize(prompts + negatives)
        return self.embed(tokens[: len(prompts)]), self.embed(tokens[len(prompts) :])

    def _progress(self, total: int) -> Any:
        return cast(Any, self.progress_bar)(total=total)  # torch's decorator hides the signature

    def _latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> normalised latents: the posterior's mode, as its noise is small beside what sampling adds."""
        posterior = self.vae.encode(images.to(self.vae.dtype), return_dict=False)[0]
        return LatentNormalizer.of(self.vae).normalize(posterior.mode().float())

    def _guided(
        self, condition: Condition, null: Condition, guidance: Guidance, weak: ModelMixin | None = None
    ) -> GuidedDenoiser:
        null = null if weak is None else condition
        return GuidedDenoiser(self.transformer, condition, null, guidance, Conversion(*self.diffusion), weak)

    def latent_shape(self, batch: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """(B, C, h, w) of images of ``height`` and ``width`` pixels, the size trained on unless given. Raises UsageError for a
        size that the patches do not divide."""
        config, factor = self.transformer.config, self.vae_scale_factor
        trained: int = config.sample_size * factor
        height, width = height or trained, width or trained
        unit = factor * config.patch_size
        if height % unit or width % unit:
            raise UsageError(f"an image of {width}x{height} cannot be generated: give multiples of {unit} pixels")
        return batch, config.in_channels, height // factor, width // factor


def require_prompt(prompt: str) -> None:
    """Raise UsageError for an empty prompt."""
    if not prompt.strip():
        raise UsageError("the prompt is empty; say what to generate")


def read_image(path: str | os.PathLike) -> Image.Image:
    """An image file to start from: RGB, or RGBA where it has transparency; upright, in sRGB. Raises UsageError, naming the
    file, for any other."""
    return image_of(read_input(path), path)


def read_input(path: str | os.PathLike) -> bytes:
    """The bytes of an image file that a user gives. Raises UsageError, naming it, where it cannot be read or is too large."""
    try:
        return read_bytes(path, MAX_IMAGE_BYTES, GIVE_AN_IMAGE)
    except LdmError as error:
        raise UsageError(str(error)) from None


def image_of(data: bytes, name: str | os.PathLike, background: tuple[int, int, int] | None = None) -> Image.Image:
    """The image of a file called ``name``, as :func:`read_image` gives it; RGB over ``background`` where that is given."""
    try:
        return decode_image(data, background)
    except DecodeError as error:
        raise UsageError(f"{name}: {error}; {GIVE_AN_IMAGE}") from None


def load_pipeline(path: str | os.PathLike) -> LatentDiffusionPipeline:
    """The pipeline of a directory, on the GPU where there is one. Raises UsageError when ``path`` is anything else."""
    index = Path(path) / "model_index.json"
    if not index.is_file():
        raise UsageError(f"{path} is not a pipeline directory (no model_index.json); ldm denoiser fit makes one")
    content, network = read_json(index), Path(path) / "transformer" / "config.json"
    kind = content.get("_class_name") if isinstance(content, dict) else None
    if kind != LatentDiffusionPipeline.__name__:
        raise UsageError(
            f"{index} is of a {kind}; give the directory of a LatentDiffusionPipeline, as ldm denoiser fit makes it"
        )
    require_version(content.get("format_version"), FORMAT_VERSION, f"{index}: the pipeline")
    config = read_json(network) if network.is_file() else {}
    for old in RENAMED.keys() & config.keys():
        raise UsageError(f"{network} calls {RENAMED[old]} by its former name {old}; rename it in that file")
    try:
        pipeline = LatentDiffusionPipeline.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be opened ({first_line(error)}); restore it or train it again") from error
    try:
        pipeline.check_parts()
    except LdmError as error:
        raise UsageError(f"{path}: {error}") from None
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
