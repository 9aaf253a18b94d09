"""The variants of an ablation: each is a config of ``ldm denoiser fit``, and what differs between them is named."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from ldm.ablation.comparison import require_enough
from ldm.data.sources import open_source
from ldm.errors import UsageError
from ldm.runs.fit import FitCLI
from ldm.runs.torchrun import processes_asked
from ldm.training.denoiser import DenoiserTraining

# of one run, not of a variant
OF_A_RUN = {"config", "out", "export", "title", "resume", "ckpt_path", "trainer.val_check_interval"}
# on what validation samples are measured, which is the same for all
SAME = ("data.validation", "data.validation_samples", "data.image_size", "data.validation_whole", "model.autoencoder")
LONGEST_NAME = 60


@dataclass(frozen=True)
class Variant:
    """One of the trainings that are compared.

    Attributes:
        name: also of its folders.
        arguments: of ``fit``.
        config: resolved, with dotted keys.
        steps: of the whole training.
        batch_size: images of a step; None where tokens limit it.
        parameters: that are trained.
    """

    name: str
    arguments: tuple[str, ...]
    config: Mapping[str, Any]
    steps: int
    batch_size: int | None
    parameters: int

    def steps_for(self, images: int) -> int:
        """The steps that see so many images."""
        return max(round(images / (self.batch_size or 1)), 1)


class Trial(FitCLI):
    """Everything that ``fit`` does before its first step: checks, networks, data, trainer. Nothing is trained or written."""

    def __init__(self, arguments: Sequence[str], out: Path):
        super().__init__(DenoiserTraining, ["fit", *arguments, f"--out={out}"])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        content = yaml.safe_load(parser.dump(self.config, skip_none=False))
        self.resolved = {name: value for name, value in flat(content["fit"]) if name not in OF_A_RUN}
        trainer = self.options.trainer
        if processes_asked(trainer) > 1 or trainer.num_nodes > 1:
            raise UsageError("an ablation trains each variant in one process; give trainer.devices 1")
        if trainer.max_steps < 1 or trainer.max_time is not None:
            raise UsageError("an ablation needs the length of a training in steps; give trainer.max_steps, and no max_time")
        if trainer.limit_val_batches == 0:
            raise UsageError("trainer.limit_val_batches is 0, but variants are compared on validation samples; leave it out")
        if self.options.model.get("evaluation"):
            raise UsageError(
                "an ablation generates and measures images at its own looks, and not by model.evaluation; leave it out, or "
                "give --model.evaluation null for all variants, and --shards to the ablation"
            )
        if self.any_seed:
            raise UsageError("seed_everything is no number, but variants are compared at the same seed; give one")

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings with dotted keys; ``init_args`` is left out of them."""
    if not isinstance(value, dict) or not value:
        yield key, value
        return
    for name, each in value.items():
        yield from flat(each, key if name == "init_args" else f"{key}.{name}" if key else str(name))


def find_variants(given: Mapping[str, Sequence[str]], out: Path, images: int | None = None) -> list[Variant]:
    """Check variants, given by name as arguments of ``fit``; the first one is the baseline.

    Args:
        out: folder of the ablation.
        images: that each training sees (default: as many as its config says).

    Raises:
        UsageError: for a variant that cannot be trained or compared.
    """
    variants = []
    for name, arguments in given.items():
        try:
            variants.append(_variant(name, tuple(arguments), out / ".trial", images))
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
    baseline = variants[0]
    for variant in variants[1:]:
        differing = differences(baseline, variant)
        if not differing:
            raise UsageError(f"{variant.name} and {baseline.name} are the same; change a setting of one")
        if wrong := [key for key in differing if key in SAME]:
            raise UsageError(
                f"{wrong[0]} of {variant.name} is {variant.config[wrong[0]]}, and of {baseline.name} "
                f"{baseline.config[wrong[0]]}: errors of other validation samples cannot be compared; make it the same"
            )
    _require_equal_lengths(variants)
    return variants


def _variant(name: str, arguments: tuple[str, ...], trial: Path, images: int | None) -> Variant:
    tried = Trial(arguments, trial)
    data, steps = tried.options.data, tried.options.trainer.max_steps
    require_enough(min(data.validation_samples, open_source(data.validation).manifest.samples))
    size = None if data.max_tokens is not None else data.batch_size
    if images is not None:
        if size is None:
            raise UsageError("data.max_tokens limits a step, so that its images are not known; give the length in steps")
        steps = max(round(images / size), 1)
    parameters = sum(each.numel() for each in tried.model.averaged().parameters() if each.requires_grad)
    return Variant(name, arguments, tried.resolved, steps, size, parameters)


def _require_equal_lengths(variants: Sequence[Variant]) -> None:
    by_tokens = [variant.batch_size is None for variant in variants]
    if any(by_tokens) and not all(by_tokens):
        raise UsageError("data.max_tokens limits the steps of some variants only; give it to all, or data.batch_size")
    seen = {variant.name: variant.steps * (variant.batch_size or 1) for variant in variants}
    if max(seen.values()) - min(seen.values()) >= max(variant.batch_size or 1 for variant in variants):
        listed = ", ".join(f"{name} {images:,}" for name, images in seen.items())
        what = "steps" if any(by_tokens) else "images"
        raise UsageError(f"variants train on different numbers of {what} ({listed}); give all the same")


def differences(first: Variant, second: Variant) -> dict[str, tuple[Any, Any]]:
    """The entries of their configs that differ, with their values; lengths in steps follow from the batch."""
    keys = dict.fromkeys([*first.config, *second.config])
    both = {key: (first.config.get(key), second.config.get(key)) for key in keys if key != "trainer.max_steps"}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def names_of(configs: Sequence[str]) -> list[str]:
    """A name for each file: its stem, where these differ, else its path."""
    stems = Counter(Path(config).stem for config in configs)
    once = all(count == 1 for count in stems.values())
    return [folder_name(Path(config).stem if once else str(Path(config).with_suffix(""))) for config in configs]


def folder_name(text: str) -> str:
    """``text`` as the name of a folder."""
    return re.sub(r"[^\w.,=+-]+", "-", text).strip("-.")[:LONGEST_NAME]
