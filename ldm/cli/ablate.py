"""``ldm ablate``: which of several settings is better, before a long training."""

from __future__ import annotations

import argparse
import math
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.evaluated import require_count
from ldm.cli.parser import Commands, add_command
from ldm.errors import UsageError

if TYPE_CHECKING:
    from ldm.ablation.evaluator import ImageEvaluator

# options of fit whose names have no dot
OF_FIT = ("--seed_everything", "--matmul_precision")
MOST_LOOKS, MOST_SEEDS = 1000, 1000
# ldm/ablation/README.md has the measurement
MARGIN, MARGIN_OF_ONE_SEED = 0.01, 0.05


def add(commands: Commands) -> None:
    ablate = add_command(
        commands,
        "ablate",
        run_ablate,
        "train variants of a denoiser on the same samples and noise, in turns, and compare them: error by noise level, metrics "
        "of images and speed, with confidence intervals; a variant is not trained on once its answer is clear. Options with a "
        "dot are those of ldm denoiser fit, for all variants",
        """ldm ablate adamw.yaml muon.yaml --out ablation
  ldm ablate configs/shapes/denoiser.yaml --vary model.ema_decay 0.99 0.999 --out ablation --trainer.max_steps 500
  ldm ablate muon.yaml narrow.yaml --config configs/shapes/denoiser.yaml --out ablation --seeds 3
  ldm ablate adamw.yaml muon.yaml --out ablation --shards validation --network runs/matcher/matcher""",
    )
    ablate.passes_on = is_of_fit
    ablate.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML of ldm denoiser fit; the first is the baseline")
    ablate.add_argument("--out", required=True, metavar="DIR", help="new folder, or that of this ablation, which is resumed")
    ablate.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="a YAML that comes before each CONFIG, which may then be "
        "short; repeatable",
    )  # fmt: skip
    ablate.add_argument(
        "--vary",
        action="append",
        nargs="+",
        default=[],
        metavar=("KEY", "VALUE"),
        help="a variant of each value of a setting, such as model.ema_decay 0.99 0.999; repeatable: of all combinations",
    )
    ablate.add_argument("--images", type=int, metavar="N", help="that each training sees (default: by trainer.max_steps)")
    ablate.add_argument("--looks", type=int, default=8, metavar="N", help="comparisons during the training (default: 8)")
    ablate.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="trainings of each variant, whose spread counts (default: 1)"
    )
    ablate.add_argument(
        "--margin",
        type=float,
        help="relative difference of the error that does not matter (default: 0.01, and 0.05 of one seed, which may "
        "differ from the next by so much)",
    )
    ablate.add_argument("--no-stop", action="store_true", help="train all variants to the end")
    images = ablate.add_argument_group("metrics of generated images, at each look")
    images.add_argument("--shards", metavar="DIR", help="image shards of a validation set, with captions")
    images.add_argument("--network", action="append", metavar="NAME", help="as of ldm evaluate pipeline; repeatable")
    images.add_argument("--count", type=int, metavar="N", help="images of each look (default: 256)")
    images.add_argument("--steps", type=int, help="of the sampler (default: 30)")
    images.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: 3)")


def is_of_fit(name: str) -> bool:
    """Whether an option is one of ``ldm denoiser fit``."""
    return name.startswith("--") and ("." in name or name in OF_FIT)


def run_ablate(options: argparse.Namespace) -> None:
    from jsonargparse import ArgumentError

    from ldm.ablation.ablation import Ablation
    from ldm.ablation.page import write_page
    from ldm.ablation.variants import find_variants
    from ldm.latents.compute import Process
    from ldm.runs.config import explain
    from ldm.terminal import say

    for name, most in (("looks", MOST_LOOKS), ("seeds", MOST_SEEDS)):
        if not 1 <= getattr(options, name) <= most:
            raise UsageError(f"--{name} is {getattr(options, name)}; give 1 to {most}")
    if options.margin is None:
        options.margin = MARGIN if options.seeds > 1 else MARGIN_OF_ONE_SEED
    if not 0 <= options.margin < 1:
        raise UsageError(f"--margin is {options.margin:g}; give 0 or more and less than 1, as 0.01 for one percent")
    if options.images is not None:
        require_count("images", options.images)
    if Process.from_environment().world_size > 1:
        raise UsageError("ldm ablate trains in one process; start it without torchrun")
    evaluator = _evaluator(options)
    try:
        variants = find_variants(_given(options), Path(options.out), options.images)
    except ArgumentError as error:
        raise UsageError(f"{explain(error)}; see ldm denoiser fit --help") from error
    looks = [(number + 1) / options.looks for number in range(options.looks)]
    ablation = Ablation(Path(options.out), variants, looks, options.seeds, options.margin, not options.no_stop, evaluator)
    ablation.run(write_page)
    for comparison in ablation.comparisons():
        say(f"{comparison.variant.name}: {ablation.answer(comparison)}")
    say(f"look at {ablation.out / 'ablation.html'}")


def _given(options: argparse.Namespace) -> dict[str, list[str]]:
    """The arguments of ``fit`` of each variant, by its name."""
    from ldm.ablation.variants import folder_name, names_of

    for key, *values in options.vary:
        if not values or key.startswith("-"):
            raise UsageError(f"--vary {key} has {'no values' if not values else 'dashes'}; give --vary KEY VALUE VALUE")
    before = [f"--config={file}" for file in options.config]
    given: dict[str, list[str]] = {}
    for name, config in zip(names_of(options.configs), options.configs, strict=True):
        for values in product(*([(key, value) for value in values] for key, *values in options.vary)):
            changes = [f"{key.rpartition('.')[2]}={value}" for key, value in values]
            words = [name] if len(options.configs) > 1 or not changes else []
            variant = folder_name(",".join([*words, *changes]))
            if variant in given or not variant:
                raise UsageError(f"two variants are called {variant!r}; give the configs other names")
            overrides = [f"--{key}={value}" for key, value in values]
            given[variant] = [*before, f"--config={config}", *options.passed_on, *overrides]
    if len(given) < 2:
        raise UsageError("an ablation compares two variants or more; give another config, or vary a setting")
    return given


def _evaluator(options: argparse.Namespace) -> ImageEvaluator | None:
    """What measures generated images; None where that is not asked for."""
    if options.shards is None:
        for name in ("network", "count", "steps", "guidance"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name} is of the metrics of generated images; give --shards, too")
        return None
    from ldm.ablation.evaluator import ImageEvaluator
    from ldm.evaluation.features import load_feature_network
    from ldm.machine import device_type
    from ldm.pipeline import GUIDANCE, STEPS

    count, steps = 256 if options.count is None else options.count, STEPS if options.steps is None else options.steps
    for name, value in (("count", count), ("steps", steps)):
        require_count(name, value)
    guidance = GUIDANCE if options.guidance is None else options.guidance
    if not math.isfinite(guidance):  # else it is found at the first look, after training
        raise UsageError(f"--guidance is {guidance}; give a finite number")
    networks = [load_feature_network(name, device_type()) for name in options.network or ("inception", "clip")]
    return ImageEvaluator(options.shards, networks, count, steps, guidance)
