"""Pages from jinja2 templates, and :class:`Report`, a page built section by section.

A page is one file with inline CSS, inline SVG and images as data URIs. It has no script and loads nothing, so that it can be
mailed, archived and opened offline. jinja2 escapes all text in HTML templates.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

from ldm.files import atomic_file
from ldm.reporting.charts import Bands, Heights, Series, histograms, line_chart


def format_value(value: object) -> str:
    """Integers with thousands separators, other numbers to four digits, None and NaN as a dash."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return "–"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    # not Markdown: its code blocks would show HTML's escapes
    autoescape=select_autoescape(disabled_extensions=("md",), default=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["value"] = format_value


def render(template: str, **values: Any) -> str:
    """Render a template of ``templates/``; a missing value raises ``jinja2.UndefinedError``."""
    return _ENVIRONMENT.get_template(template).render(values)


class Report:
    """A page whose sections appear in the order of the calls that add them."""

    def __init__(self, title: str, subtitle: str = "", refresh_seconds: int | None = None) -> None:
        """``refresh_seconds``: interval at which an open page reloads itself."""
        self.title = title
        self.subtitle = subtitle
        self.refresh_seconds = refresh_seconds
        self._sections: list[dict[str, Any]] = []

    def metrics(self, metrics: Mapping[str, str | float]) -> None:
        """Cards with a large number or short text above its name; units belong in the name."""
        self._add("metrics", "", metrics=metrics)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table with numeric columns aligned right. Raises ValueError for a row of the wrong length."""
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"table {title!r} has {len(columns)} columns, but a row holds {len(row)}: {row!r}")
        numeric = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
        self._add("table", title, columns=columns, rows=rows, numeric=numeric)

    def curve(
        self,
        title: str,
        series: Series,
        x_label: str,
        y_label: str,
        log_y: bool = False,
        smooth: int = 0,
        half: bool = False,
        dots: Collection[str] = (),
        bands: Bands | None = None,
    ) -> None:
        """A line chart of named (x, y) series; see :func:`line_chart`.

        ``half``: takes half the width of a wide page. Raises ValueError where x and y differ in length.
        """
        chart = line_chart(title, series, log_y, smooth, dots, bands)
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
        """Histograms side by side under a ``note``, each with the expected ``line``; see :func:`histograms`."""
        self._add("bars", title, panels=histograms(panels, low, high, line), note=note)

    def image(self, title: str, image: Image.Image, note: str = "") -> None:
        """An image with a note below it, embedded as PNG."""
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            image = image.convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        png = base64.b64encode(buffer.getvalue()).decode()
        self._add("image", title, png=png, width=image.width, height=image.height, note=note)

    def commands(self, title: str, commands: Sequence[tuple[str, str]]) -> None:
        """Commands to copy, each below its comment."""
        self._add("commands", title, commands=commands)

    def text(self, title: str, paragraphs: Sequence[str] | str) -> None:
        """Plain paragraphs."""
        self._add("text", title, paragraphs=[paragraphs] if isinstance(paragraphs, str) else paragraphs)

    def folded(self, title: str, text: str, opened: bool = False) -> None:
        """Preformatted text that can be folded away."""
        self._add("folded", title, text=text, opened=opened)

    def html(self) -> str:
        groups = [(half, list(sections)) for half, sections in groupby(self._sections, lambda section: section["half"])]
        return render(
            "report.html", title=self.title, subtitle=self.subtitle, refresh_seconds=self.refresh_seconds, groups=groups
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the page atomically."""
        with atomic_file(path) as file:
            # file names may contain lone surrogates, which UTF-8 cannot encode
            file.write(self.html().encode("utf-8", "replace"))

    def _add(self, kind: str, title: str, half: bool = False, **content: Any) -> None:
        """``kind``: the macro of templates/sections.html."""
        self._sections.append({"kind": kind, "title": title, "half": half} | content)
