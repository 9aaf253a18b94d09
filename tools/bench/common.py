"""What the benchmarks share. Imported before torch: ``import ldm`` sets how OpenMP's threads wait, for all that is compared."""

import ldm  # noqa: F401, I001 - first

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import diffusers
import torch
import transformers

CONFIGS = Path(__file__).parents[2] / "configs"
T = TypeVar("T")


def bench_parser(doc: str | None, quick: str, allow_abbrev: bool = True) -> argparse.ArgumentParser:
    """A parser described by the first line of a docstring, with ``--quick`` and its help."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0], allow_abbrev=allow_abbrev)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def quieten() -> None:
    """Silence warnings, logs and progress bars of the libraries."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def now(device: torch.device | str) -> float:
    """Seconds, once the device has finished its queue."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: torch.device | str, times: int = 1) -> float:
    """Mean seconds of ``work`` over so many times."""
    began = now(device)
    for _ in range(times):
        work()
    return (now(device) - began) / times


def in_turn(keys: Sequence[T], turn: int) -> Sequence[T]:
    """``keys`` in an even round, and backwards in an odd one, so that a drift of the machine favours none."""
    return keys if turn % 2 == 0 else keys[::-1]


def time_in_turn(timed: Mapping[T, Callable[[], float]], rounds: int, unit: str = "s") -> dict[T, list[float]]:
    """The seconds that each of ``timed`` returns in every round, which are printed, too."""
    seconds: dict[T, list[float]] = {key: [] for key in timed}
    for turn in range(rounds):
        for key in in_turn([*timed], turn):
            seconds[key].append(timed[key]())
        names = [key if isinstance(key, str) else " ".join(filter(None, map(str, cast(tuple, key)))) for key in timed]
        last = {name: round(values[-1], 3) for name, values in zip(names, seconds.values(), strict=True)}
        print(f"round {turn + 1}, {unit}:", last, flush=True)
    return seconds


def print_ratios(ratios: Mapping[str, Sequence[float]], digits: int = 2) -> None:
    """``ratio NAME MEDIAN MIN MAX`` for each."""
    for name, values in sorted(ratios.items()):
        print(f"ratio {name} {statistics.median(values):.{digits}f} {min(values):.{digits}f} {max(values):.{digits}f}")
