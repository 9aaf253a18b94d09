"""Mean and variance per channel, exact over a whole set: gathered in parts, merged in any grouping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """The statistics of values per channel, in float64.

    Attributes:
        count: values per channel.
        mean: (C,).
        squares: (C,), the sum of squared distances from the mean (M2 of Chan, Golub, LeVeque 1979).
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, mean: np.ndarray, std: np.ndarray | None = None) -> Moments:
        """Of samples from Gaussians with these means and standard deviations (n, C, h, w); None: of the means themselves.

        E[z] = E[mean]; Var[z] = Var[mean] + E[std²].
        """
        mean = mean.astype(np.float64)
        count, average = mean.size // mean.shape[1], mean.mean((0, 2, 3))
        squares = ((mean - average[:, None, None]) ** 2).sum((0, 2, 3))
        if std is not None:
            squares += (std.astype(np.float64) ** 2).sum((0, 2, 3))
        return cls(count, average, squares)

    @classmethod
    def from_statistics(cls, count: int, mean: Sequence[float], std: Sequence[float]) -> Moments:
        """The inverse of :attr:`mean` and :attr:`std`."""
        return cls(count, np.asarray(mean, np.float64), count * np.asarray(std, np.float64) ** 2)

    @classmethod
    def merge(cls, parts: Iterable[Moments]) -> Moments:
        """Of all parts' values together, by pairwise updates, which avoid cancellation."""
        parts = iter(parts)
        total = next(parts)
        for part in parts:
            count = total.count + part.count
            step = part.mean - total.mean
            total = cls(
                count,
                total.mean + step * (part.count / count),
                total.squares + part.squares + step**2 * (total.count * part.count / count),
            )
        return total

    @property
    def std(self) -> np.ndarray:
        """Standard deviation (C,)."""
        return np.sqrt(self.squares / self.count)
