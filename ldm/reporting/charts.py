"""Layout of line charts and histograms; templates/charts.html writes them as SVG.

Lines and bars have coordinates from 0 to 1000, y downwards, which stretch with the page. Ticks are placed in percent, so that
their text does not stretch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
Heights = Sequence[float] | np.ndarray
#: the lower and the upper end of an interval at each point of a series
Bands = Mapping[str, tuple[Heights, Heights]]

SIDE = 1000.0
MAX_CURVE_POINTS = 600
# beyond this the range of an axis would overflow
LARGEST = 1e300
# leaves a margin below the caption
TALLEST_BAR = 950.0


class Tick(NamedTuple):
    """A label ``at`` percent of an axis, from the left or the top."""

    at: float
    label: str


class Line(NamedTuple):
    """An SVG polyline; ``style`` is empty, ``faint`` (below its mean) or ``dot`` (a single point)."""

    points: str
    series: int
    style: str = ""


class LegendEntry(NamedTuple):
    """A series with its last value (None without data) and the number of points that cannot be shown."""

    name: str
    last: float | None
    omitted: int


class LineChart(NamedTuple):
    """A line chart; without lines where no series has a point to show. ``bands`` are polygons behind them."""

    legend: list[LegendEntry]
    bands: list[Line]
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


class Histogram(NamedTuple):
    """The outline of the bars as an SVG path, and the points of the line over them."""

    name: str
    path: str
    line: str | None
    ticks: list[Tick]


def line_chart(
    title: str,
    series: Series,
    log_y: bool = False,
    smooth: int = 0,
    dots: Collection[str] = (),
    bands: Bands | None = None,
) -> LineChart:
    """Lay out named (x, y) series.

    Points that are not finite (with ``log_y``: not positive) are omitted and counted in the legend. Longer series are reduced
    to :data:`MAX_CURVE_POINTS` points that include all extremes. ``smooth`` > 1 draws the centred mean over that many points
    above the faint curve. Of the series named in ``dots`` the points are not joined. ``bands`` are
    intervals of some of the series, by name.

    Raises:
        ValueError: where x and y differ in length.
    """
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    legend = []
    for name, (xs, ys) in series.items():
        x, y = np.asarray(xs, dtype=np.float64).ravel(), np.asarray(ys, dtype=np.float64).ravel()
        if len(x) != len(y):
            raise ValueError(f"series {name!r} of curve {title!r} has {len(x)} x values and {len(y)} y values")
        usable = _can_be_shown(x, False) & _can_be_shown(y, log_y)
        shown.append((x[usable], y[usable]))
        last = float(y[usable][-1]) if usable.any() else None
        legend.append(LegendEntry(name, last, int(len(usable) - usable.sum())))
    if not any(len(x) for x, _ in shown):
        return LineChart(legend, [], [], [], [])

    shown_bands = []
    for number, (name, (xs, _)) in enumerate(series.items()):
        if name in (bands or {}):
            x, low, high = (np.asarray(values, np.float64).ravel() for values in (xs, *(bands or {})[name]))
            usable = _can_be_shown(x, False) & _can_be_shown(low, log_y) & _can_be_shown(high, log_y)
            shown_bands.append((number, x[usable], low[usable], high[usable]))

    all_x = np.concatenate([x for x, _ in shown])
    all_y = np.concatenate([*(y for _, y in shown), *(end for _, _, *ends in shown_bands for end in ends)])
    x_low, x_high = _widen(all_x.min(), all_x.max(), 0.0)
    if log_y:
        y_low, y_high = _widen(math.log10(all_y.min()), math.log10(all_y.max()), 0.04)
    else:
        y_low, y_high = _widen(all_y.min(), all_y.max(), 0.04)
        y_low = 0.0 if all_y.min() >= 0 > y_low else y_low

    def place(x: np.ndarray, y: np.ndarray) -> str:
        height = np.log10(y) if log_y else y
        return _points(SIDE * (x - x_low) / (x_high - x_low), SIDE * (y_high - height) / (y_high - y_low))

    def line(x: np.ndarray, y: np.ndarray, number: int, style: str = "") -> Line:
        kept = thin(y)
        points = place(x[kept], y[kept])
        return Line(points, number, style) if len(kept) > 1 else Line(f"{points} {points}", number, f"{style} dot".strip())

    polygons = [
        Line(place(np.concatenate([x, x[::-1]]), np.concatenate([low, high[::-1]])), number)
        for number, x, low, high in shown_bands
    ]
    lines = []
    for number, ((x, y), name) in enumerate(zip(shown, series, strict=True)):
        if name in dots:
            lines += [line(x[at : at + 1], y[at : at + 1], number) for at in thin(y)]
        elif len(x) and 1 < smooth < len(x):
            ones = np.ones(smooth)
            mean = np.convolve(y, ones, "same") / np.convolve(np.ones(len(y)), ones, "same")
            lines += [line(x, y, number, "faint"), line(x, mean, number)]
        elif len(x):
            lines.append(line(x, y, number))
    x_ticks = [Tick(100 * (value - x_low) / (x_high - x_low), label) for value, label in ticks(x_low, x_high)]
    y_values = log_ticks(y_low, y_high) if log_y else ticks(y_low, y_high)
    return LineChart(
        legend, polygons, lines, x_ticks, [Tick(100 * (y_high - at) / (y_high - y_low), label) for at, label in y_values]
    )


def histograms(
    panels: Mapping[str, Heights],
    low: float,
    high: float,
    line: Heights | None = None,
) -> list[Histogram]:
    """Lay out one histogram per panel on a common scale; the bars of a panel evenly divide ``low`` to ``high``.

    ``line`` has evenly spaced points over the same range. Heights that are negative or not finite count as 0.
    """
    heights = {name: np.nan_to_num(np.maximum(values, 0), posinf=0) for name, values in panels.items()}
    over = np.asarray([] if line is None else line, dtype=np.float64)
    top = max([1 / LARGEST, *(float(values.max(initial=0)) for values in heights.values()), *over.tolist()])
    scale = [Tick(100 * (value - low) / (high - low), label) for value, label in ticks(low, high)]
    over_points = None if line is None else _points(np.linspace(0, SIDE, len(over)), SIDE - TALLEST_BAR * over / top)
    laid_out = []
    for name, values in heights.items():
        edges = np.linspace(0, SIDE, len(values) + 1)[1:]
        steps = "".join(f"V{SIDE - TALLEST_BAR * h / top:.1f}H{x:.1f}" for h, x in zip(values, edges, strict=True))
        laid_out.append(Histogram(name, f"M0 {SIDE:g}{steps}V{SIDE:g}Z", over_points, scale))
    return laid_out


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{across:.1f},{down:.1f}" for across, down in zip(x, y, strict=True))


def _can_be_shown(y: np.ndarray, log_y: bool) -> np.ndarray:
    return (np.abs(y) < LARGEST) & ((y > 0) if log_y else True)


def _widen(low: float, high: float, share: float) -> tuple[float, float]:
    """A non-empty axis range, extended by a fraction ``share`` at both ends."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low - share * (high - low), high + share * (high - low)


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About five round values inside [low, high], with short labels (12.5k, 3M)."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / raw)))
    values = [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    largest = max((abs(value) for value in values), default=0.0)
    scale, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if s <= largest < 1e12), (1.0, ""))
    scale, unit = (1.0, "") if largest < 1e4 else (scale, unit)
    return [(value, f"{value / scale:.10g}{unit if value else ''}") for value in values]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks for [low, high] in log10: round values for up to 2.5 decades, else at most eight powers of ten."""
    if high - low < 1:
        return [(math.log10(value), label) for value, label in ticks(10.0**low, 10.0**high) if value > 0]
    factors, stride = ((1, 2, 5) if high - low < 2.5 else (1,)), math.ceil((high - low) / 7)
    decades = range(math.floor(low), math.ceil(high) + 1)
    values = [(k + math.log10(f), f"{f}e{k}") for k in decades if k % stride == 0 for f in factors]
    return [(at, f"{float(label):g}") for at, label in values if low <= at <= high]


def thin(y: np.ndarray) -> np.ndarray:
    """Indices of at most MAX_CURVE_POINTS points: both ends, and minimum and maximum of equal intervals."""
    if len(y) <= MAX_CURVE_POINTS:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), MAX_CURVE_POINTS // 2, dtype=int)
    intervals = list(pairwise(edges))
    low = [a + int(y[a:b].argmin()) for a, b in intervals]
    high = [a + int(y[a:b].argmax()) for a, b in intervals]
    return np.unique([0, len(y) - 1, *low, *high])
