"""All settings that determine one image: validated on construction, read from and written to JSON."""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldm.diffusion.guidance import AdaptiveProjected, ClassifierFree, Guidance, Interval, Rescale, ZeroStar
from ldm.diffusion.scheduler import SAMPLERS
from ldm.errors import UsageError
from ldm.images import MAX_PIXELS
from ldm.pipeline import GUIDANCE, STEPS

RULES: dict[str, Callable[[float], Guidance]] = {
    "classifier-free": ClassifierFree,
    "zero-star": ZeroStar,
    "apg": AdaptiveProjected,
}
INPUTS = ("image", "mask", "weak")  # fields that name a file
LISTS = ("lora", "embedding")  # fields that name several files
NAMES_FILES = (*INPUTS, *LISTS)
MAX_PROMPT = 20_000  # characters, so that settings fit into an image's metadata
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", type(None): "null"}


@dataclass(frozen=True)
class GenerationSettings:
    """All that determines one image of a model.

    Attributes:
        prompt: what to generate; it may be empty where there is an image, for variations of it, and is where the model is
            unconditional.
        negative: negative prompt; the empty text is the null condition.
        seed: of the initial noise, and of the noise that a sampler adds; 0 to 2^63 − 1.
        steps: of the scheduler.
        guidance: the scale w, neutral at 1.
        guidance_rule: classifier-free (Ho & Salimans 2022, arXiv 2207.12598), zero-star (CFG-Zero*, Fan et al. 2025, arXiv
            2503.18886) or apg (Sadat et al. 2024, arXiv 2410.02416).
        guidance_rescale: from 0 to 1, how far the guided prediction is rescaled to the standard deviation of the conditional
            one (Lin et al. 2023, arXiv 2305.08891).
        guidance_interval: guide while low < t ≤ high, t from 0 (data) to 1 (noise) (Kynkäänniemi et al. 2024, arXiv
            2404.07724).
        scheduler: a name of :data:`ldm.diffusion.scheduler.SAMPLERS`; the pipeline's own unless given.
        eta: of the scheduler ddim, from 0 (deterministic) to 1.
        width, height: in pixels; the size that the model was trained on unless given.
        image: path of an image to start from, or the hash of its file, ``sha256:…``, as :mod:`ldm.inference.inputs` gives it.
        strength: above 0 and up to 1, how far to leave that image.
        mask: path or hash of an image that is white where ``image`` is to be regenerated.
        weak: directory of a weaker checkpoint's pipeline, or its hash, for autoguidance (Karras et al. 2024, arXiv 2406.02507).
        lora: low-rank adapters of the model, each the path or the hash of its file, and its weight after ``=``, which is 1
            unless given: ``("style.safetensors=0.8",)``.
        embedding: learned tokens (textual inversion), each the path or the hash of its file. Prompts hold the token.
        original_width, original_height, crop_left, crop_top: in pixels, of a model with micro-conditioning: the size of the
            image that this one would have been made from, and where it would have been cropped. The size itself, and no crop,
            unless given.

    Raises:
        UsageError: for a value out of range; names the field.
    """

    prompt: str = ""
    negative: str = ""
    seed: int = 0
    steps: int = STEPS
    guidance: float = GUIDANCE
    guidance_rule: Literal["classifier-free", "zero-star", "apg"] = "classifier-free"
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    scheduler: str | None = None
    eta: float | None = None
    width: int | None = None
    height: int | None = None
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    weak: str | None = None
    original_width: int | None = None
    original_height: int | None = None
    crop_left: int | None = None
    crop_top: int | None = None
    lora: tuple[str, ...] | None = None
    embedding: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        shares = {"guidance_rescale": self.guidance_rescale, "eta": self.eta, "strength": self.strength}
        for name, share in shares.items():
            if share is not None and not 0 <= share <= 1:
                raise UsageError(f"{name} is {share:g}; give a number from 0 to 1")
        least = dict.fromkeys(("steps", "width", "height", "original_width", "original_height"), 1)
        for name, smallest in (least | {"crop_left": 0, "crop_top": 0}).items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise UsageError(f"{name} is {value}; give {smallest} or more")
        pixels, longest = (self.width or 1) * (self.height or 1), max(len(self.prompt), len(self.negative))
        with_eta = [name for name, spec in SAMPLERS.items() if spec.takes_eta]
        named = " or ".join(with_eta)
        wrong = {
            f"the prompt or negative prompt has more than {MAX_PROMPT} characters; shorten it": longest > MAX_PROMPT,
            f"the size {self.width}x{self.height} has more than {MAX_PIXELS} pixels; give a smaller one": pixels > MAX_PIXELS,
            f"seed is {self.seed}; give a number from 0 to {2**63 - 1}": not 0 <= self.seed < 2**63,
            f"guidance is {self.guidance}; give a finite number": not math.isfinite(self.guidance),
            f"guidance_rule is {reprlib.repr(self.guidance_rule)}; choose one of: {', '.join(RULES)}": self.guidance_rule
            not in RULES,
            f"guidance_interval is {low:g} to {high:g}; give 0 <= low < high <= 1": not 0 <= low < high <= 1,
            f"eta is of the scheduler {named}; give scheduler {named}, too": self.eta is not None
            and self.scheduler not in with_eta,
            "original_width and original_height belong together; give both": (self.original_width is None)
            != (self.original_height is None),
            "strength is of a given image; give image, too": self.strength is not None and self.image is None,
            "mask is of a given image; give image, too": self.mask is not None and self.image is None,
            "weak and negative are both what guidance leads away from; give one of them": bool(self.weak and self.negative),
        }
        for complaint, holds in wrong.items():
            if holds:
                raise UsageError(complaint)
        for adapter, weight in self.adapters():
            if not math.isfinite(weight):
                raise UsageError(f"the weight of lora {adapter} is {weight}; give a finite number")

    def adapters(self) -> list[tuple[str, float]]:
        """The files of ``lora`` with their weights."""
        return [(file, 1.0 if weight is None else weight) for file, weight in map(split_lora, self.lora or ())]

    def rule(self) -> Guidance:
        """The guidance of these settings."""
        rule: Guidance = RULES[self.guidance_rule](self.guidance)
        if self.guidance_rescale:
            rule = Rescale(rule, self.guidance_rescale)
        return rule if self.guidance_interval == (0.0, 1.0) else Interval(rule, *self.guidance_interval)

    def size_condition(self) -> dict[str, Any]:
        """What is given of the sizes that micro-conditioning takes, as arguments of the pipeline: (height, width)."""
        given = {}
        if self.original_width is not None and self.original_height is not None:
            given["original_size"] = self.original_height, self.original_width
        if (self.crop_left, self.crop_top) != (None, None):
            given["crops_coords_top_left"] = self.crop_top or 0, self.crop_left or 0
        return given

    def to_json(self) -> dict[str, Any]:
        """Every field, as JSON keeps it; :meth:`from_json` gives the same settings back.

        Of an absolute path only the last name is kept: the settings leave this machine inside images.
        """
        paths = {name: Path(value) for name in INPUTS if (value := getattr(self, name)) is not None}
        names: dict[str, Any] = {name: path.name for name, path in paths.items() if path.is_absolute()}
        content = dataclasses.asdict(self) | {"guidance_interval": list(self.guidance_interval)} | names
        for name in LISTS:  # of images without one
            del content[name]
        if self.lora:
            content["lora"] = [f"{_shown(file)}={weight!r}" for file, weight in self.adapters()]
        if self.embedding:
            content["embedding"] = [*map(_shown, self.embedding)]
        return content

    @classmethod
    def from_json(cls, content: Any, where: str) -> GenerationSettings:
        """The settings of a JSON object; missing ones have their default.

        Args:
            where: whose content it is, for errors: ``prompts.jsonl, line 3``.

        Raises:
            UsageError: for a field that is not known, missing, of another type or out of range; names it and ``where``.
        """
        if not isinstance(content, dict):
            raise UsageError(f'{where}: settings are a JSON object, such as {{"prompt": "a red ring"}}; fix it')
        hints = typing.get_type_hints(cls)
        unknown = [key for key in content if key not in hints]
        if unknown:
            raise UsageError(f"{where}: there is no setting {reprlib.repr(unknown[0])}; choose from: {', '.join(hints)}")
        try:
            return cls(**{key: _checked(key, value, hints[key]) for key, value in content.items()})
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None


