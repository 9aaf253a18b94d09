"""One line that says what runs, how far it is, its figures and the time left: live on a terminal, now and then in a log."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

LOG_EVERY_SECONDS = 20.0
# of work that a moving rate looks back on
WINDOW_SECONDS = 30.0

Figures = Mapping[str, float | str]


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Lap(NamedTuple):
    """A piece of work: its seconds, the steps and images in them, and how many of the seconds were spent waiting for data."""

    seconds: float
    steps: int
    images: int
    waited: float


class Pace:
    """How fast work goes, over its last :data:`WINDOW_SECONDS`; pauses count for the time left alone."""

    def __init__(self) -> None:
        self._laps: deque[Lap] = deque()
        self._sum = Lap(0.0, 0, 0, 0.0)
        self._steps, self._paused = 0, 0.0

    def add(self, lap: Lap, pause: float = 0.0) -> None:
        """Count a piece of work, and the seconds that stood still before it."""
        self._steps += lap.steps
        self._paused += pause
        self._laps.append(lap)
        self._sum = Lap(*(one + other for one, other in zip(self._sum, lap, strict=True)))
        while self._sum.seconds - self._laps[0].seconds >= WINDOW_SECONDS:
            self._sum = Lap(*(one - other for one, other in zip(self._sum, self._laps.popleft(), strict=True)))

    @property
    def images_per_second(self) -> float | None:
        return self._sum.images / self._sum.seconds if self._sum.seconds > 0 else None

    @property
    def step_seconds(self) -> float | None:
        return self._sum.seconds / self._sum.steps if self._sum.steps else None

    @property
    def wait_share(self) -> float | None:
        """Of the time, 0 to 1."""
        return max(self._sum.waited / self._sum.seconds, 0.0) if self._sum.seconds > 0 else None

    def left(self, steps: int) -> float | None:
        """Seconds that so many more steps take, with pauses as frequent and as long as they were so far."""
        if self.step_seconds is None:
            return None
        return steps * (self.step_seconds + self._paused / self._steps)


class Progress:
    """A context manager; :meth:`update` is cheap enough to be called at every step."""

    def __init__(self, stage: str, total: int | None = None, quiet: bool = False):
        """
        Args:
            stage: what runs, for example ``stage 1 of 2: autoencoder``.
            total: steps there are, where known.
            quiet: say nothing (other ranks).
        """
        self.stage, self.total, self.quiet = stage, total, quiet
        self.console = Console(stderr=True)
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        self._logged = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first steps were through, and how many these were
        if self.console.is_terminal and not self.quiet:
            self._bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                # the only one that may be cut
                TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                console=self.console,
                refresh_per_second=4,
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=self.total, left="", figures="")
        return self

    def update(self, done: int, total: int | None = None, figures: Figures | None = None, left: float | None = None) -> None:
        """Say that ``done`` steps are through, with the latest ``figures``.

        ``left`` is the seconds to the end, where the caller knows better than the steps so far tell.
        """
        if self.quiet:
            return
        self.total = total or self.total
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        began, before = self._first
        if left is None and self.total and done > before:
            left = (now - began) / (done - before) * (self.total - done)
        said = "" if left is None else f"left {duration(left)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, figures=_format(figures), left=said)
        elif now - self._logged >= LOG_EVERY_SECONDS or done == self.total:
            self._logged = now
            of = f"/{self.total}" if self.total else ""
            parts = (f"{self.stage}: {done}{of}", _format(figures), said)
            print(" ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def _format(figures: Figures | None) -> str:
    return " ".join(
        f"{name} {value}" if isinstance(value, str) else f"{name} {value:.4g}" for name, value in (figures or {}).items()
    )
