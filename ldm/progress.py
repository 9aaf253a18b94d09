"""One line that says what runs, how far it is, its figures and the time left: live on a terminal, now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LOG_EVERY_SECONDS = 20.0


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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
        self._start = self._logged = time.monotonic()
        self._first_done: int | None = None
        if self.console.is_terminal and not self.quiet:
            self._bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=4,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=self.total, figures="")
        return self

    def update(self, done: int, total: int | None = None, figures: dict[str, float] | None = None) -> None:
        """Say that ``done`` steps are through, with the latest ``figures``."""
        if self.quiet:
            return
        self.total = total or self.total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, figures=_format(figures))
            return
        now = time.monotonic()
        self._first_done = done if self._first_done is None else self._first_done
        if now - self._logged >= LOG_EVERY_SECONDS or done == self.total:
            self._logged = now
            left = ""
            if self.total and done > self._first_done:
                left = f" left {duration((now - self._start) / (done - self._first_done) * (self.total - done))}"
            of = f"/{self.total}" if self.total else ""
            print(f"{self.stage}: {done}{of} {_format(figures)}{left}", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def _format(figures: dict[str, float] | None) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in (figures or {}).items())
