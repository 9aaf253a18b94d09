"""The CSV log of a run's metrics, as curves."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

Curves = dict[str, tuple[list[float], list[float]]]


def read_metrics(path: str | os.PathLike) -> Curves:
    """Read Lightning's CSV log: metric -> (steps trained, values), without the blanks.

    Lightning counts steps from 0; here the first step is 1. A last line that is still being written is ignored; a missing file
    gives no curves.
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
