"""Prompts -> images, in diffusers' own terms: ``DiffusionPipeline.from_pretrained`` opens what training saves."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import get_adapter_name
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from pydantic import Field, FiniteFloat
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import TypedDict

from ldm.data.decode import decode_image
from ldm.diffusion.conditioning import Condition, join_encoders, takes_sizes
from ldm.diffusion.editing import KnownPart, invert, latent_mask
from ldm.diffusion.guidance import ClassifierFree, Conversion, Guidance, GuidedDenoiser
from ldm.diffusion.sampler import MAX_STEPS, Sampler
from ldm.diffusion.scheduler import (
    Diffusion,
    Scheduler,
    check_scheduler,
    diffusion_config,
    diffusion_from,
    diffusion_of,
    make_scheduler,
    resolution_shift_from,
    scheduler_from,
)
from ldm.diffusion.timesteps import ResolutionShift
from ldm.errors import LdmError, UsageError
from ldm.files import check_type, read_bytes, read_json, require_version
from ldm.images import MAX_IMAGE_BYTES, DecodeError
from ldm.models import dit as dit  # diffusers opens a saved denoiser only where its module is imported
from ldm.models.adapter_file import AdapterFile, add_to
from ldm.models.adapters import adaptable
from ldm.models.autoencoder import (
    autoencoder_hash,
    decode_latents,
    downsampling_factor,
    enable_tiling,
    encode_latents,
    statistics_hash,
)
from ldm.models.autoencoder_kinds import Autoencoder
from ldm.models.directories import in_memory, loading, read_config
from ldm.models.fingerprint import HALF_PRECISION, is_half_precision
from ldm.models.image_processor import Images, PreparedImages, to_output
from ldm.models.learned_token import LearnedToken, read_token
from ldm.models.text_encoder import TextEncoder, listed, text_encoder_hash

FORMAT_VERSION = 1  # of model_index.json
# (pipeline, step, timestep, tensors) -> those of them that are replaced
Callback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
GIVE_AN_IMAGE = "give a JPEG, PNG or WebP image"
STEPS, GUIDANCE = 30, 3.0  # of a pipeline that recommends none
STRENGTH = 0.6  # keeps what an image shows, and leaves colours and details to the prompt
# names that the DiT's config once had; diffusers would ignore them and build a network of another size
RENAMED = {"text_width": "caption_channels", "num_heads": "num_attention_heads"}
# the text encoders, whose tokens the denoiser takes together; each has a tokenizer of the same ending
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PRECISIONS = (torch.float32, *HALF_PRECISION)
MAX_SIDE = 2**15  # pixels
MAX_ORIGINAL = 2**20  # pixels
FAR = 1.5  # ratio of a side to the nearest size trained on, above which a size is warned of
_log = logging.getLogger(__name__)
# C, h, w
LatentShape = Annotated[list[Annotated[int, Field(ge=1, le=2**16)]], Field(min_length=3, max_length=3)]


class TrainedOn(TypedDict, total=False):
    """What a denoiser's latents were made with: sha256 of networks and statistics, and C, h, w of the default size.

    ``latent_shapes``: of every size trained on, where there are several.
    """

    autoencoder: str
    text_encoder: str
    text_encoder_2: str
    text_encoder_3: str
    latent_statistics: str
    latent_shape: LatentShape
    latent_shapes: Annotated[list[LatentShape], Field(min_length=1)]


class Fingerprints(TypedDict, total=False):
    """The parts as they were saved: sha256 in float32, and rounded to float16 and to bfloat16."""

    autoencoder: list[str]
    text_encoder: list[str]
    text_encoder_2: list[str]
    text_encoder_3: list[str]
    latent_statistics: list[str]
    denoiser: dict[str, Any]  # its config


class Recommended(TypedDict):
    """The settings that were found best for a model; they are the defaults of its images.

    Attributes:
        scheduler: its name in :data:`ldm.diffusion.scheduler.SAMPLERS`; ``scheduler/`` of the pipeline holds it.
        steps: of that scheduler.
        guidance: the scale w.
        replaces: the config of the scheduler that ``scheduler/`` held before.
    """

    scheduler: str
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    guidance: FiniteFloat
    replaces: dict[str, Any]


Part = Annotated[list[str | None], Field(min_length=2, max_length=2)]  # library and class


class ModelIndex(TypedDict, total=False):
    """``model_index.json``, whatever wrote it."""

    _class_name: str
    vae: Part
    text_encoder: Part
    tokenizer: Part
    text_encoder_2: Part
    tokenizer_2: Part
    text_encoder_3: Part
    tokenizer_3: Part
    transformer: Part
    scheduler: Part
    trained_on: TrainedOn | None
    fingerprints: Fingerprints | None
    diffusion: dict[str, dict[str, Any]] | None
    recommended: Recommended | None
    format_version: Any


class LatentDiffusionPipeline(TextualInversionLoaderMixin, CogVideoXLoraLoaderMixin, DiffusionPipeline):
    """Text encoders (one, or up to three), denoiser, scheduler and autoencoder of one trained model.

    Adapters of the denoiser are used as in diffusers: :meth:`load_lora_weights`, ``set_adapters``, ``fuse_lora``,
    ``unload_lora_weights``. The mixin is the plainest of diffusers' own: one network, and no names to convert.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components = ["text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]  # noqa: RUF012 (as diffusers has it)
    _callback_tensor_inputs = ("latents", "pred_original_sample")
    _interrupt = False
    _num_timesteps = 0
    # before tokens were added: the tokenizer, the rows of the table of embeddings, and those of them that no token has
    _without_tokens: tuple[PreTrainedTokenizerBase, int, Tensor] | None = None

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        trained_on: dict[str, Any] | None = None,
        diffusion: dict[str, Any] | None = None,
        format_version: int | None = None,
        fingerprints: dict[str, Any] | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        recommended: dict[str, Any] | None = None,
    ):
        """
        Args:
            text_encoder_2, text_encoder_3: further text encoders, whose tokens follow those of the first.
            trained_on: what the denoiser's latents were made with: sha256 of ``autoencoder``, the text encoders,
                ``latent_statistics``, ``latent_shape`` of the default size, and ``latent_shapes`` where it was trained on
                several; kept in ``model_index.json``, see :meth:`check_parts`.
            diffusion: path and prediction of the denoiser and, where its times were shifted by the size of latents, that
                shift, as :func:`ldm.diffusion.scheduler.diffusion_config` gives them;
                kept in ``model_index.json``. Where it is not given, it is derived from ``scheduler``.
            format_version: of the ``model_index.json`` that it was loaded from; it is saved as the present one.
            fingerprints: of the parts, as :meth:`save_pretrained` wrote them to ``model_index.json``.
            recommended: see :class:`Recommended`; kept in ``model_index.json``.

        Raises:
            LdmError: for a newer format.
        """
        require_version(format_version, FORMAT_VERSION, "model_index.json: the pipeline")
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
        self.register_to_config(
            trained_on=trained_on, diffusion=diffusion, format_version=FORMAT_VERSION, fingerprints=fingerprints
        )
        if recommended is not None:
            checked = check_type(recommended, "model_index.json: recommended", Recommended)
            self.register_to_config(recommended=checked)
        if diffusion is None and scheduler is not None:
            self.register_to_config(diffusion=diffusion_config(*diffusion_of(cast(Scheduler, scheduler))))
        self.warned: set[str | tuple[int, int]] = set()  # words and sizes that a warning named already
        self.vae_scale_factor = downsampling_factor(vae) if vae is not None else 8

    @cached_property
    def diffusion(self) -> Diffusion:
        """What the denoiser was trained with; ``scheduler = make_scheduler(name, *pipeline.diffusion)`` is another sampler."""
        if self.config["diffusion"] is None:
            raise UsageError("the pipeline was made without a scheduler and without diffusion; give one of them")
        return diffusion_from(self.config["diffusion"])

    @cached_property
    def resolution_shift(self) -> ResolutionShift:
        """By what the samplers' noise levels are shifted at each size: as times were in training."""
        return resolution_shift_from(self.config["diffusion"] or {})

    def recommended_settings(self, scheduler: str | None = None) -> dict[str, Any]:
        """``scheduler``, ``steps`` and ``guidance``, as far as they are recommended with a scheduler (default: the pipeline's
        present one): the steps are those of the recommended scheduler, with another one only the guidance holds."""
        if not (found := self.config.get("recommended")):
            return {}
        same = self._samples_as_recommended if scheduler is None else scheduler == found["scheduler"]
        return {name: found[name] for name in (("scheduler", "steps", "guidance") if same else ("guidance",))}

    @property
    def _samples_as_recommended(self) -> bool:
        """Whether its scheduler is still the recommended one, as it was saved."""

        def settings(scheduler: Scheduler) -> dict[str, Any]:
            return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}

        wanted, found = (
            make_scheduler(self.config["recommended"]["scheduler"], *self.diffusion),
            cast(Scheduler, self.scheduler),
        )
        return type(found) is type(wanted) and settings(found) == settings(wanted)

    def with_recommended(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings by their names, with the recommended ones where they are absent or None."""
        given = {name: value for name, value in settings.items() if value is not None}
        return {**settings} | self.recommended_settings(given.get("scheduler")) | given

    def forget_recommended(self) -> None:
        """Put back the scheduler that the recommended one has replaced; nothing is recommended then."""
        if (found := self.config.get("recommended")) is not None:
            if self._samples_as_recommended:
                self.scheduler = scheduler_from(found["replaces"])
            self.register_to_config(recommended=None)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> LatentDiffusionPipeline:
        """A pipeline of another one's parts, as diffusers defines it; a denoiser of any class is taken over."""
        # diffusers would take over one of the very class that __init__ names
        return cast(Any, super()).from_pipe(pipeline, **{"transformer": pipeline.components["transformer"]} | kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As diffusers does, with the parts' fingerprints in ``model_index.json``: :func:`load_pipeline` compares them, also of
        a copy in half precision."""
        known, trained_on = dict(self.config["fingerprints"] or {}), self.config["trained_on"] or {}
        for what, (_, _, fingerprint) in self._fingerprinted().items():
            hashes = [fingerprint(dtype) for dtype in PRECISIONS]
            if self._without_tokens is not None and what in TEXT_PARTS:
                known[what] = [*dict.fromkeys([*known.get(what, ()), *hashes])]
            # a part in half precision keeps the record of the one that it is a copy of
            if not {*hashes} & {*known.get(what, ())} and trained_on.get(what) in (None, fingerprint(None), *hashes):
                known[what] = [*dict.fromkeys(hashes)]
        known["denoiser"] = self._denoiser_config()
        self.register_to_config(fingerprints=known)
        if self.config.get("recommended") and not self._samples_as_recommended:
            self.register_to_config(recommended=None)  # another scheduler is saved
        super().save_pretrained(save_directory, *args, **kwargs)

    def load_textual_inversion(
        self, pretrained_model_name_or_path: Any, token: str | list[str] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """As diffusers does: add a token that ``ldm embedding fit`` has learned to the text encoder. It is saved with it.

        Raises UsageError for a file that is none of a token, or was learned for another text encoder.
        """
        given: Any = pretrained_model_name_or_path
        before = self._without_tokens or self._tokens_now()
        if isinstance(given, os.PathLike) or (isinstance(given, str) and os.path.exists(given)):
            learned = read_token(given)
            learned = learned._replace(token=token) if isinstance(token, str) else learned
            self._require_fits(learned, given)
            # diffusers does the same, but with a warning and random numbers
            self.text_encoder.resize_token_embeddings(len(self.tokenizer) + len(learned.vectors), mean_resizing=False)
            given, token = {learned.token: learned.vectors}, None
        with loading(f"the token of {pretrained_model_name_or_path!s:.200} cannot be added", "give one of this text encoder"):
            super().load_textual_inversion(cast(Any, given), token, *args, **kwargs)
        self._without_tokens = before

    def unload_textual_inversion(self, *args: Any, **kwargs: Any) -> None:
        """Take all tokens away that :meth:`load_textual_inversion` has added to the text encoder.

        diffusers' own takes a vocabulary's special tokens for its last ones; where they are not, as in BERT's, the tokens that
        stay would get the numbers of other words. Raises UsageError where only some are to go.
        """
        if args or kwargs:
            raise UsageError("all tokens are taken away at once; call it without arguments, and load those again that stay")
        if self._without_tokens is not None:
            self.tokenizer, rows, spare = self._without_tokens
            self.text_encoder.resize_token_embeddings(rows, mean_resizing=False)
            table = self.text_encoder.get_input_embeddings().weight
            table.data[rows - len(spare) :] = spare.to(table.device, table.dtype)
            self._without_tokens = None

    def _tokens_now(self) -> tuple[PreTrainedTokenizerBase, int, Tensor]:
        table = self.text_encoder.get_input_embeddings().weight
        return copy.deepcopy(self.tokenizer), len(table), table.data[len(self.tokenizer) :].clone()

    def _require_fits(self, learned: LearnedToken, place: object) -> None:
        """Raise UsageError for a token of another text encoder, or one that is there already."""
        if self.classes is not None or self.text_encoder_2 is not None:
            kind = "has several text encoders" if self.classes is None else "is of classes"
            raise UsageError(f"{place} is a token of one text encoder, and the model {kind}; this is not supported")
        of, trained = learned.about.get("text_encoder"), (self.config["trained_on"] or {}).get("text_encoder")
        width = self.text_encoder.get_input_embeddings().weight.shape[1]
        if of and trained and of != trained:
            raise UsageError(
                f"{place} was learned for the text encoder {str(of)[:12]}, and that of the pipeline is {trained[:12]}; give "
                "one of this encoder"
            )
        if learned.vectors.shape[1] != width:
            raise UsageError(
                f"{place} has vectors of {learned.vectors.shape[1]} numbers, and the text encoder's have {width}; give one of "
                "this encoder"
            )
        if learned.token in self.tokenizer.get_vocab():
            raise UsageError(f"{place}: the text encoder knows {learned.token} already; add it once, or by another name")

    def _fingerprinted(self) -> dict[str, tuple[str, torch.nn.Module | None, Callable[[torch.dtype | None], str]]]:
        """Of each thing that has a fingerprint: its place for messages, its network, and the function of its hash."""
        found: dict[str, Any] = {}
        if self.vae is not None:
            found["autoencoder"] = ("vae/ of the pipeline is autoencoder", self.vae, partial(autoencoder_hash, self.vae))
            place = "vae/config.json of the pipeline has latent statistics"
            found["latent_statistics"] = (place, None, lambda dtype: statistics_hash(self.vae))
        for part in TEXT_PARTS:
            if (network := getattr(self, part)) is not None:
                place, tokenizer = f"{part}/ of the pipeline is text encoder", getattr(self, tokenizer_of(part))
                found[part] = (place, network, partial(text_encoder_hash, tokenizer, network))
        return found

    @property
    def text_encoders(self) -> list[TextEncoder]:
        """Its text encoders with their tokenizers, in the order of their tokens in a condition."""
        networks = {part: getattr(self, part) for part in TEXT_PARTS}
        return [
            TextEncoder(getattr(self, tokenizer_of(part)), network, part)
            for part, network in networks.items()
            if network is not None
        ]

    @property
    def classes(self) -> list[str] | None:
        """The class names that are its prompts; none of them where it is unconditional. None: it takes any prompt."""
        return next((encoder.classes for encoder in self.text_encoders if encoder.classes is not None), None)

    @property
    def is_unconditional(self) -> bool:
        """Whether it takes no prompts."""
        return self.classes == []

    def _denoiser_config(self) -> dict[str, Any]:
        config = {} if self.transformer is None else self.transformer.config
        return {name: value for name, value in json.loads(json.dumps(config, default=str)).items() if not name.startswith("_")}

    def check_parts(self) -> None:
        """Raise UsageError for parts that do not fit the denoiser's training, as they are after loading in float32; a part in
        half precision that fits is said in the log."""
        before, known = self.config["trained_on"] or {}, self.config["fingerprints"] or {}
        for what, (place, network, fingerprint) in self._fingerprinted().items():
            recorded = [value for value in (before.get(what), *known.get(what, ())) if value is not None]
            found, halves = fingerprint(None), {fingerprint(dtype) for dtype in HALF_PRECISION}
            # the first is of training, which may have been with a network in half precision
            if not recorded or found in recorded or recorded[0] in halves:
                continue
            if halves & {*recorded}:
                _log.warning("%s %s, a copy in half precision; images differ slightly", place, found[:12])
            elif network is not None and what not in known and is_half_precision(network):
                _log.warning("%s %s in half precision; of which network it is a copy was not recorded", place, found[:12])
            else:
                raise UsageError(
                    f"{place} {found[:12]}, but its denoiser was trained with {recorded[0][:12]}; put that one back"
                )
        check_scheduler(self.scheduler, *self.diffusion)
        _ = self.resolution_shift  # refused where it is none
        if (recommended := self.config.get("recommended")) is not None:
            for scheduler in (
                make_scheduler(recommended["scheduler"], *self.diffusion),
                scheduler_from(recommended["replaces"]),
            ):
                check_scheduler(scheduler, *self.diffusion)
        config = self.transformer.config
        channels, *sides = before.get("latent_shape") or (config.in_channels, config.sample_size)
        # older pipelines have no record of the config, but their sample_size is the longer side
        if config.in_channels != channels or ("denoiser" not in known and config.sample_size != max(sides)):
            raise UsageError(
                f"transformer/ of the pipeline is made for latents of {config.in_channels} channels and side "
                f"{config.sample_size}, but was trained on {channels} and {max(sides)}; put its own config.json back"
            )
        found = self._denoiser_config()
        for name, value in known.get("denoiser", {}).items():
            if found.get(name) != value:
                raise UsageError(
                    f"{name} in transformer/config.json of the pipeline is {found.get(name)!r}, but it was saved with "
                    f"{value!r}; put that back"
                )

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that it was trained on, of most of them where there are several sizes."""
        return self.trained_sizes[0]

    @property
    def trained_sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of all images that it was trained on, the default size first."""
        before, side = self.config["trained_on"] or {}, self.transformer.config.sample_size
        shapes = before.get("latent_shapes") or [before.get("latent_shape") or (0, side, side)]
        return [(height * self.vae_scale_factor, width * self.vae_scale_factor) for _, height, width in shapes]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        force: bool = False,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to the denoiser and activate it.

        Args:
            pretrained_model_name_or_path_or_dict: its file, its directory, a name on the Hugging Face hub, or its tensors as in
                diffusers.
            adapter_name: for ``set_adapters``.
            weight_name: of the file in the directory.
            force: take an adapter that was trained on another base of the same architecture.
            hotswap, kwargs: of diffusers' own method, for tensors alone.

        Raises:
            UsageError: for what is no adapter, or is one of another model.
        """
        where = pretrained_model_name_or_path_or_dict
        if isinstance(where, dict):
            adaptable(self.transformer)
            super().load_lora_weights(where, adapter_name, hotswap, **kwargs)
            return
        if kwargs or hotswap:
            raise UsageError(f"load_lora_weights takes no {next(iter(kwargs), 'hotswap')} with a file; leave it out")
        if adapter_name in getattr(self.transformer, "peft_config", {}):
            raise UsageError(f"there is an adapter called {adapter_name} already; give another name, or unload_lora_weights")
        adapter = AdapterFile.read(where, weight_name)
        adapter.require_fits(self.transformer, force)
        add_to(self.transformer, adapter, adapter_name or get_adapter_name(self.transformer), self)

    def enable_vae_tiling(self) -> None:
        """Decode and encode images larger than the autoencoder was trained on in tiles; see
        :func:`ldm.models.autoencoder.enable_tiling`."""
        enable_tiling(self.vae)

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decode and encode the images of a batch one by one, which saves memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def check_prompt(self, prompt: str) -> None:
        """Raise UsageError, naming the prompt, where it is empty or longer than the text encoders take; or not empty, where
        the model is unconditional."""
        self.require_prompt(prompt)
        self.tokenize([prompt])

    def require_prompt(self, prompt: str) -> None:
        """Raise UsageError for an empty prompt; or, where the model is unconditional, for any other."""
        require_text(prompt)
        if self.is_unconditional and prompt.strip():
            raise UsageError(f"the prompt is {prompt[:40]!r}, but the model is unconditional; leave it empty")
        if not self.is_unconditional and not prompt.strip():
            known = "say what to generate" if self.classes is None else f"give a class: {listed(self.classes)}"
            raise UsageError(f"the prompt is empty; {known}")

    def tokenize(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """Token ids of each text by each text encoder, special ones included, for :meth:`embed`.

        Raises UsageError for what is no text, or longer than every text encoder takes. One that takes fewer tokens than another
        sees a long text's beginning, as in training. This, and words that none of them knows, are said in the log.
        """
        for text in texts:
            require_text(text)
            if text.strip():
                self.require_prompt(text)
        encoders, found = self.text_encoders, []
        longest = max(encoder.max_tokens for encoder in encoders)
        for encoder in encoders:
            tokens, limit = encoder.tokenize(texts), encoder.max_tokens
            if long := [(text, ids) for text, ids in zip(texts, tokens, strict=True) if len(ids) > limit]:
                what = f"the prompt {long[0][0][:40]!r}… has {len(long[0][1])} tokens, the text encoder takes {limit}"
                if limit == longest:
                    raise UsageError(f"{what}; shorten it")
                _log.warning("%s and does not see its end", what)
                tokens = encoder.tokenize(texts, cut=True)
            found.append(tokens)
        unknown = set.intersection(*({*encoder.unknown_words(texts)} for encoder in encoders)) - self.warned
        if unknown:
            self.warned |= unknown
            _log.warning("the text encoder does not know these words: %s", ", ".join(map(repr, sorted(unknown))))
        return [[*ids] for ids in zip(*found, strict=True)]

    def embed(self, tokens: Sequence[Sequence[Sequence[int]]]) -> Condition:
        """The condition of texts by their token ids, as :meth:`tokenize` gives them."""
        by_encoder = zip(self.text_encoders, zip(*tokens, strict=True), strict=True)
        embeddings, mask, _ = join_encoders([Condition(*encoder.embed(ids)) for encoder, ids in by_encoder])
        return Condition(embeddings.to(self.transformer.dtype), mask)

    def with_sizes(
        self,
        condition: Condition,
        size: Sequence[int],
        original_size: Sequence[int] | None = None,
        crops_coords_top_left: Sequence[int] = (0, 0),
    ) -> Condition:
        """A condition that also holds :meth:`size_condition`, where the denoiser takes it."""
        numbers = self.size_condition(size, original_size, crops_coords_top_left)
        if numbers is None:
            return condition
        sizes = torch.tensor(numbers, dtype=torch.float32, device=condition.mask.device)
        return condition._replace(sizes=sizes.expand(len(condition.mask), -1))

    def size_condition(
        self,
        size: Sequence[int],
        original_size: Sequence[int] | None = None,
        crops_coords_top_left: Sequence[int] = (0, 0),
    ) -> tuple[int, ...] | None:
        """The six numbers of a denoiser with micro-conditioning; None for another denoiser. Arguments as in :meth:`__call__`,
        all (height, width). Raises UsageError for sizes that are none, or that the denoiser does not take."""
        if not takes_sizes(self.transformer):
            if original_size is not None or tuple(crops_coords_top_left) != (0, 0):
                raise UsageError("the denoiser was made without micro-conditioning; leave out the original size and the crop")
            return None
        numbers = (*(size if original_size is None else original_size), *crops_coords_top_left, *size)
        if len(numbers) != 6 or not all(type(number) is int and 0 <= number <= MAX_ORIGINAL for number in numbers):
            raise UsageError(
                f"original_size is {original_size!r} and crops_coords_top_left {crops_coords_top_left!r}; give two whole "
                "numbers, in pixels"
            )
        return numbers

    @torch.no_grad()
    def encode_images(self, image: Images, height: int | None = None, width: int | None = None) -> Tensor:
        """Normalised latents (B, C, h, w) of images, scaled and cut as :meth:`__call__` does."""
        return encode_latents(self.vae, self.prepare_images(image, None, height, width).images.to(self._execution_device))

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
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance: Guidance | None = None,
        weak_transformer: ModelMixin | None = None,
        image: Images | PreparedImages | None = None,
        strength: float | None = None,
        mask_image: Images | None = None,
        sampler: Sampler | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
    ) -> Any:  # untyped, as in diffusers: ``images`` are of the type that ``output_type`` says
        """Generate images from prompts, from images, or both.

        With ``image`` it is image-to-image; with ``mask_image``, or where ``image`` is transparent, only that part is generated
        and the rest is kept: inpainting, and outpainting of an image on a larger, transparent one.

        Args:
            prompt: one or several, B; it may be empty where there are an ``image``, for variations of it, or ``latents``.
            negative_prompt: what guidance leads away from; one for all, or one per prompt. None is the empty text.
            num_inference_steps: steps of the scheduler, each one function evaluation (``heun``: two). Those of ``recommended``
                in the pipeline's config unless given, where its scheduler is the recommended one; else 30.
            guidance_scale: w of ``null + w·(cond − null)``; 1 is no guidance. That of ``recommended`` unless given; else 3.
            num_images_per_prompt: N, images per prompt.
            height, width: in pixels; those of ``image``, or the size trained on, unless given.
            generator: one, or one per image (then an image does not depend on the batch it is generated in).
            latents: noise (B·N, C, h, w) of unit variance, instead of random noise; its size is the image's.
            prompt_embeds, prompt_attention_mask: (B, L, D) and (B, L) in the place of ``prompt``, and those of the negative
                prompts in the place of theirs; :meth:`encode_prompt` gives all four.
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
            sampler: as :meth:`make_sampler` gives it, in the place of ``num_inference_steps`` and ``strength``: it serves many
                calls.
            original_size, crops_coords_top_left: of a denoiser with micro-conditioning, as diffusers' SDXL pipelines take them:
                height and width of the image that this would have been made from, and where it would have been cropped. The
                size itself and no crop unless given.

        Raises:
            UsageError: for a prompt, an image or a size that the model cannot take, or a scheduler that does not fit the
                denoiser.
            LdmError: when the denoiser's prediction is not finite; names the step.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        for name in callback_on_step_end_tensor_inputs or ():
            if name not in self._callback_tensor_inputs:
                raise UsageError(f"no tensor {name!r} for a callback; choose from: {', '.join(self._callback_tensor_inputs)}")
        if output_type not in OUTPUT_TYPES:
            raise UsageError(f"output_type is {output_type!r}; choose from: {', '.join(OUTPUT_TYPES)}")
        if type(num_images_per_prompt) is not int or num_images_per_prompt < 1:
            raise UsageError(f"num_images_per_prompt is {num_images_per_prompt!r}; give 1 or more")
        if image is None and not (strength is None and mask_image is None):
            raise UsageError("strength and mask_image are of an image; give image, too")
        default = {"steps": STEPS, "guidance": GUIDANCE} | self.recommended_settings()
        steps: int = default["steps"] if num_inference_steps is None else num_inference_steps
        guidance = guidance or ClassifierFree(default["guidance"] if guidance_scale is None else guidance_scale)
        prepared = None if image is None else self.prepare_images(image, mask_image, height, width)
        if prepared is not None:
            height, width = self._generated_size(prepared)
        embeds = (prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask)
        condition, null = self._conditions(prompt, negative_prompt, embeds, prepared, latents)
        condition, null = condition.repeat(num_images_per_prompt), null.repeat(num_images_per_prompt)
        device, count = self._execution_device, len(condition.mask)
        generators = _generators(generator, count, device)
        if latents is not None:
            self._check_latents(latents, count, height, width)
            height, width = (side * self.vae_scale_factor for side in latents.shape[2:])
        shape = self.latent_shape(count, height, width)
        if sampler is None:
            sampler = self.make_sampler(steps, strength, prepared, height=height, width=width)
        elif sampler.shift != (shift := self.resolution_shift.at(*shape[2:])):
            raise UsageError(
                f"the sampler shifts noise levels by {sampler.shift:.4g}, but this size needs {shift:.4g}; make it by "
                "make_sampler with this height and width"
            )
        if prepared is not None:
            prepared = prepared.to(device, count)
        if latents is None:
            latents = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
        latents, x0, known = latents.to(device, torch.float32), None, None
        if prepared is not None:
            x0 = encode_latents(self.vae, prepared.images)
            if prepared.mask is not None:
                known = KnownPart(x0, latents, latent_mask(prepared.mask, self.vae_scale_factor))
        size = tuple(side * self.vae_scale_factor for side in latents.shape[2:])
        condition, null = (self.with_sizes(each, size, original_size, crops_coords_top_left) for each in (condition, null))
        guided = self._guided(condition, null, guidance, weak_transformer)
        self._interrupt, self._num_timesteps = False, len(sampler)
        with self._progress(len(sampler)) as progress:
            for step in sampler.steps(guided, latents, generators, x0):
                if known is not None:
                    known.put_back(sampler, step)
                progress.update()
                if callback_on_step_end is not None:
                    tensors = {"latents": step.latents, "pred_original_sample": step.x0}
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs or ()}
                    changed = callback_on_step_end(self, step.number, step.timestep, given) or {}
                    replaced = changed.get("latents", step.latents)
                    if replaced.shape != step.latents.shape:
                        raise UsageError(
                            f"the callback returned latents {tuple(replaced.shape)}; give {tuple(step.latents.shape)}"
                        )
                    step.latents = replaced
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
        prompt: str | Sequence[str] | None = None,
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
        condition, null = self._conditions(prompt, None, (None, None, None, None), prepared, None)
        prepared = prepared.to(self._execution_device, len(condition.mask))
        size = prepared.images.shape[2:]
        sampler = self.make_sampler(num_inference_steps, height=size[0], width=size[1])
        x0 = encode_latents(self.vae, prepared.images)
        condition, null = (self.with_sizes(each, size) for each in (condition, null))
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
        height: int | None = None,
        width: int | None = None,
    ) -> Sampler:
        """The sampler of a number of steps from noise, or from ``image``; of the pipeline's scheduler unless given. For images
        of ``height`` and ``width`` pixels, as :meth:`__call__` takes them. Raises UsageError for a scheduler that does not fit
        the denoiser, steps that it cannot take, or a size that cannot be generated."""
        if image is not None:
            height, width = self._generated_size(image)
        shift = self.resolution_shift.at(*self.latent_shape(1, height, width)[2:])
        if strength is None:
            strength = 1.0 if image is None or image.mask is not None else STRENGTH
        return Sampler(
            scheduler or self.scheduler, *self.diffusion, num_inference_steps, self._execution_device, strength, shift
        )

    def prepare_images(
        self, image: Images | PreparedImages, mask: Images | None, height: int | None, width: int | None
    ) -> PreparedImages:
        """Images to start from, as :meth:`__call__` takes them, ready for the autoencoder; once is enough for many calls.
        Raises UsageError for what is no image, a mask that does not fit, or a size that the model cannot take."""
        if isinstance(image, PreparedImages):
            return image
        self.latent_shape(1, height, width)
        prepared = PreparedImages.of(image, mask, height, width, self.size_unit)
        trained = self.default_size
        if not (height and width) and max(prepared.height, prepared.width) > 4 * max(trained):
            raise UsageError(
                f"image is {prepared.width}x{prepared.height}, but the model was trained on {trained[1]}x{trained[0]}; give "
                "height and width to generate it at"
            )
        return prepared

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``prompt_embeds`` (B, L, D), ``prompt_attention_mask`` (B, L), ``negative_prompt_embeds`` and
        ``negative_prompt_attention_mask``, as :meth:`__call__` takes them."""
        prompts = _texts(prompt, "prompt")
        condition, null = self._embed_all(prompts), self._embed_all(_per_prompt(negative_prompt, len(prompts)))
        return condition.embeddings, condition.mask, null.embeddings, null.mask

    def _embed_all(self, texts: Sequence[str]) -> Condition:
        return self.embed(self.tokenize(texts))

    def _conditions(
        self,
        prompt: str | Sequence[str] | None,
        negative: str | Sequence[str] | None,
        embeds: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
        image: PreparedImages | None,
        latents: Tensor | None,
    ) -> tuple[Condition, Condition]:
        """Conditions of prompts and negative prompts, a row per image but for repeats."""
        images = 1 if image is None else len(image.images)
        condition = self._given("prompt", prompt, *embeds[:2])
        null = self._given("negative_prompt", negative, *embeds[2:])
        prompts = _texts(prompt, "prompt") if condition is None else [""] * len(condition.mask)
        if condition is None and image is None and latents is None:
            for text in prompts:
                self.require_prompt(text)
        count = max(images, len(prompts)) if len(prompts) == 1 else len(prompts)
        if images not in (1, count):
            raise UsageError(f"{images} images for {len(prompts)} prompts; give one, or one per prompt")
        if condition is None:
            condition = self._embed_all(prompts)
        if len(prompts) < count:
            condition = condition.repeat(count)
        if null is None:
            null = self._embed_all(_per_prompt(negative, count))
        if len(null.mask) not in (1, count):
            raise UsageError(f"{len(null.mask)} negative_prompt_embeds for {count} prompts; give one, or one per prompt")
        return condition, null if len(null.mask) == count else null.repeat(count)

    def _given(self, name: str, text: object, embeds: Tensor | None, mask: Tensor | None) -> Condition | None:
        """The condition of embeddings that are given in the place of texts; None where they are not."""
        if embeds is None and mask is None:
            return None
        if text is not None:
            raise UsageError(f"{name} and {name}_embeds are both given; give one of them")
        if not (isinstance(embeds, Tensor) and isinstance(mask, Tensor)):
            raise UsageError(f"{name}_embeds need their attention mask; give both, as encode_prompt does")
        if embeds.ndim != 3 or not embeds.is_floating_point() or mask.shape != embeds.shape[:2] or not len(mask):
            raise UsageError(
                f"{name}_embeds are {tuple(embeds.shape)} and their attention mask {tuple(mask.shape)}; give floats (B, L, D) "
                "and (B, L)"
            )
        device = self._execution_device
        return Condition(embeds.to(device, self.transformer.dtype), mask.to(device))

    def _progress(self, total: int) -> Any:
        return cast(Any, self.progress_bar)(total=total)  # torch's decorator hides the signature

    def _guided(
        self, condition: Condition, null: Condition, guidance: Guidance, weak: ModelMixin | None = None
    ) -> GuidedDenoiser:
        null = condition if weak is not None or self.is_unconditional else null
        return GuidedDenoiser(self.transformer, condition, null, guidance, Conversion(*self.diffusion), weak)

    @property
    def size_unit(self) -> int:
        """Pixels that heights and widths are multiples of."""
        return self.vae_scale_factor * self.transformer.config.patch_size

    def _generated_size(self, image: PreparedImages) -> tuple[int, int]:
        """Height and width in pixels at which an image is generated: its own, up to the next multiples of the unit."""
        height, width = (side + -side % self.size_unit for side in (image.height, image.width))
        return height, width

    def latent_shape(self, batch: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """(B, C, h, w) of images of ``height`` and ``width`` pixels, the size trained on unless given. Raises UsageError for a
        size that the patches do not divide; one far from all sizes trained on is named in the log, once."""
        height, width = (self.default_size[0] if height is None else height), (self.default_size[1] if width is None else width)
        shown, unit = f"{width}x{height}", self.size_unit
        if not all(type(side) is int and side > 0 and side % unit == 0 for side in (height, width)):
            raise UsageError(f"an image of {shown} cannot be generated: give multiples of {unit} pixels")
        if max(height, width) > MAX_SIDE:
            raise UsageError(f"an image of {shown} cannot be generated: no side may be above {MAX_SIDE} pixels")
        self._warn_of_size(height, width)
        factor: int = self.vae_scale_factor
        return batch, self.transformer.config.in_channels, height // factor, width // factor

    def _warn_of_size(self, height: int, width: int) -> None:
        def distance(size: tuple[int, int]) -> float:
            """The larger ratio of the sides."""
            return max(height / size[0], size[0] / height, width / size[1], size[1] / width)

        nearest = min(self.trained_sizes, key=distance)
        if distance(nearest) > FAR and (height, width) not in self.warned:
            self.warned.add((height, width))
            _log.warning(
                "%dx%d is far from the sizes that the model was trained on, the nearest is %dx%d; objects may repeat or be cut",
                *(width, height, *reversed(nearest)),
            )

    def _check_latents(self, latents: Tensor, count: int, height: int | None, width: int | None) -> None:
        """Raise UsageError for latents that do not fit the denoiser, the prompts, or the size asked for."""
        if not isinstance(latents, Tensor) or latents.ndim != 4 or not latents.is_floating_point():
            found = f"a tensor {tuple(latents.shape)}" if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
            raise UsageError(f"latents is {found}; give a float tensor (B, C, h, w)")
        factor = self.vae_scale_factor
        height = latents.shape[2] * factor if height is None else height
        wanted = self.latent_shape(count, height, latents.shape[3] * factor if width is None else width)
        if tuple(latents.shape) != wanted:
            raise UsageError(f"latents are {tuple(latents.shape)}, but {wanted} are needed for these prompts and this size")
        if not latents.isfinite().all():
            raise UsageError("latents hold values that are not finite; give noise of unit variance")


def _texts(prompt: str | Sequence[str] | None, name: str) -> list[str]:
    """One text or several as a list. Raises UsageError for none."""
    texts = [prompt or ""] if prompt is None or isinstance(prompt, str) else prompt
    if not isinstance(texts, (list, tuple)) or not texts:
        raise UsageError(f"{name} is {prompt!r}; give a text, or a list of one or more")
    return [*texts]


def _per_prompt(negative: str | Sequence[str] | None, count: int) -> list[str]:
    """A negative prompt for each of ``count`` prompts."""
    negatives = _texts(negative, "negative_prompt")
    if negative is None or isinstance(negative, str):
        return negatives * count
    if len(negatives) != count:
        raise UsageError(f"{len(negatives)} negative prompts for {count} prompts; give one, or one per prompt")
    return negatives


def _generators(generator: object, count: int, device: torch.device) -> Any:
    """A generator, or a list of one per image, as diffusers takes them. Raises UsageError for any others."""
    several = [*generator] if isinstance(generator, (list, tuple)) else [] if generator is None else [generator]
    for each in several:
        if not isinstance(each, torch.Generator):
            raise UsageError(f"generator is a {type(each).__name__}; give a torch.Generator, or a list of one per image")
        if each.device.type not in ("cpu", device.type):
            raise UsageError(f"generator is of {each.device.type}, the pipeline of {device.type}; give one of the cpu")
    if not isinstance(generator, (list, tuple)):
        return generator
    if len(several) != count:
        raise UsageError(f"{len(several)} generators for {count} images; give one, or one per image")
    return several


def require_text(text: object) -> None:
    """Raise UsageError for a prompt that is no text, or one that holds half a surrogate pair."""
    if not isinstance(text, str):
        raise UsageError(f"a prompt is {text!r}; give a text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the prompt {text[:40]!a} holds half a surrogate pair, which is no character; fix it") from None


def tokenizer_of(part: str) -> str:
    """The part with the tokenizer of a text encoder."""
    return part.replace("text_encoder", "tokenizer")


def text_parts(encoders: Sequence[TextEncoder]) -> dict[str, Any]:
    """The parts of a pipeline with these text encoders."""
    parts = dict(zip(TEXT_PARTS, encoders, strict=False))
    networks = {part: encoder.model for part, encoder in parts.items()}
    return networks | {tokenizer_of(part): encoder.tokenizer for part, encoder in parts.items()}


def read_image(path: str | os.PathLike) -> Image.Image:
    """An image file to start from: RGB, or RGBA where it has transparency; upright, in sRGB. Raises UsageError, naming the
    file, for any other."""
    return image_of(read_input(path), path)


def read_input(path: str | os.PathLike, fix: str = GIVE_AN_IMAGE, limit: int = MAX_IMAGE_BYTES) -> bytes:
    """The bytes of a file that a user gives, an image unless ``fix`` says otherwise. Raises UsageError, naming it, where it
    cannot be read or is too large."""
    try:
        return read_bytes(path, limit, fix)
    except LdmError as error:
        raise UsageError(str(error)) from None


def image_of(data: bytes, name: str | os.PathLike, background: tuple[int, int, int] | None = None) -> Image.Image:
    """The image of a file called ``name``, as :func:`read_image` gives it; RGB over ``background`` where that is given."""
    try:
        return decode_image(data, background)
    except DecodeError as error:
        raise UsageError(f"{name}: {error}; {GIVE_AN_IMAGE}") from None


def load_pipeline(path: str | os.PathLike, device: torch.device | str | None = None) -> LatentDiffusionPipeline:
    """The pipeline of a directory, in float32, on ``device`` (default: the GPU where there is one). Raises LdmError, naming the
    file, when ``path`` is anything else or broken."""
    index = Path(path) / "model_index.json"
    if not index.is_file():
        raise UsageError(f"{path} is not a pipeline directory (no model_index.json); ldm denoiser fit makes one")
    content = read_json(index, ModelIndex)
    kind = content.get("_class_name")
    if kind != LatentDiffusionPipeline.__name__:
        raise UsageError(
            f"{index} is of a {kind}; give the directory of a LatentDiffusionPipeline, as ldm denoiser fit makes it"
        )
    require_version(content.get("format_version"), FORMAT_VERSION, f"{index}: the pipeline")
    special = next((file for file in Path(path).rglob("*") if not (file.is_file() or file.is_dir())), None)
    if special is not None:
        raise UsageError(f"{special} is no regular file, or a broken link; restore it or train the model again")
    configs = {file: read_config(file) for file in sorted(Path(path).glob("*/*config.json"))}
    denoiser = Path(path) / "transformer" / "config.json"
    for old in RENAMED.keys() & configs.get(denoiser, {}).keys():
        raise UsageError(f"{denoiser} calls {RENAMED[old]} by its former name {old}; rename it in that file")
    fix, variant = "restore it or train it again", _variant(Path(path))
    with loading(f"{path} cannot be opened", fix):
        try:
            pipeline = LatentDiffusionPipeline.from_pretrained(
                path, local_files_only=True, dtype=torch.float32, variant=variant, disable_mmap=True
            )
            for encoder in pipeline.text_encoders:
                in_memory(encoder.model)
        except LdmError as error:  # of the denoiser's own checks
            raise UsageError(f"{path} cannot be opened ({error})") from None
    with loading(f"{path}: its parts do not fit", fix):
        try:
            pipeline.check_parts()
        except LdmError as error:
            raise UsageError(f"{path}: {error}") from None
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _variant(path: Path) -> str | None:
    """The variant, such as ``fp16``, whose weights are the only ones of a part."""
    for part in ("transformer", "vae", *TEXT_PARTS):
        names = [file.name for file in (path / part).glob("*.safetensors")]
        variants = [found[1] for name in names if (found := re.fullmatch(r"\w+\.(\w+)(?:-\d+-of-\d+)?\.safetensors", name))]
        if variants and len(variants) == len(names):
            return variants[0]
    return None
