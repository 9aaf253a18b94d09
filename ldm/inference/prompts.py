"""Prompts from the command line or a file, as settings of images; and prompts that are longer than a text encoder takes."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ldm.errors import LdmError, UsageError
from ldm.files import parse_json
from ldm.inference.settings import GenerationSettings
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import read_input, require_text

Check = Callable[[GenerationSettings], None]
Complete = Callable[[dict[str, Any]], dict[str, Any]]  # settings as JSON, with defaults for those that are not given
MAX_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Limits:
    """What the prompts of one run may ask for, so that a file from elsewhere cannot take hours or all memory.

    Attributes:
        images: of all prompts together.
        steps: of one image.
    """

    images: int = 100_000
    steps: int = 1_000

    def require(self, images: int, steps: int) -> None:
        """Raise UsageError for more than that; it names the limit."""
        for name, asked in (("images", images), ("steps", steps)):
            if asked > (limit := getattr(self, name)):
                raise UsageError(f"{asked:,} {name} are more than the limit of {limit:,}; raise it by --max-{name}, if meant")


class Fit(NamedTuple):
    """A prompt as the text encoder takes it: that part, its token ids, and the words at its end that are cut off."""

    kept: str
    tokens: list[int]
    cut: str


def fit_prompts(encoder: TextEncoder, prompts: Sequence[str]) -> dict[str, Fit]:
    """Prompts, each cut behind the last whole word that fits the encoder's ``max_tokens``. Raises UsageError where not even one
    word fits, the tokenizer cannot say which tokens are which words, or a prompt is no text."""
    for prompt in prompts:
        require_text(prompt)
    fits = {}
    for prompt, ids in zip(prompts, encoder.tokenize(prompts), strict=True):
        if len(ids) <= encoder.max_tokens:
            fits[prompt] = Fit(prompt, ids, "")
        else:
            kept = _last_whole_word(encoder, prompt, len(ids))
            fits[prompt] = Fit(prompt[:kept], encoder.tokenize([prompt[:kept]])[0], prompt[kept:].strip())
    return fits


def _last_whole_word(encoder: TextEncoder, prompt: str, length: int) -> int:
    """The number of characters of a prompt of ``length`` tokens up to the last whole word within the limit."""
    tokenizer, limit = encoder.tokenizer, encoder.max_tokens
    too_long = UsageError(f"the prompt {prompt[:40]!r}… has {length} tokens, the text encoder takes {limit}; shorten it")
    if not tokenizer.is_fast:
        raise too_long
    encoding = tokenizer(prompt, return_offsets_mapping=True)
    numbered = zip(encoding.word_ids(), encoding["offset_mapping"], strict=True)
    tokens = [(word, start, end) for word, (start, end) in numbered if word is not None]
    room = limit - (length - len(tokens))  # the others are special ones

    def ends_a_word(count: int) -> bool:
        (before, _, end), (after, start, _) = tokens[count - 1 : count + 1]
        # some tokenizers take a whole text for one word
        return before != after or end < start or prompt[start].isspace()

    whole = next((count for count in range(room, 0, -1) if ends_a_word(count)), None)
    if whole is None:
        raise too_long
    return tokens[whole - 1][2]


def repeated(
    content: Mapping[str, Any],
    count: Any,
    where: str,
    check: Check = lambda settings: None,
    limits: Limits = Limits(),
    before: int = 0,
    complete: Complete = dict,
) -> list[GenerationSettings]:
    """``count`` images of one prompt, each with the seed after the one before.

    Args:
        content: settings as JSON, and ``size`` (``512x768``, or one number) in the place of width and height, and
            ``original_size`` in that of the original ones.
        where: whose content it is, for errors.
        check: called with the first image, for example :meth:`ldm.inference.generate.ImageGenerator.check`.
        before: number of images before these in the run, which count to the limit, too.
        complete: such as :meth:`ldm.pipeline.LatentDiffusionPipeline.with_recommended`.

    Raises:
        UsageError: naming ``where`` and the setting.
    """
    content = dict(content)
    if type(count) is not int or count < 1:
        raise UsageError(f"{where}: count is {reprlib.repr(count)}; give a whole number, 1 or more")
    first = None
    try:
        for which in ("", "original_"):
            if (size := f"{which}size") in content:
                content[f"{which}width"], content[f"{which}height"] = parse_size(content.pop(size), size)
        first = GenerationSettings.from_json(complete(content), where)
        limits.require(before + count, first.steps)
        images = [dataclasses.replace(first, seed=first.seed + copy) for copy in range(count)]
    except UsageError as error:
        raise UsageError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
    check(first)
    return images


def parse_size(size: str | int, name: str = "size") -> tuple[int, int]:
    """Width and height of ``512x768`` or of one number, in pixels. Raises UsageError for anything else."""
    found = re.fullmatch(r"(\d{1,6})(?:[xX×](\d{1,6}))?", str(size))
    if found is None:
        raise UsageError(f"{name} is {reprlib.repr(size)}; give WIDTHxHEIGHT or one number, in pixels: 512x768")
    return int(found[1]), int(found[2] or found[1])


def plan_prompts(
    prompts: Sequence[str],
    defaults: Mapping[str, Any],
    count: int,
    check: Check,
    limits: Limits = Limits(),
    complete: Complete = dict,
) -> list[GenerationSettings]:
    """``count`` images of each prompt; the seed counts on from image to image. For a file see :func:`read_prompts`.

    Args:
        defaults: the other settings, as JSON.
        check: called with the first image of each prompt.
        complete: as in :func:`repeated`.

    Raises:
        UsageError: naming the setting.
    """
    planned: list[GenerationSettings] = []
    for prompt in prompts:
        seed = defaults.get("seed", 0) + len(planned)
        content = dict(defaults) | {"prompt": prompt, "seed": seed}
        planned += repeated(content, count, "the command line", check, limits, len(planned), complete)
    return planned


def read_prompts(
    path: str | Path,
    defaults: Mapping[str, Any],
    count: int = 1,
    check: Check = lambda settings: None,
    limits: Limits = Limits(),
    complete: Complete = dict,
) -> list[GenerationSettings | UsageError]:
    """The images that a prompt file asks for; a broken line is returned as its error, in the place of one image.

    Blank lines are passed over. A line of ``.txt`` is a prompt, and a comment where it begins with ``#``; a line of ``.jsonl``
    is an object with the fields of :class:`GenerationSettings`, ``size``, and ``count``, the
    images of this line. Where a line says nothing of the seed, that of ``defaults`` counts on from image to image.

    Args:
        defaults: settings as JSON for what a line leaves out.
        count: images of each line that does not say.
        check: called with each line's first image; its UsageError makes the line a broken one.
        complete: as in :func:`repeated`.

    Raises:
        UsageError: for a file that cannot be read, is of another kind, or holds no prompt.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"{path} is no prompt file by its name; give a .txt with a prompt a line, or a .jsonl")
    lines = read_input(path, "give a .txt or .jsonl of prompts", MAX_FILE_BYTES).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    found: list[GenerationSettings | UsageError] = []
    for number, raw in enumerate(lines, 1):
        comment = path.suffix == ".txt" and raw.lstrip().startswith(b"#")
        if not raw.strip() or comment:
            continue
        where = f"{path}, line {number}"
        try:
            content = _line(raw, path.suffix, where)
            copies = content.pop("count", count)
            counted_on = {"seed": defaults.get("seed", 0) + len(found)}
            content = dict(defaults) | counted_on | content
            images = repeated(content, copies, where, limits=limits, before=len(found), complete=complete)
            try:
                check(images[0])
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from None
            found += images
        except UsageError as error:
            found.append(error)
    if not found:
        raise UsageError(f"{path} holds no prompt; write one a line")
    return found


def _line(raw: bytes, kind: str, where: str) -> dict[str, Any]:
    skip = "fix it, or skip broken lines with --keep-going"
    try:
        content = {"prompt": raw.decode().strip()} if kind == ".txt" else parse_json(raw, f"{where}: the line")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: cannot be read ({error}); {skip}") from None
    except LdmError as error:
        raise UsageError(f"{error}, or skip broken lines with --keep-going") from None
    if not isinstance(content, dict):
        raise UsageError(f'{where}: no JSON object, such as {{"prompt": "a red ring"}}; {skip}')
    return content