def _shown(path: str) -> str:
    """A path without the folders of this machine."""
    return Path(path).name if Path(path).is_absolute() else path


def split_lora(value: str) -> tuple[str, float | None]:
    """The file and the weight of ``FILE=WEIGHT``; None where no weight is given."""
    file, equals, weight = value.rpartition("=")
    try:
        return (file, float(weight)) if equals else (value, None)
    except ValueError:  # of a name with an equals sign
        return value, None


def is_reference(value: str) -> bool:
    """Whether a field of :data:`INPUTS` is a hash, not a path."""
    return re.fullmatch("sha256:[0-9a-f]{64}", value) is not None


def _checked(key: str, value: Any, hint: Any) -> Any:
    """A JSON value as the field's type."""
    if key in LISTS and value is not None:
        if not (isinstance(value, list | tuple) and all(isinstance(one, str) and one for one in value)):
            example = 'with their weights: ["style.safetensors=0.8"]' if key == "lora" else '["learned_embeds.safetensors"]'
            raise UsageError(f"{key} is {reprlib.repr(value)}; give a list of files {example}")
        return tuple(value) or None
    if typing.get_origin(hint) is tuple:
        if not (isinstance(value, list | tuple) and len(value) == 2):
            raise UsageError(f"{key} is {reprlib.repr(value)}; give two numbers, [low, high]")
        return tuple(_checked(key, part, float) for part in value)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if typing.get_origin(hint) is Literal:
        kinds = (str,)
    if type(value) is int and abs(value) >= 2**64:
        raise UsageError(f"{key} is a number of {value.bit_length()} bits; give a smaller one")
    if type(value) is int and float in kinds:
        return float(value)
    if type(value) not in kinds:
        raise UsageError(f"{key} is {reprlib.repr(value)}; give {' or '.join(TYPE_NAMES[kind] for kind in kinds)}")
    return value
