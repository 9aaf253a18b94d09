"""Metrics of a run from Lightning's CSV log."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

Curves = dict[str, tuple[list[float], list[float]]]


def read_metrics(path: str | os.PathLike) -> Curves:
    """Read metric -> (steps, values), with steps counted from 1 (Lightning counts from 0).

    An incomplete last line is ignored; a missing file gives no curves.
    """
    curves: Curves = {}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return curves
    for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")):
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(float(row["step"]) + 1)
                values.append(float(value))
    return curves
