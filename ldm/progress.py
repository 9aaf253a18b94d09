"""A progress line with metrics and the time left: a bar on a terminal, a line of text every 20 seconds in a log."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from operator import add, sub
from types import TracebackType
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from ldm.terminal import printable, say

LOG_EVERY_SECONDS = 20.0
WINDOW_SECONDS = 30.0  # of :class:`Pace`

Metrics = Mapping[str, float | str]


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``; a dash if they are not finite."""
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Lap(NamedTuple):
    """Some training: its seconds, the steps and images in them, and how many of the seconds were spent waiting for data."""

    seconds: float
    steps: int
    images: int
    waited: float


class Pace:
    """Speed of training over the last :data:`WINDOW_SECONDS`. Pauses (validation, checkpoints) only count for the time left."""

    def __init__(self) -> None:
        self._totals = deque([Lap(0.0, 0, 0, 0.0)])  # sums since the start, at the end of each lap of the window
        self._paused = 0.0

    def add(self, lap: Lap, pause: float = 0.0) -> None:
        """Count a lap, and the seconds of a pause before it."""
        self._paused += pause
        self._totals.append(Lap._make(map(add, self._totals[-1], lap)))
        while self._totals[-1].seconds - self._totals[1].seconds >= WINDOW_SECONDS:
            self._totals.popleft()

    def _window(self) -> Lap:
        return Lap._make(map(sub, self._totals[-1], self._totals[0]))

    @property
    def images_per_second(self) -> float | None:
        window = self._window()
        return window.images / window.seconds if window.seconds > 0 else None

    @property
    def step_seconds(self) -> float | None:
        window = self._window()
        return window.seconds / window.steps if window.steps else None

    @property
    def wait_share(self) -> float | None:
        """Fraction of the time spent waiting for data, 0 to 1."""
        window = self._window()
        return max(window.waited / window.seconds, 0.0) if window.seconds > 0 else None

    def left(self, steps: int) -> float | None:
        """Seconds for this many more steps, if pauses stay as frequent and as long as they were so far."""
        if self.step_seconds is None:
            return None
        return steps * (self.step_seconds + self._paused / self._totals[-1].steps)


class Progress:
    """A context manager that shows how far a task is. :meth:`update` is cheap enough to be called at every step."""

    def __init__(self, stage: str, total: int | None = None, quiet: bool = False):
        """
        Args:
            stage: name of the task, such as ``stage 1 of 2: autoencoder``.
            total: number of steps, where known.
            quiet: print nothing (ranks other than 0).
        """
        self.stage, self.total, self.quiet, self._logged = printable(stage), total, quiet, time.monotonic()
        console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            # the only column that may be truncated
            TextColumn("{task.fields[metrics]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            refresh_per_second=4,
            expand=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task(self.stage, total=total, left="", metrics="")
        self._first: tuple[float, int] | None = None  # time and steps at the first update: a resumed task does not begin at 0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def update(self, done: int, total: int | None = None, metrics: Metrics | None = None, left: float | None = None) -> None:
        """Show that ``done`` steps are finished, with the latest ``metrics``.

        ``left`` is the number of seconds to the end, where the caller has a better estimate than the steps so far give.
        """
        if self.quiet:
            return
        now, self.total = time.monotonic(), total or self.total
        self._first = began, before = self._first or (now, done)
        if left is None and self.total and done > before:
            left = (now - began) / (done - before) * (self.total - done)
        shown, time_left = _format(metrics), "" if left is None else f"left {duration(left)}"
        self._bar.update(self._task, completed=done, total=self.total, metrics=shown, left=time_left)
        if self._bar.disable and (now - self._logged >= LOG_EVERY_SECONDS or done == self.total):
            self._logged = now
            parts = (f"{self.stage}: {done}{f'/{self.total}' if self.total else ''}", shown, time_left)
            say(" ".join(part for part in parts if part), sys.stderr)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.stop()


def _format(metrics: Metrics | None) -> str:
    return " ".join(
        f"{name} {printable(value)}" if isinstance(value, str) else f"{name} {value:.4g}"
        for name, value in (metrics or {}).items()
    )
