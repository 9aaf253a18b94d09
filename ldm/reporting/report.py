"""A self-contained HTML page of a run, and captioned image grids.

The page is one file: inline CSS, inline SVG, images as data URIs, no script and no request to anywhere, so that
it can be mailed, archived and opened offline. Every text that is handed in is escaped.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ldm.files import atomic_file

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]

MAX_CAPTION_LINES = 4
MAX_CURVE_POINTS = 600
# of a grid's PNG: its labels with their images' boxes
_ROWS_CHUNK = "ldm rows"
_INK, _FRAME, _GREEN, _RED = (32, 36, 44), (214, 217, 222), (22, 138, 70), (204, 44, 44)


# ---------------------------------------------------------------------------------------------- image grids


def captioned_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int | None = None,
    cell: int = 160,
    marks: Sequence[bool | None] | None = None,
) -> Image.Image:
    """Lay images out on a white page, each with its caption wrapped beneath it.

    ``cell`` is the side in pixels of the square an image is fitted into: smaller images grow by a whole factor
    (NEAREST, so that every pixel stays visible), larger ones shrink (LANCZOS). ``columns=None`` chooses a nearly
    square page. ``marks`` draws a green tick (True), a red cross (False) or nothing (None) beside each caption.
    Raises ValueError for no images, or when captions or marks do not match them one to one.
    """
    if not images or len(captions) != len(images) or (marks is not None and len(marks) != len(images)):
        raise ValueError(
            f"captioned_grid needs at least one image, and one caption and one mark for each: got {len(images)} "
            f"images, {len(captions)} captions, {'no' if marks is None else len(marks)} marks"
        )
    columns = min(columns or _pleasant_columns(len(images)), len(images))
    if columns < 1 or cell < 1:
        raise ValueError(f"columns and cell must be at least 1, not {columns} and {cell}")
    font, line_height, gap = _font_for(cell)
    marks = marks if marks is not None else [None] * len(images)
    mark_width = 0 if all(mark is None for mark in marks) else line_height
    texts = [_wrap(caption, font, cell - mark_width) for caption in captions]
    fitted = [_fit(image, cell) for image in images]
    tall = max(image.height for image in fitted)
    starts = range(0, len(images), columns)
    # Each row is as tall as its longest caption; gap // 2 stands between image and caption.
    least = 1 if mark_width else 0  # a mark needs a line even where the caption is empty
    text_heights = [max(least, *map(len, texts[at : at + columns])) * line_height for at in starts]
    height = gap + sum(tall + gap // 2 + text_height + gap for text_height in text_heights)
    page = Image.new("RGB", (gap + columns * (cell + gap), height), "white")
    draw = ImageDraw.Draw(page)
    top = gap
    for at, text_height in zip(starts, text_heights, strict=True):
        for index in range(at, min(at + columns, len(images))):
            left = gap + (index - at) * (cell + gap)
            _place(page, draw, fitted[index], left, top + tall - fitted[index].height)
            text_top = top + tall + gap // 2
            if marks[index] is not None:
                mark = _mark(bool(marks[index]), round(line_height * 0.8))
                page.paste(mark, (left, text_top + (line_height - mark.height) // 2))
            for number, line in enumerate(texts[index]):
                draw.text((left + mark_width, text_top + number * line_height), line, fill=_INK, font=font)
        top += tall + gap // 2 + text_height + gap
    return page


def paired_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], cell: int = 160) -> Image.Image:
    """Rows of images, one above the other, each with its label at the left ("original" over "reconstruction").

    ``cell`` (pixels) as in :func:`captioned_grid`; rows may differ in length. Raises ValueError if there is no image.
    """
    columns = max((len(images) for _, images in rows), default=0)
    if columns < 1 or cell < 1:
        raise ValueError("paired_grid needs at least one row with an image, and a cell of at least 1 pixel")
    font, line_height, gap = _font_for(cell)
    fitted = [[_fit(image, cell) for image in images] for _, images in rows]
    wide, tall = (max(image.size[axis] for images in fitted for image in images) for axis in (0, 1))
    labels = [_wrap(label, font, max(cell, 100)) for label, _ in rows]
    label_width = math.ceil(max((font.getlength(line) for lines in labels for line in lines), default=0))
    first = gap + (label_width + gap if label_width else 0)
    heights = [max(tall, len(lines) * line_height) for lines in labels]
    page = Image.new("RGB", (first + columns * (wide + gap), gap + sum(h + gap for h in heights)), "white")
    draw = ImageDraw.Draw(page)
    top = gap
    for images, lines, height in zip(fitted, labels, heights, strict=True):
        for number, line in enumerate(lines):
            text_top = top + (height - len(lines) * line_height) // 2 + number * line_height
            draw.text((first - gap, text_top), line, fill=_INK, font=font, anchor="ra")
        for column, image in enumerate(images):
            _place(page, draw, image, first + column * (wide + gap), top + (height - image.height) // 2)
        top += height + gap
    return page


def _pleasant_columns(count: int) -> int:
    """The number of columns near the square root that leaves the fewest empty places; up to five stand in one row."""
    if count <= 5:
        return count
    root = math.ceil(math.sqrt(count))
    return min(range(root, root + 3), key=lambda columns: (-count % columns, columns))


def _font_for(cell: int) -> tuple[ImageFont.FreeTypeFont, int, int]:
    """Font, line height and gap (pixels) that suit a cell."""
    size = min(22, max(11, round(cell * 0.085)))
    return ImageFont.load_default(size=size), round(size * 1.35), max(6, cell // 12)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than ``width`` pixels, broken between words; only a word too long for a line is cut."""
    lines: list[str] = []
    for word in text.split():
        while word and len(lines) <= MAX_CAPTION_LINES:
            if lines and font.getlength(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
                break
            fits = next((n - 1 for n in range(2, len(word) + 1) if font.getlength(word[:n]) > width), len(word))
            lines.append(word[:fits])
            word = word[fits:]
    if len(lines) <= MAX_CAPTION_LINES:
        return lines
    last = lines[MAX_CAPTION_LINES - 1]
    while len(last) > 1 and font.getlength(last + "…") > width:
        last = last.rpartition(" ")[0] or last[:-1]
    return [*lines[: MAX_CAPTION_LINES - 1], last + "…"]


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """The image in RGB over white, scaled so that its longer side is at most ``cell`` pixels."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    longest = max(image.size)
    if longest > cell:
        width, height = (max(1, round(side * cell / longest)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    factor = cell // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _place(page: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image, x: int, y: int) -> None:
    """Paste an image with a hairline around it that shows where a white image ends; the page remembers its box."""
    draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=_FRAME)
    page.paste(image, (x, y))
    page.info.setdefault("boxes", []).append((x, y, x + image.width, y + image.height))


def save_grid(grid: Image.Image, rows: Sequence[tuple[str, Sequence[Image.Image]]], path: str | os.PathLike) -> None:
    """Write a grid made of these rows as PNG, atomically, in such a way that :func:`read_grid` finds its images again."""
    boxes = iter(grid.info["boxes"])
    kept = [[label, [next(boxes) for _ in images]] for label, images in rows]
    chunks = PngInfo()
    chunks.add_itxt(_ROWS_CHUNK, json.dumps(kept))
    with atomic_file(path) as file:
        grid.save(file, "PNG", pnginfo=chunks)


def read_grid(path: str | os.PathLike) -> tuple[Image.Image, list[tuple[str, list[Image.Image]]]]:
    """A grid and its rows, these empty where it was not written by :func:`save_grid`."""
    with Image.open(path) as grid:
        grid.load()
        rows = json.loads(grid.info.get(_ROWS_CHUNK, "[]"))
        return grid.copy(), [(label, [grid.crop(box) for box in boxes]) for label, boxes in rows]


@lru_cache
def _mark(good: bool, size: int) -> Image.Image:
    """A tick or a cross, drawn eight times too large and shrunk, for smooth edges."""
    big = Image.new("RGB", (8 * size, 8 * size), "white")
    draw = ImageDraw.Draw(big)
    strokes = [[(0.1, 0.55), (0.4, 0.83), (0.9, 0.2)]] if good else [[(0.2, 0.2), (0.8, 0.8)], [(0.8, 0.2), (0.2, 0.8)]]
    for stroke in strokes:
        points = [(x * 8 * size, y * 8 * size) for x, y in stroke]
        draw.line(points, fill=_GREEN if good else _RED, width=max(8, int(1.2 * size)), joint="curve")
    return big.resize((size, size), Image.Resampling.LANCZOS)


# ---------------------------------------------------------------------------------------------------- the page


class Report:
    """A page that grows section by section, in the order of the calls, and is written by :meth:`save`."""

    def __init__(self, title: str, subtitle: str = "", refresh_seconds: int | None = None) -> None:
        """``refresh_seconds``: an open page loads itself again so often."""
        self.title = title
        self.subtitle = subtitle
        self.refresh_seconds = refresh_seconds
        self._sections: list[str] = []

    def figures(self, figures: Mapping[str, str | float]) -> None:
        """Cards with a big number (or a short text) over its name; put units into the name."""
        cards = "".join(f"<div><dd>{_text(v)}</dd><dt>{_text(name)}</dt></div>" for name, v in figures.items())
        self._sections.append(f'<dl class="figures">{cards}</dl>')

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        """A table; numbers stand at the right. Raises ValueError for a row that does not fit the columns."""
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"table {title!r} has {len(columns)} columns, but a row holds {len(row)}: {row!r}")
        numeric = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
        kinds = [' class="number"' if number else "" for number in numeric]
        head = "".join(f"<th{kind}>{_text(c)}</th>" for kind, c in zip(kinds, columns, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{kind}>{_text(v)}</td>" for kind, v in zip(kinds, row, strict=True)) + "</tr>" for row in rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        self._section(title, f'<div class="scroll">{table}</div>')

    def curve(
        self, title: str, series: Series, x_label: str, y_label: str, log_y: bool = False, smooth: int = 0, half: bool = False
    ) -> None:
        """A line chart of named (x, y) series, with the last value of each in the legend.

        Points that are not finite (or, with ``log_y``, not positive) are left out and counted in the legend. Above
        600 points a series is thinned to the extremes of each stretch, so no spike is lost. ``smooth`` > 1 draws
        the centred mean over that many points, above the faint curve itself. ``half``: on a wide page two of these stand side
        by side. Raises ValueError where x and y differ in length.
        """
        self._section(title, _chart(title, series, x_label, y_label, log_y, smooth), "half" if half else "")

    def bars(
        self,
        title: str,
        panels: Mapping[str, Sequence[float]],
        low: float,
        high: float,
        line: Sequence[float] | None = None,
        note: str = "",
    ) -> None:
        """Histograms side by side, all of one scale: the heights of each panel's bars, which share ``low`` to ``high`` evenly.

        ``line`` is drawn over each, its points evenly spread over the same range (what is expected of the bars). ``note``
        stands above them. Heights that are not finite or below 0 count as 0.
        """
        heights = {name: np.nan_to_num(np.maximum(values, 0), posinf=0) for name, values in panels.items()}
        top = max([1e-300, *(float(values.max(initial=0)) for values in heights.values()), *(line if line is not None else ())])
        drawn = "".join(_panel(name, values, low, high, line, top) for name, values in heights.items())
        shown = f'<p class="note">{_text(note)}</p>' if note else ""
        self._section(title, f'{shown}<div class="panels">{drawn}</div>')

    def image(self, title: str, image: Image.Image, note: str = "") -> None:
        """An image, held in the page as PNG, with a note beneath it."""
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            image = image.convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        alt = _text(f"{title}. {note}" if note else title)
        # On a phone a wide grid scrolls sideways rather than shrink until its captions cannot be read.
        size = f'width="{image.width}" height="{image.height}" style="min-width:{min(image.width, 560)}px"'
        caption = f"<figcaption>{_text(note)}</figcaption>" if note else ""
        img = f'<img alt="{alt}" {size} src="data:image/png;base64,{data}">'
        self._section(title, f'<figure><div class="scroll">{img}</div>{caption}</figure>')

    def commands(self, title: str, commands: Sequence[tuple[str, str]]) -> None:
        """Commands to copy, each with a comment above it."""
        blocks = "".join(f'<p class="note">{_text(comment)}</p><pre>{_text(c)}</pre>' for comment, c in commands)
        self._section(title, blocks)

    def text(self, title: str, paragraphs: Sequence[str] | str) -> None:
        """Plain paragraphs."""
        paragraphs = [paragraphs] if isinstance(paragraphs, str) else paragraphs
        self._section(title, "".join(f"<p>{_text(paragraph)}</p>" for paragraph in paragraphs))

    def folded(self, title: str, text: str, opened: bool = False) -> None:
        """A long text, its lines as they are, under a title that opens and closes it."""
        tag = "<details open>" if opened else "<details>"
        self._sections.append(f"<section>{tag}<summary>{_text(title)}</summary><pre>{_text(text)}</pre></details></section>")

    def html(self) -> str:
        """The whole page."""
        refresh = f'<meta http-equiv="refresh" content="{self.refresh_seconds}">\n' if self.refresh_seconds else ""
        subtitle = f'<p class="subtitle">{_text(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{refresh}'
            # The browser itself then refuses whatever would leave the page.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
            f"<title>{_text(self.title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
            f"<header><h1>{_text(self.title)}</h1>{subtitle}</header>\n" + "\n".join(self._body()) + "\n</main></body></html>\n"
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the page to ``path``, atomically."""
        with atomic_file(path) as file:
            file.write(self.html().encode("utf-8", "replace"))  # file names may bring lone surrogates

    def _section(self, title: str, body: str, kind: str = "") -> None:
        heading = f"<h2>{_text(title)}</h2>" if title else ""
        kind = f' class="{kind}"' if kind else ""
        self._sections.append(f"<section{kind}>{heading}{body}</section>")

    def _body(self) -> Iterator[str]:
        for half, sections in groupby(self._sections, lambda section: section.startswith('<section class="half">')):
            beside = list(sections)
            yield from (['<div class="halves">', *beside, "</div>"] if half else beside)


def _text(value: object) -> str:
    """A value as escaped text: whole numbers with thousands separated, other numbers to four digits."""
    if isinstance(value, bool | np.bool_):
        value = "yes" if value else "no"
    elif value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        value = "–"
    elif isinstance(value, int | np.integer):
        value = f"{value:,}"
    elif isinstance(value, float | np.floating):
        value = f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return html.escape(str(value))


# --------------------------------------------------------------------------------------------------- the chart


def read_metrics(path: str | os.PathLike) -> dict[str, tuple[list[float], list[float]]]:
    """Lightning's CSV log as curves: metric -> (batches trained, values), without the blanks.

    Steps are counted from 0 there. A last line that is still being written is left out; no file is no curves.
    """
    curves: dict[str, tuple[list[float], list[float]]] = {}
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


def _chart(title: str, series: Series, x_label: str, y_label: str, log_y: bool, smooth: int) -> str:
    """The SVG and its legend. Lines are drawn in a 0..1000 square that stretches with the page; text does not."""
    kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    legend = []
    for number, (name, (x, y)) in enumerate(series.items()):
        x, y = np.asarray(x, dtype=np.float64).ravel(), np.asarray(y, dtype=np.float64).ravel()
        if len(x) != len(y):
            raise ValueError(f"series {name!r} of curve {title!r} has {len(x)} x values and {len(y)} y values")
        # Beyond 1e300 the width of an axis itself would overflow.
        shown = (np.abs(x) < 1e300) & (np.abs(y) < 1e300) & ((y > 0) if log_y else True)
        kept[name] = x[shown], y[shown]
        last = f"<b>{_text(float(y[shown][-1]))}</b>" if shown.any() else "no data"
        lost = int(len(shown) - shown.sum())
        why = "not finite or not positive" if log_y else "not finite"
        lost_note = f" <small>({lost:,} {why}, left out)</small>" if lost else ""
        legend.append(f'<li><i class="s{number % 6}"></i>{_text(name)} {last}{lost_note}</li>')
    legend_html = f'<ul class="legend">{"".join(legend)}</ul>'
    if not any(len(x) for x, _ in kept.values()):
        return f'{legend_html}<p class="note">Nothing to draw yet.</p>'

    all_x, all_y = (np.concatenate([pair[axis] for pair in kept.values()]) for axis in (0, 1))
    x_low, x_high = _widen(all_x.min(), all_x.max(), 0.0)
    if log_y:
        y_low, y_high = _widen(math.log10(all_y.min()), math.log10(all_y.max()), 0.04)
        y_ticks = _log_ticks(y_low, y_high)
    else:
        y_low, y_high = _widen(all_y.min(), all_y.max(), 0.04)
        y_low = 0.0 if all_y.min() >= 0 > y_low else y_low
        y_ticks = _ticks(y_low, y_high)
    marks = []
    for value, label in y_ticks:
        at = f"{100 * (y_high - value) / (y_high - y_low):.2f}%"
        marks.append(f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
        marks.append(f'<text x="0" y="{at}" dx="-8" dy="4" text-anchor="end">{label}</text>')
    for value, label in _ticks(x_low, x_high):
        at = f"{100 * (value - x_low) / (x_high - x_low):.2f}%"
        marks.append(f'<text x="{at}" y="100%" dy="18" text-anchor="middle">{label}</text>')

    def line(x: np.ndarray, y: np.ndarray, kind: str) -> str:
        chosen = _thin(y)
        height = np.log10(y[chosen]) if log_y else y[chosen]
        across, down = 1000 * (x[chosen] - x_low) / (x_high - x_low), 1000 * (y_high - height) / (y_high - y_low)
        points = " ".join(f"{a:.1f},{d:.1f}" for a, d in zip(across, down, strict=True))
        kind, points = (kind, points) if len(chosen) > 1 else (f"{kind} dot", f"{points} {points}")
        return f'<polyline class="{kind}" points="{points}"/>'

    lines = []
    for number, (x, y) in enumerate(kept.values()):
        if len(x) and 1 < smooth < len(x):
            ones = np.ones(smooth)
            mean = np.convolve(y, ones, "same") / np.convolve(np.ones(len(y)), ones, "same")
            lines += [line(x, y, f"s{number % 6} faint"), line(x, mean, f"s{number % 6}")]
        elif len(x):
            lines.append(line(x, y, f"s{number % 6}"))
    name = _text(f"{title}: {y_label} over {x_label}")
    scale = " (log scale)" if log_y else ""
    return (
        f'<p class="label">{_text(y_label)}{scale}</p><div class="plot"><svg role="img" aria-label="{name}">'
        f'{"".join(marks)}<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>'
        f'<line class="axis" x1="0" x2="0" y1="0" y2="100%"/>'
        f'<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none">{"".join(lines)}</svg>'
        f'</svg></div><p class="label right">{_text(x_label)}</p>{legend_html}'
    )


def _panel(name: str, heights: np.ndarray, low: float, high: float, line: Sequence[float] | None, top: float) -> str:
    """One histogram, in a 0..1000 square that stretches."""
    edges = np.linspace(0, 1000, len(heights) + 1)
    steps = "".join(f"V{1000 - 950 * h / top:.1f}H{x:.1f}" for h, x in zip(heights, edges[1:], strict=True))
    shape = f'<path d="M0 1000{steps}V1000Z"/>'
    if line is not None:
        across = np.linspace(0, 1000, len(line))
        points = " ".join(f"{x:.1f},{1000 - 950 * y / top:.1f}" for x, y in zip(across, line, strict=True))
        shape += f'<polyline class="s1" points="{points}"/>'
    ticks = [
        f'<text x="{100 * (value - low) / (high - low):.2f}%" y="100%" dy="15" text-anchor="middle">{label}</text>'
        for value, label in _ticks(low, high)
    ]
    return (
        f'<figure><figcaption>{_text(name)}</figcaption><div class="panel"><svg role="img" aria-label="{_text(name)}">'
        f'<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none">{shape}</svg>'
        f'<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>{"".join(ticks)}</svg></div></figure>'
    )


def _widen(low: float, high: float, share: float) -> tuple[float, float]:
    """An axis range that is never empty, with a share of it added at both ends."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low - share * (high - low), high + share * (high - low)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About five round values inside [low, high], with short labels (12.5k, 3M)."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / raw)))
    values = [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    largest = max((abs(value) for value in values), default=0.0)
    scale, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if s <= largest < 1e12), (1.0, ""))
    scale, unit = (1.0, "") if largest < 1e4 else (scale, unit)
    return [(value, f"{value / scale:.10g}{unit if value else ''}") for value in values]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks for [low, high], both log10: round values within a decade or two, else at most about eight decades."""
    if high - low < 1:
        return [(math.log10(value), label) for value, label in _ticks(10.0**low, 10.0**high) if value > 0]
    factors, stride = ((1, 2, 5) if high - low < 2.5 else (1,)), math.ceil((high - low) / 7)
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [(k + math.log10(f), f"{f}e{k}") for k in decades if k % stride == 0 for f in factors]
    return [(at, f"{float(label):g}") for at, label in ticks if low <= at <= high]


def _thin(y: np.ndarray) -> np.ndarray:
    """Indices of at most MAX_CURVE_POINTS points: both ends, and the lowest and highest of each stretch."""
    if len(y) <= MAX_CURVE_POINTS:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), MAX_CURVE_POINTS // 2, dtype=int)
    stretches = list(pairwise(edges))
    low = [a + int(y[a:b].argmin()) for a, b in stretches]
    high = [a + int(y[a:b].argmax()) for a, b in stretches]
    return np.unique([0, len(y) - 1, *low, *high])


STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --ink: #1d222b; --soft: #5c6675; --line: #dfe3e9;
  --code: #f0f2f5; --s0: #2563c9; --s1: #d9691c; --s2: #16875a; --s3: #a13bb3; --s4: #b58900; --s5: #c92a4b; }
@media (prefers-color-scheme: dark) { :root { --page: #12151a; --card: #1b1f27; --ink: #e7eaf0; --soft: #9aa4b4;
  --line: #313844; --code: #12161c; --s0: #6ea8ff; --s1: #ff9d5c; --s2: #4fcf9a; --s3: #d892ea; --s4: #e3c04d;
  --s5: #ff7d97; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: clamp(16px, 4vw, 44px) clamp(12px, 3vw, 28px) 56px; }
header { margin-bottom: 24px; }
h1 { margin: 0; font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; letter-spacing: -.015em; }
h2 { margin: 0 0 12px; font-size: 1.1rem; }
summary { font-size: 1.1rem; font-weight: 700; cursor: pointer; }
details[open] > summary { margin-bottom: 12px; }
p { margin: 0 0 10px; overflow-wrap: anywhere; }
.subtitle { margin: 6px 0 0; color: var(--soft); }
section, .figures > div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
section { margin: 16px 0; padding: clamp(14px, 3vw, 24px); }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); gap: 16px; margin: 16px 0; }
.halves > section { margin: 0; min-width: 0; }
.halves .plot { height: 210px; }
section > :last-child, section figure > :last-child { margin-bottom: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(150px, 44%), 1fr)); gap: 12px;
  margin: 16px 0; }
