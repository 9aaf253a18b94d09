"""Train variants in turn, look at them after equal numbers of images, and stop where the answer is clear.

The folder of an ablation:

    ablation.json      what was asked for; another ablation in the same folder is refused
    runs/NAME-0/       the run of each variant and seed, a folder of ``ldm denoiser fit``
    looks/             what each look measured
    results.json, ablation.html

A training goes from look to look, as a run that is stopped and resumed, which changes none of its bits. Between two looks of
one variant come those of the others: a machine that gets slower or busy does so for all.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback

from ldm.ablation.comparison import Difference, Estimate, NoiseLevels, StopRule, at_seconds
from ldm.ablation.evaluator import read_features
from ldm.ablation.look import Evaluator, Look, LookRecord, noise_places
from ldm.ablation.variants import Variant
from ldm.errors import LdmError, UsageError
from ldm.files import read_json, require_new_folder, require_version, write_json
from ldm.locks import hold_folder
from ldm.runs.fit import FitCLI
from ldm.runs.preemption import Preempted
from ldm.terminal import say
from ldm.training.denoiser import DenoiserTraining

FORMAT_VERSION = 1  # of ablation.json and results.json
# by how much samples of two trainings may differ, relative to their size: GPUs encode images with other roundings
SAME_SAMPLES = 0.02


class Part(FitCLI):
    """A part of a training, up to its next look; the last one exports the model."""

    def __init__(self, arguments: Sequence[str], look: Callback):
        super().__init__(DenoiserTraining, arguments, [look])

    def after_fit(self) -> None:
        if self.trainer.global_step >= self.options.trainer.max_steps:
            super().after_fit()


@dataclass
class Series:
    """A variant at all of its looks so far.

    Attributes:
        records: of each look those of all seeds.
        failed: why it is not trained on, where that is so.
    """

    variant: Variant
    records: list[list[LookRecord]]
    failed: str | None = None

    @property
    def images(self) -> list[int]:
        """Seen at each look."""
        return [look[0]["images"] for look in self.records]

    @property
    def step_seconds(self) -> list[float]:
        """Seconds per step of every part of the training that was timed."""
        return [record["seconds_per_step"] for look in self.records for record in look if record["seconds_per_step"]]

    @property
    def seconds(self) -> list[float]:
        """Of training until each look, by the fastest part, since other work of the machine only slows a step down; none where
        none was timed."""
        if not self.step_seconds:
            return []
        return [look[0]["step"] * min(self.step_seconds) for look in self.records]

    def errors(self, look: int) -> list[np.ndarray]:
        """Of each seed, (N,)."""
        return [np.array(record["errors"]) for record in self.records[look]]

    def metrics(self, look: int) -> dict[str, float]:
        """Means over the seeds."""
        seeds = [record["metrics"] for record in self.records[look]]
        return {name: statistics.mean(seed[name] for seed in seeds) for name in seeds[0]}


@dataclass
class Comparison:
    """A variant against the baseline.

    Attributes:
        looks: the differences of their errors at each look that both have.
        equal_seconds: after as many seconds of training, and how many; None where the looks do not reach so far.
        metrics: the differences of metrics of images at the last look, once there is no further one.
        paired: whether both got the same samples, times, noise, captions.
        clear: at which look the answer became clear; None: at none.
    """

    variant: Variant
    looks: list[Difference]
    equal_seconds: tuple[float, Difference] | None
    metrics: dict[str, Estimate]
    paired: dict[str, bool]
    clear: int | None


class Ablation:
    """Variants, how they are compared, and the results so far."""

    def __init__(
        self,
        out: Path,
        variants: Sequence[Variant],
        looks: Sequence[float],
        seeds: int = 1,
        margin: float = 0.01,
        stops: bool = True,
        evaluator: Evaluator | None = None,
    ):
        """
        Args:
            variants: the first one is the baseline; a single one is trained and measured alone.
            looks: when to look, as shares of the training; the last one is 1.
            seeds: trainings of each variant.
            margin: of :class:`StopRule`.
            stops: whether a variant whose answer is clear is not trained on.
            evaluator: of generated images.
        """
        self.out, self.variants, self.seeds, self.evaluator, self.stops = out, [*variants], seeds, evaluator, stops
        self.rule = StopRule(len(looks), max(len(variants) - 1, 1), margin)
        images = max(variant.steps * (variant.batch_size or 1) for variant in variants)
        self.steps = {
            variant.name: [min(variant.steps_for(round(images * share)), variant.steps) for share in looks]
            for variant in variants
        }
        for name, steps in self.steps.items():
            if len({*steps}) < len(steps):
                raise UsageError(f"{name} has {steps[-1]} steps for {len(steps)} looks; give fewer looks")
        self.series = {variant.name: Series(variant, []) for variant in variants}
        self.final: dict[str, dict[str, Estimate]] = {}  # differences of metrics of comparisons that are over

    @property
    def baseline(self) -> Series:
        return self.series[self.variants[0].name]

    # -- training ------------------------------------------------------------------------------------------------------

    def run(self, show: Callable[[Ablation], None]) -> None:
        """Train and compare, from where an earlier run of the same ablation ended.

        ``show``: called after each look, once ``results.json`` is written.
        """
        with hold_folder(self.out, f"running the ablation in {self.out}"):
            self._claim()
            active = [*self.variants]
            for number in range(len(self.steps[self.variants[0].name])):
                self._look(active, number)
                active = [variant for variant in active if self.series[variant.name].failed is None]
                decided = [variant for variant in active[1:] if self.stops and self._comparison(variant).clear is not None]
                last = number + 1 == self.rule.looks
                for variant in active[1:]:
                    if last or variant in decided:
                        self.final[variant.name] = self._metric_differences(variant)
                active = [variant for variant in active if variant not in decided]
                write_json(self.out / "results.json", self.results())
                show(self)
                if len(active) < min(len(self.variants), 2):
                    break

    def _claim(self) -> None:
        """Begin in the empty folder, or resume the ablation with these settings; UsageError for any other content."""
        asked = {
            "format_version": FORMAT_VERSION,
            "variants": {variant.name: dict(variant.config) for variant in self.variants},
            "steps": self.steps,
            "seeds": self.seeds,
            "margin": self.rule.margin,
            "stops": self.stops,
            "images": None if self.evaluator is None else self.evaluator.settings,
        }
        asked = json.loads(json.dumps(asked, default=str))
        file = self.out / "ablation.json"
        if not file.is_file():
            require_new_folder(self.out, "the ablation", in_place=True)
            write_json(file, asked)
            return
        before = read_json(file, dict[str, Any])
        require_version(before.get("format_version"), FORMAT_VERSION, f"{file}: the ablation")
        for name, value in asked.items():
            if before.get(name) != value:
                raise UsageError(f"{self.out} holds an ablation with other {name}; give a new --out, or the same settings")

    def _look(self, active: Sequence[Variant], number: int) -> None:
        """Train all to their next look, in turns: forwards, and the next time backwards, so that none is always the first."""
        found: dict[str, list[LookRecord]] = {variant.name: [] for variant in active}
        for seed in range(self.seeds):
            for variant in active if (number + seed) % 2 == 0 else active[::-1]:
                series = self.series[variant.name]
                if series.failed is not None:
                    continue
                try:
                    found[variant.name].append(self._train(variant, seed, number))
                except (UsageError, Preempted):
                    raise
                except LdmError as error:  # of this training: it diverged, say
                    if variant is self.variants[0]:
                        raise
                    series.failed = str(error)
                    say(f"{variant.name} is given up: {error}")
        for variant in active:
            series, records = self.series[variant.name], found[variant.name]
            if series.failed is None:
                series.records.append(records)
                self._require_same_samples(series, number)

    def _train(self, variant: Variant, seed: int, number: int) -> LookRecord:
        """Train to a look, unless it is there."""
        step, name = self.steps[variant.name][number], f"{variant.name}-{seed}"
        file, run = self.out / "looks" / f"{name}-{step:08d}.json", self.out / "runs" / name
        if not file.is_file():
            config = variant.config
            title = f"{variant.name}, " + (f"seed {seed + 1} of {self.seeds}, " if self.seeds > 1 else "")
            own = {
                "out": run,
                "export": run / DenoiserTraining.artifact,
                "title": f"{title}look {number + 1} of {self.rule.looks}",
                "resume": "latest",
                "seed_everything": config["seed_everything"] + seed,
                "data.seed": config["data.seed"] + seed,
                "trainer.max_steps": variant.steps,
                "trainer.val_check_interval": step,
            }
            try:
                Part(
                    ["fit", *variant.arguments, *(f"--{key}={value}" for key, value in own.items())],
                    Look(step, file, self.evaluator),
                )
            except SystemExit as ended:
                if ended.code:
                    raise
            except Preempted as stopped:
                said = str(stopped).partition(": resume with")[0]
                raise type(stopped)(f"{name} {said}; the same ldm ablate resumes it") from None
            finally:
                free()
            if not file.is_file():
                raise UsageError(f"{file} is missing, and {run} is beyond it; remove both, to train this variant again")
        return read_json(file, LookRecord)

    def _require_same_samples(self, series: Series, number: int) -> None:
        ours, theirs = (np.array(each.records[number][0]["samples"]) for each in (self.baseline, series))
        if len(ours) != len(theirs) or np.abs(ours - theirs).max() > SAME_SAMPLES * ours.max():
            raise UsageError(
                f"the validation samples of {series.variant.name} are other latents than those of "
                f"{self.baseline.variant.name}, so that errors cannot be compared; validate both on the same latents"
            )

    # -- results -------------------------------------------------------------------------------------------------------

    @cached_property
    def levels(self) -> NoiseLevels:
        return NoiseLevels(noise_places(len(self.baseline.errors(0)[0])))

    def comparisons(self) -> list[Comparison]:
        """Of all variants that have been looked at."""
        return [self._comparison(variant) for variant in self.variants[1:] if self.series[variant.name].records]

    def _comparison(self, variant: Variant) -> Comparison:
        first, second = self.baseline, self.series[variant.name]
        looks = [self.levels.over_seeds(first.errors(number), second.errors(number)) for number in range(len(second.records))]
        overall = [look.overall for look in looks]
        clear = next((end - 1 for end in range(1, len(looks) + 1) if self.rule.is_clear(overall[:end])), None)
        digests = [[record["paired"] for look in each.records[: len(looks)] for record in look] for each in (first, second)]
        paired = {name: all(a[name] == b[name] for a, b in zip(*digests, strict=True)) for name in digests[0][0]}
        return Comparison(
            variant, looks, self._at_equal_seconds(first, second), self.final.get(variant.name, {}), paired, clear
        )

    def _at_equal_seconds(self, first: Series, second: Series) -> tuple[float, Difference] | None:
        """After as many seconds as both have trained for."""
        if not (first.seconds and second.seconds):
            return None
        when = min(first.seconds[len(second.records) - 1], second.seconds[-1])
        sides: list[list[np.ndarray]] = []
        for each in (first, second):
            by_seed = zip(*(each.errors(number) for number in range(len(each.records))), strict=True)
            found = [at_seconds(each.seconds, [*errors], when) for errors in by_seed]
            sides.append([errors for errors in found if errors is not None])
        return (when, self.levels.over_seeds(*sides)) if all(len(side) == self.seeds for side in sides) else None

    def _metric_differences(self, variant: Variant) -> dict[str, Estimate]:
        """At the variant's last look."""
        number = len(self.series[variant.name].records) - 1
        sides = [
            [self.out / "looks" / f"{name}-{seed}-{self.steps[name][number]:08d}.npz" for seed in range(self.seeds)]
            for name in (self.variants[0].name, variant.name)
        ]
        if self.evaluator is None or not all(file.is_file() for side in sides for file in side):
            return {}
        say(f"the metrics of {variant.name} against those of {self.variants[0].name}, by the bootstrap")
        return self.evaluator.differences(*([read_features(file) for file in side] for side in sides))

    def results(self) -> dict[str, Any]:
        """All results, as JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "baseline": self.variants[0].name,
            "seeds": self.seeds,
            "level": self.rule.level,
            "level_of_a_look": self.rule.level_of_a_look,
            "margin": self.rule.margin,
            "variants": {name: self._series_record(series) for name, series in self.series.items()},
            "comparisons": {each.variant.name: self._comparison_record(each) for each in self.comparisons()},
            "images": None if self.evaluator is None else self.evaluator.settings,
        }

    def error(self, series: Series, look: int) -> float:
        """The error of x0, a geometric mean over samples and seeds."""
        return float(np.exp(np.mean(np.log(series.errors(look)))))

    def _series_record(self, series: Series) -> dict[str, Any]:
        seconds = series.step_seconds
        timed = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)} if seconds else None
        looks = [
            {"step": records[0]["step"], "images": records[0]["images"]}
            | {"x0_error": self.error(series, number), "val_loss": statistics.mean(each["val_loss"] for each in records)}
            | {"seconds": series.seconds[number] if seconds else None, "metrics": series.metrics(number)}
            for number, records in enumerate(series.records)
        ]
        return {"parameters": series.variant.parameters, "seconds_per_step": timed, "failed": series.failed, "looks": looks}

    def _comparison_record(self, comparison: Comparison) -> dict[str, Any]:
        series, seconds = self.series[comparison.variant.name], comparison.equal_seconds
        looks = [
            {"images": images} | _difference_record(look) for images, look in zip(series.images, comparison.looks, strict=True)
        ]
        return {
            "answer": self.answer(comparison),
            "clear_at_images": None if comparison.clear is None else series.images[comparison.clear],
            "paired": comparison.paired,
            "looks": looks,
            "equal_seconds": None if seconds is None else {"seconds": seconds[0]} | _difference_record(seconds[1]),
            "metrics": {name: _estimate_record(estimate) for name, estimate in comparison.metrics.items()},
        }

    def answer(self, comparison: Comparison) -> str:
        """The comparison in a sentence."""
        series, last = self.series[comparison.variant.name], comparison.looks[-1].overall
        said = f"the error of x0 is {in_words(last)} than that of {self.variants[0].name}, after {series.images[-1]:,} images"
        if comparison.clear is not None:
            return f"{said}; clear after {series.images[comparison.clear]:,}"
        if self.rule.verdict(last):
            return f"{said}; clear there"
        reach = np.log1p(self.rule.margin)
        low, high = last.interval()
        if -reach < low and high < reach:
            return f"no difference above {self.rule.margin:.1%} after {series.images[-1]:,} images"
        return f"not clear: {said}"


def in_words(estimate: Estimate) -> str:
    """``9.3% smaller (8.1 to 10.5)``: of ln(second / first), with its interval."""
    low, high = (100 * np.expm1(bound) for bound in estimate.interval())
    value = 100 * np.expm1(estimate.value)
    if value < 0:
        value, low, high = -value, -high, -low
        return f"{value:.1f}% smaller ({low:.1f} to {high:.1f})"
    return f"{value:.1f}% larger ({low:.1f} to {high:.1f})"


def free() -> None:
    """Give back the memory of a training that is over, and forget what was compiled for it: dynamo compiles a function a
    few times, and runs it uncompiled from then on."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _difference_record(difference: Difference) -> dict[str, Any]:
    return _estimate_record(difference.overall) | {"levels": [_estimate_record(level) for level in difference.levels]}


def _estimate_record(estimate: Estimate) -> dict[str, float]:
    low, high = estimate.interval()
    return {"difference": estimate.value, "low": low, "high": high}
