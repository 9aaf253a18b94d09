"""The page of an ablation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.ablation.ablation import Ablation, Comparison, Series, in_words
from ldm.ablation.comparison import Estimate
from ldm.ablation.look import SHARES
from ldm.ablation.variants import differences
from ldm.evaluation.page import label
from ldm.evaluation.results import LOWER_IS_BETTER
from ldm.reporting.charts import Bands
from ldm.reporting.grids import paired_grid, read_grid
from ldm.reporting.pages import Report
from ldm.runs.layout import RunFolder

CELL, MOST_IMAGES = 96, 8
RATIO = "ln of the error of x0 over the baseline's; below 0 is better"


def write_page(ablation: Ablation) -> None:
    """Write ``ablation.html``."""
    baseline, comparisons = ablation.baseline.variant.name, ablation.comparisons()
    page = Report("Ablation", f"against {baseline}, in {ablation.out}")
    page.metrics({each.variant.name: in_words(each.looks[-1].overall) for each in comparisons})
    _answers(page, ablation, comparisons)
    _curves(page, ablation, comparisons)
    _metrics(page, ablation, comparisons)
    _images(page, ablation)
    _what_differs(page, ablation, comparisons)
    page.folded("Settings of the generated images", json.dumps(ablation.evaluator and ablation.evaluator.settings, indent=2))
    page.save(ablation.out / "ablation.html")


def _answers(page: Report, ablation: Ablation, comparisons: Sequence[Comparison]) -> None:
    rows = [[each.variant.name, ablation.answer(each), _after_seconds(each)] for each in comparisons]
    rows += [[name, f"given up: {series.failed}", ""] for name, series in ablation.series.items() if series.failed]
    page.table("Answers", ["variant", "after as many images", "after as many seconds"], rows)
    rule, seeds = ablation.rule, ablation.seeds
    over = f"over {seeds} seeds and the validation samples" if seeds > 1 else "over the validation samples"
    said = [
        "The error of x0 is the squared difference of the predicted and the true clean latent, by the averaged weights, on the "
        f"same validation samples and noise for all; a geometric mean. Its differences are paired sample by sample. Intervals "
        f"are of {rule.level:.0%}, {over}.",
        f"An answer is clear where at two looks in a row the interval of {rule.level_of_a_look:.2%} lies beyond "
        f"±{rule.margin:.1%}: with {rule.looks} looks and {rule.comparisons} comparisons, the probability that any of them is "
        f"called clear without a difference above {rule.margin:.1%} is at most {1 - rule.level:.0%}.",
    ]
    said.append(
        "Seconds are those of steps, without validations, looks and checkpoints, by the fastest part of each training. "
        "Intervals leave their uncertainty out; the last table has it."
    )
    if seeds == 1:
        said.append(
            "With one seed, this is about these trained models. Another seed may differ by some percent: train with three."
        )
    page.text("", said)


def _after_seconds(comparison: Comparison) -> str:
    if comparison.equal_seconds is None:
        return "–"
    seconds, difference = comparison.equal_seconds
    return f"{in_words(difference.overall)}, after {seconds:,.0f} s"


def _curves(page: Report, ablation: Ablation, comparisons: Sequence[Comparison]) -> None:
    names, trained = [*ablation.series], [each for each in ablation.series.values() if each.records]
    errors = {each.variant.name: [ablation.error(each, look) for look in range(len(each.records))] for each in trained}
    page.curve(
        "Error of x0, by images seen",
        {each.variant.name: (each.images, errors[each.variant.name]) for each in trained},
        *("images seen", "error of x0"),
        log_y=True,
        half=True,
    )
    if all(each.seconds for each in trained):
        page.curve(
            "Error of x0, by seconds of training",
            {each.variant.name: (each.seconds, errors[each.variant.name]) for each in trained},
            *("seconds", "error of x0"),
            log_y=True,
            half=True,
        )
    images = ablation.baseline.images
    points: dict[str, tuple[Sequence[float], Sequence[Estimate]]] = {
        each.variant.name: (ablation.series[each.variant.name].images, [look.overall for look in each.looks])
        for each in comparisons
    }
    _differences(page, "Against the baseline, by images seen", names, points, [images[0], images[-1]], "images seen")
    for each in comparisons:
        count = len(each.looks[-1].levels)
        shares = [SHARES[0] + (SHARES[1] - SHARES[0]) * (level + 0.5) / count for level in range(count)]
        points |= {each.variant.name: (shares, each.looks[-1].levels)}
    _differences(page, "Against the baseline, by noise, at the last look", names, points, [*SHARES], "share of the noise")


def _differences(
    page: Report, title: str, names: Sequence[str], points: Mapping[str, Any], ends: Sequence[float], x_label: str
) -> None:
    """Estimates at x, with their intervals, and a line at 0 for the baseline."""
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {names[0]: (ends, [0.0, 0.0])}
    bands: Bands = {}
    for name, (x, estimates) in points.items():
        series[name] = x, [estimate.value for estimate in estimates]
        bands |= {name: tuple(np.array([estimate.interval() for estimate in estimates]).T)}
    page.curve(title, series, x_label, RATIO, half=True, bands=bands)


def _metrics(page: Report, ablation: Ablation, comparisons: Sequence[Comparison]) -> None:
    """Metrics of generated images."""
    trained = [each for each in ablation.series.values() if each.records]
    names = [*ablation.baseline.metrics(0)]
    if not names:
        return
    rows = []
    for each in comparisons:
        last = len(each.looks) - 1
        ours, theirs = ablation.baseline.metrics(last), ablation.series[each.variant.name].metrics(last)
        rows += [
            [each.variant.name, label(name), ours[name], theirs[name], _interval(each.metrics.get(name)), _better(name)]
            for name in names
        ]
    columns = ["variant", "metric", "baseline", "variant's", "difference", "better"]
    page.table("Generated images, at the last look that both have", columns, rows)
    page.text("", "Differences have their interval by the bootstrap over images of the same captions and noise.")
    for name in names:
        series = {
            each.variant.name: (each.images, [each.metrics(look)[name] for look in range(len(each.records))])
            for each in trained
        }
        page.curve(label(name), series, "images seen", f"{_better(name)} is better", half=True)


def _better(name: str) -> str:
    return "lower" if name.split("_")[0] in LOWER_IS_BETTER else "higher"


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    low, high = estimate.interval()
    return f"{estimate.value:+.3g} ({low:+.2g} to {high:+.2g})"


def _images(page: Report, ablation: Ablation) -> None:
    """Previews of each variant, from the same prompts and noise."""
    rows = []
    for name, series in ablation.series.items():
        if not series.records:
            continue
        step = series.records[-1][0]["step"]
        file = RunFolder(ablation.out / "runs" / f"{name}-0").preview(step)
        if file.is_file():
            images = [image for _, images in read_grid(file)[1] for image in images[:1]]
            rows.append((f"{name}, {series.images[-1]:,} images", images[:MOST_IMAGES]))
    if any(images for _, images in rows):
        page.image("Previews, from the same prompts and noise", paired_grid(rows, CELL), "Of the first seed, at its last look.")


def _what_differs(page: Report, ablation: Ablation, comparisons: Sequence[Comparison]) -> None:
    first = ablation.variants[0]
    rows = [
        [variant.name, key, *(_short(value) for value in values)]
        for variant in ablation.variants[1:]
        for key, values in differences(first, variant).items()
    ]
    page.table("What differs", ["variant", "setting", "baseline", "variant's"], rows)
    rows = [[each.variant.name, *("the same" if same else "others" for same in each.paired.values())] for each in comparisons]
    if comparisons:
        page.table("What the trainings share with the baseline's", ["variant", *comparisons[0].paired], rows)
    rows = [[name, series.variant.parameters, *_speed(series)] for name, series in ablation.series.items()]
    page.table("Speed", ["variant", "trained parameters", "seconds per step", "median", "most", "steps"], rows)


def _speed(series: Series) -> list[float | int]:
    seconds = series.step_seconds or [math.nan]
    steps = series.records[-1][0]["step"] if series.records else 0
    return [min(seconds), float(np.median(seconds)), max(seconds), steps]


def _short(value: object) -> str:
    text = json.dumps(value, default=str) if isinstance(value, list | dict) else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
