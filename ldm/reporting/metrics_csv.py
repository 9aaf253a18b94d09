"""Metrics of a run from Lightning's CSV log."""

from __future__ import annotations

import csv
import io
import os

from ldm.errors import LdmError
from ldm.files import read_bytes
from ldm.terminal import printable

Curves = dict[str, tuple[list[float], list[float]]]

MAX_BYTES = 2**30
MAX_STEPS = 10**15
FIX = "correct it, or move the file away: a report and a resumed run do without it"


def read_rows(path: str | os.PathLike) -> tuple[list[str], list[dict[str, str]]]:
    """The names of the columns, and the rows as text: ``step`` is a whole number, every other value a number or empty.

    An incomplete last line is ignored, as a process that was killed may leave it; a missing file has no rows. Raises
    :class:`LdmError` for any other line that is not so.
    """
    if not os.path.lexists(path):
        return [], []
    reader, rows = None, []
    try:
        text = read_bytes(path, MAX_BYTES, FIX).decode("utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""), strict=True)
        names = list(reader.fieldnames or [])
        if names and (names.count("step") != 1 or len(set(names)) < len(names)):
            raise ValueError("the first line does not name a column step and others, each once")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{sum(map(len, row.pop(None, []))) or 'too few'} values for {len(names)} columns")
            if not 0 <= int(row["step"]) <= MAX_STEPS:
                raise ValueError(f"step {row['step']}")
            for value in row.values():
                float(value or 0)
            rows.append(row)
    except (csv.Error, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise LdmError(printable(f"{path}, line {reader.line_num if reader else 1}: {str(error)[:200]}; {FIX}")) from None
    return names, rows


def read_metrics(path: str | os.PathLike) -> Curves:
    """Read metric -> (steps, values), with steps counted from 1 (Lightning counts from 0). See :func:`read_rows`."""
    curves: Curves = {}
    for row in read_rows(path)[1]:
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(float(row["step"]) + 1)
                values.append(float(value))
    return curves
