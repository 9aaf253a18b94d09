"""The page of a sweep: quality against evaluations of the denoiser, guidance against fidelity and agreement, and images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from ldm.evaluation.page import label
from ldm.evaluation.sweep import CELL, PAGE, REAL, SamplerSettings, SweepFolder, SweptSettings, pareto_front, settings_of
from ldm.reporting.grids import paired_grid
from ldm.reporting.pages import Report, format_value
from ldm.terminal import printable

FRONT = "Pareto front"


def write_page(folder: SweepFolder, title: str, metric: str, best: SweptSettings) -> None:
    """Write ``index.html`` of the folder.

    Args:
        metric: by which settings are compared.
        best: those that are chosen.
    """
    results = [folder.results[settings] for settings in sorted(folder.results)]
    front, chosen = pareto_front(results, metric), settings_of(best)
    report = Report("Sweep", title)
    report.metrics(
        {
            "chosen": str(chosen),
            label(metric): best["metrics"][metric]["value"],
            "evaluations of the denoiser for an image": best["evaluations"],
            "images of each setting": folder.protocol["count"],
        }
    )
    _quality(report, results, front, metric)
    _guidance(report, results, metric)
    _images(report, folder, front, chosen)
    names = [*results[0]["metrics"]]
    for heading, few in ((f"The {FRONT}", front), ("All settings", results)):
        rows = [_row(each, names) for each in few]
        report.table(heading, ["scheduler", "steps", "guidance", "evaluations", *map(label, names)], rows)
    real = [[label(name), one["real"], one["better"]] for name, one in results[0]["metrics"].items()]
    report.table("Real images", ["metric", "real images", "better"], real)
    notes = dict.fromkeys(one["note"] for each in results for one in each["metrics"].values() if "note" in one)
    every = "All settings generate from the same captions and the same noise. "
    report.text("", [every + "Differences as small as those between two seeds say nothing.", *notes])
    report.folded("Protocol", json.dumps(folder.protocol, indent=2, ensure_ascii=False))
    report.save(folder.path / PAGE)


def _row(swept: SweptSettings, names: Iterable[str]) -> list[object]:
    return [*settings_of(swept), swept["evaluations"], *(swept["metrics"][name]["value"] for name in names)]


def _value(swept: SweptSettings, metric: str) -> float:
    return swept["metrics"][metric]["value"]


def _quality(report: Report, results: Sequence[SweptSettings], front: Sequence[SweptSettings], metric: str) -> None:
    """The metric against the evaluations: a point for each setting, a line for the front."""
    series = {
        scheduler: _series([each for each in results if each["scheduler"] == scheduler], metric, lambda one: one["evaluations"])
        for scheduler in dict.fromkeys(each["scheduler"] for each in results)
    }
    line = {FRONT: _series(front, metric, lambda one: one["evaluations"])}
    log = all(_value(each, metric) > 0 for each in results) and results[0]["metrics"][metric]["better"] == "lower"
    title = f"{label(metric)} against evaluations"
    x_label = "evaluations of the denoiser for an image; with guidance two a step"
    report.curve(title, series | line, x_label, label(metric), log_y=log, dots=[*series])


def _series(
    results: Iterable[SweptSettings], metric: str, by: Callable[[SweptSettings], float]
) -> tuple[list[float], list[float]]:
    points = sorted((by(each), _value(each, metric)) for each in results)
    return [x for x, _ in points], [y for _, y in points]


def _guidance(report: Report, results: Sequence[SweptSettings], metric: str) -> None:
    """Fidelity and agreement against guidance, of each scheduler with its most steps."""
    names = [*results[0]["metrics"]]
    fidelity = metric if metric.startswith(("fid_", "kid_", "cmmd_")) else names[0]
    agreement = [name for name in names if name.startswith("clipscore_")]
    if len({each["guidance"] for each in results}) < 2:
        return
    for name in (fidelity, *agreement[:1]):
        series = {}
        for scheduler in dict.fromkeys(each["scheduler"] for each in results):
            steps = max(each["steps"] for each in results if each["scheduler"] == scheduler)
            some = [each for each in results if (each["scheduler"], each["steps"]) == (scheduler, steps)]
            series[f"{scheduler}, {steps} steps"] = _series(some, name, lambda one: one["guidance"])
        report.curve(f"Guidance and {label(name)}", series, "guidance", label(name), half=True)


def _images(report: Report, folder: SweepFolder, front: Sequence[SweptSettings], chosen: SamplerSettings) -> None:
    """The same captions side by side: along the front, and away from the chosen settings in each direction."""
    along = [(f"{each['evaluations']}: {settings_of(each)}", settings_of(each).name) for each in front]
    grids = {f"Images along the {FRONT}, by evaluations": [*along, ("real images", REAL)]}
    for name in SamplerSettings._fields:
        alike = [each for each in sorted(folder.results) if _without(each, name) == _without(chosen, name)]
        if len(alike) > 1:
            fixed = ", ".join(f"{other} {format_value(value)}" for other, value in _without(chosen, name).items())
            grids[f"Images by {name}, at {fixed}"] = [(format_value(getattr(each, name)), each.name) for each in alike]
    captions = [printable(caption) for caption in folder.captions if caption]
    note = f"From left to right: {' · '.join(captions)}." if captions else ""
    for heading, rows in grids.items():
        if shown := [(text, images) for text, name in rows if (images := folder.images(name))]:
            report.image(heading, paired_grid(shown, CELL), note)
            note = ""  # once is enough


def _without(settings: SamplerSettings, name: str) -> dict[str, object]:
    return {other: value for other, value in settings._asdict().items() if other != name}
