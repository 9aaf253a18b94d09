"""HTML pages from the templates beside this file, and the report: a page that grows section by section.

A page is one file: inline CSS, inline SVG, images as data URIs, no script and no request to anywhere, so that it can be mailed,
archived and opened offline. jinja2 escapes every text that is handed to an HTML template.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ldm.files import atomic_file
from ldm.reporting.charts import Heights, Series, histograms, line_chart


def format_value(value: object) -> str:
    """A value as a page shows it: whole numbers with thousands separated, other numbers to four digits, None as a dash."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return "–"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


def _escapes(template: str | None) -> bool:
    """Whether a template is HTML; Markdown has no use for HTML's escapes within its code blocks."""
    return template is None or not template.endswith(".md")


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=_escapes,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["value"] = format_value


def render(template: str, **values: Any) -> str:
    """The text of a template of ``templates/`` with these values; one that is missing is an error."""
    return _ENVIRONMENT.get_template(template).render(values)


def write_page(path: str | os.PathLike, template: str, **values: Any) -> None:
    """Write a rendered template to ``path``, atomically."""
    with atomic_file(path) as file:
        # file names may contain lone surrogates, which UTF-8 cannot encode
        file.write(render(template, **values).encode("utf-8", "replace"))


class Report:
    """A page that grows section by section, in the order of the calls, and is written by :meth:`save`."""

    def __init__(self, title: str, subtitle: str = "", refresh_seconds: int | None = None) -> None:
        """``refresh_seconds``: an open page reloads itself so often."""
        self.title = title
        self.subtitle = subtitle
        self.refresh_seconds = refresh_seconds
        self._sections: list[dict[str, Any]] = []

    def metrics(self, metrics: Mapping[str, str | float]) -> None:
        """Cards with a big number (or a short text) over its name; put units into the name."""
        self._add("metrics", "", metrics=metrics)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; columns of numbers are aligned to the right. Raises ValueError for a row that does not fit the columns."""
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"table {title!r} has {len(columns)} columns, but a row holds {len(row)}: {row!r}")
        numeric = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
        self._add("table", title, columns=columns, rows=rows, numeric=numeric)

    def curve(
        self, title: str, series: Series, x_label: str, y_label: str, log_y: bool = False, smooth: int = 0, half: bool = False
    ) -> None:
        """A line chart of named (x, y) series, with the last value of each in the legend; see :func:`line_chart`.

        ``half``: on a wide page two of these stand side by side. Raises ValueError where x and y differ in length.
        """
        chart = line_chart(title, series, log_y, smooth)
        self._add("curve", title, half, chart=chart, x_label=x_label, y_label=y_label, log_y=log_y)

    def bars(
        self,
        title: str,
        panels: Mapping[str, Heights],
        low: float,
        high: float,
        line: Heights | None = None,
        note: str = "",
    ) -> None:
        """Histograms side by side with a ``note`` above them; see :func:`histograms`.

        ``line`` shows what is expected of the bars.
        """
        self._add("bars", title, panels=histograms(panels, low, high, line), note=note)

    def image(self, title: str, image: Image.Image, note: str = "") -> None:
        """An image, held in the page as PNG, with a note beneath it."""
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            image = image.convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        png = base64.b64encode(buffer.getvalue()).decode()
        self._add("image", title, png=png, width=image.width, height=image.height, note=note)

    def commands(self, title: str, commands: Sequence[tuple[str, str]]) -> None:
        """Commands to copy, each with a comment above it."""
        self._add("commands", title, commands=commands)

    def text(self, title: str, paragraphs: Sequence[str] | str) -> None:
        """Plain paragraphs."""
        self._add("text", title, paragraphs=[paragraphs] if isinstance(paragraphs, str) else paragraphs)

    def folded(self, title: str, text: str, opened: bool = False) -> None:
        """A long text, its lines as they are, under a title that opens and closes it."""
        self._add("folded", title, text=text, opened=opened)

    def html(self) -> str:
        """The whole page."""
        return render("report.html", **self._values())

    def save(self, path: str | os.PathLike) -> None:
        """Write the page to ``path``, atomically."""
        write_page(path, "report.html", **self._values())

    def _add(self, kind: str, title: str, half: bool = False, **content: Any) -> None:
        """``kind`` names the macro of templates/sections.html."""
        self._sections.append({"kind": kind, "title": title, "half": half} | content)

    def _values(self) -> dict[str, Any]:
        groups = [(half, list(sections)) for half, sections in groupby(self._sections, lambda section: section["half"])]
        return {"title": self.title, "subtitle": self.subtitle, "refresh_seconds": self.refresh_seconds, "groups": groups}
