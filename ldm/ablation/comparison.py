"""The paired comparison of two trainings: how their errors differ at each level of noise, how certain that is, and when it is
clear enough to stop.

Both are measured on the same validation samples with the same noise, so that what makes a sample hard cancels. A difference is
ln(error of the second / error of the first): 0 where they are equal, about −0.05 where the second's error is 5% smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

from ldm.errors import UsageError

LEVEL = 0.95  # of an interval
# levels of noise, and validation samples of each
MOST_LEVELS, LEAST_PER_LEVEL, LEAST_SAMPLES = 10, 8, 16
# successive looks that must agree before a training stops
AGREEING = 2


@dataclass(frozen=True)
class Estimate:
    """A difference with its standard error, whose uncertainty has so many degrees of freedom."""

    value: float
    error: float
    freedom: float = math.inf

    @classmethod
    def over_seeds(cls, seeds: Sequence[Estimate]) -> Estimate:
        """The mean of the same difference at several seeds: of one seed, that itself.

        Its error has two parts: how the seeds differ, and how validation samples differ. The latter are the same ones for all
        seeds, so that more seeds do not lessen it. Degrees of freedom are those of the seeds.
        """
        if len(seeds) == 1:
            return seeds[0]
        values = np.array([seed.value for seed in seeds])
        by_seeds = float(values.std(ddof=1)) / math.sqrt(len(seeds))
        by_samples = float(np.mean([seed.error for seed in seeds]))
        return cls(float(values.mean()), math.hypot(by_seeds, by_samples), len(seeds) - 1)

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Student's confidence interval."""
        reach = float(special.stdtrit(self.freedom, (1 + level) / 2)) * self.error
        return self.value - reach, self.value + reach


class Difference(NamedTuple):
    """How the errors of two trainings differ, ln(second / first): means over validation samples."""

    overall: Estimate
    """Of all samples: the ratio of geometric means, in which no level of noise and no hard sample outweighs the others."""
    levels: list[Estimate]
    """At each level of noise."""


class NoiseLevels:
    """Validation samples by their level of noise, within which their differences vary at random."""

    def __init__(self, places: np.ndarray):
        """
        Args:
            places: of each sample in the range of noise, (N,) in [0, 1), spread evenly.

        Raises:
            UsageError: for too few samples.
        """
        require_enough(len(places))
        self.count = min(MOST_LEVELS, len(places) // LEAST_PER_LEVEL)
        numbers = np.minimum((places * self.count).astype(int), self.count - 1)
        self._rows = [np.flatnonzero(numbers == number) for number in range(self.count)]

    def difference(self, first: np.ndarray, second: np.ndarray) -> Difference:
        """Of the errors (N,) of two trainings on the same samples."""
        by_level = [np.log(second[rows] / first[rows]) for rows in self._rows]
        sizes, means, spreads = (np.array([of(level) for level in by_level]) for of in (len, np.mean, _spread))
        levels = [
            Estimate(float(mean), float(spread / size**0.5), float(size - 1))
            for size, mean, spread in zip(sizes, means, spreads, strict=True)
        ]
        total = sizes.sum()
        error = float(np.sqrt((sizes * spreads**2).sum())) / total
        return Difference(Estimate(float((sizes * means).sum() / total), error, float(total - self.count)), levels)

    def over_seeds(self, firsts: Sequence[np.ndarray], seconds: Sequence[np.ndarray]) -> Difference:
        """Of the errors of two trainings, (N,) of each seed."""
        seeds = [self.difference(first, second) for first, second in zip(firsts, seconds, strict=True)]
        by_level = zip(*(seed.levels for seed in seeds), strict=True)
        return Difference(
            Estimate.over_seeds([seed.overall for seed in seeds]), [Estimate.over_seeds([*level]) for level in by_level]
        )


def require_enough(samples: int) -> None:
    """Raise :class:`UsageError` for too few validation samples."""
    if samples < LEAST_SAMPLES:
        raise UsageError(
            f"{samples} validation samples are too few to compare trainings with; {LEAST_SAMPLES} are needed, and some "
            "hundreds are better"
        )


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1))


@dataclass(frozen=True)
class StopRule:
    """When the answer of a comparison is clear: at :data:`AGREEING` looks in a row the interval lies beyond the margin, and the
    difference does not shrink from one to the next, as that of a recipe that only starts faster does.

    Whoever looks ten times finds a difference in nothing more often than once in twenty. So the risk of an error is shared
    between all looks of all comparisons (Bonferroni): the probability that any of them calls a difference clear that is not
    larger than the margin is at most 1 − level, however the looks depend on one another. The usual sequential designs
    (O'Brien & Fleming 1979) lose less, but assume that each look adds new samples; here the samples are the same ones, and
    what they measure has changed.

    Attributes:
        looks: of each comparison, at most.
        comparisons: of variants with the baseline.
        margin: the smallest relative difference that matters. Two seeds of one recipe differ too, which the interval of a
            single seed does not contain.
    """

    looks: int
    comparisons: int
    margin: float = 0.01
    level: float = LEVEL

    @property
    def level_of_a_look(self) -> float:
        """The level of the interval that decides."""
        return 1 - (1 - self.level) / (self.looks * self.comparisons)

    def verdict(self, estimate: Estimate) -> int:
        """−1: the second's error is smaller, 1: it is larger, 0: neither is clear."""
        low, high = estimate.interval(self.level_of_a_look)
        matters = math.log1p(self.margin)
        return -1 if high < -matters else 1 if low > matters else 0

    def is_clear(self, estimates: Sequence[Estimate]) -> bool:
        """Whether a comparison has its answer after these looks."""
        if len(estimates) < AGREEING:
            return False
        last = estimates[-AGREEING:]
        return {self.verdict(estimate) for estimate in last} in ({-1}, {1}) and not any(map(_shrinks, last, last[1:]))


def _shrinks(before: Estimate, after: Estimate) -> bool:
    """Whether a difference, of the same sign, is certainly smaller than it was."""
    least_before = min(map(abs, before.interval()))
    most_after = max(map(abs, after.interval()))
    return most_after < least_before


def at_seconds(seconds: Sequence[float], errors: Sequence[np.ndarray], when: float) -> np.ndarray | None:
    """Errors (N,) after so many seconds, interpolated between looks; None before the first look or after the last one."""
    if not seconds or not seconds[0] <= when <= seconds[-1]:
        return None
    after = min(int(np.searchsorted(seconds, when)), len(seconds) - 1)
    if seconds[after] == when or after == 0:
        return errors[after]
    share = (when - seconds[after - 1]) / (seconds[after] - seconds[after - 1])
    return (1 - share) * errors[after - 1] + share * errors[after]
