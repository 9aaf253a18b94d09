"""The page about generated images: metrics beside those of real images, plots, and images side by side."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from torch import Tensor

from ldm.evaluation.image_sets import ImageSet
from ldm.evaluation.results import Results
from ldm.reporting.grids import captioned_grid
from ldm.reporting.pages import Report

COLUMNS, CELL = 4, 96
BINS = 30
WORDS = {"fid": "FID", "kid": "KID", "cmmd": "CMMD", "clipscore": "CLIPScore", "retrieval": "retrieval accuracy"}


def label(name: str) -> str:
    """A metric's name for a table: ``FID (inception)``."""
    metric, _, network = name.partition("_")
    return f"{WORDS.get(metric, metric)} ({network})"


def write_page(
    path: str | os.PathLike, title: str, results: Results, real: ImageSet, generated: ImageSet, protocol: dict[str, Any]
) -> None:
    """Write the page, one HTML file."""
    report = Report("Evaluation", title)
    rows = [
        [label(metric.name), metric.value, metric.real, "lower" if metric.lower_is_better else "higher", metric.note]
        for metric in results.metrics
    ]
    report.table("Metrics", ["metric", "generated", "real images", "better", "note"], rows)
    report.text(
        "",
        "Real images: of a distance, and of precision, recall, density and coverage, one half of real images against another; "
        "else the real images themselves. Generated images share the captions of the real ones that they are compared with. "
        "Values of other networks, numbers of images or resize filters cannot be compared with these.",
    )
    for network, (made, of_real) in results.agreement.items():
        _histograms(report, f"Agreement with the caption ({network})", made, of_real, "100 times the cosine")
    for network, (made, of_real) in results.distances.items():
        note = "of real images, those of one half to the nearest of the other; far smaller ones of generated images are copies"
        _histograms(report, f"Distance to the nearest real image ({network})", made, of_real, note)
    both = [number for number in sorted(generated.shown) if number in real.shown]
    for name, images in (("Generated images", generated), ("Real images of the same captions", real)):
        numbers = both if generated.captions == real.captions else sorted(images.shown)
        if numbers:
            captions = [images.captions[number] or "" for number in numbers]
            grid = captioned_grid([images.shown[number] for number in numbers], captions, COLUMNS, CELL)
            report.image(name if generated.captions == real.captions else name.partition(" of ")[0], grid)
    report.folded("Protocol", json.dumps(protocol, indent=2, ensure_ascii=False))
    report.save(path)


def _histograms(report: Report, title: str, made: Tensor, of_real: Tensor, note: str) -> None:
    values = {"generated": made.numpy(), "real images": of_real.numpy()}
    together = np.concatenate([*values.values()])
    low, high = float(together.min()), float(together.max())
    if low < high:
        shares = {name: np.histogram(one, BINS, (low, high))[0] / len(one) for name, one in values.items()}
        report.bars(title, shares, low, high, note=note)