.figures > div { display: flex; flex-direction: column; padding: 13px 14px; }
.figures dd { margin: 0; font-size: 1.4rem; font-weight: 650; line-height: 1.25; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.figures dt, .note, .label, figcaption { color: var(--soft); font-size: .875rem; }
.note { margin-bottom: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { margin: 0 0 14px; padding: 10px 14px; border-radius: 8px; background: var(--code); white-space: pre-wrap;
  overflow-wrap: anywhere;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto 10px; border-radius: 8px; background: #fff; }
.plot { height: 290px; padding: 8px 16px 26px 58px; }
.plot > svg { display: block; width: 100%; height: 100%; overflow: visible; }
.plot text, .panel text { fill: var(--soft); font-size: 12px; }
.plot line { stroke: var(--line); }
.plot line.axis, .panel line.axis { stroke: var(--soft); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr)); gap: 14px 20px; }
.panel { height: 110px; padding: 4px 8px 20px; }
.panel > svg { display: block; width: 100%; height: 100%; overflow: visible; }
.panel path { fill: var(--s0); opacity: .75; }
polyline { fill: none; stroke: currentColor; stroke-width: 2px; stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke; }
polyline.faint { opacity: .28; stroke-width: 1.2px; }
polyline.dot { stroke-width: 8px; }
.label { margin: 0; }
.right { text-align: right; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 8px 0; padding: 0; list-style: none;
  font-size: .9rem; }
.legend i { display: inline-block; width: 18px; height: 3px; margin-right: 7px; border-radius: 2px;
  vertical-align: middle; background: currentColor; }
.legend small { color: var(--soft); }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); }
.s3 { color: var(--s3); } .s4 { color: var(--s4); } .s5 { color: var(--s5); }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
