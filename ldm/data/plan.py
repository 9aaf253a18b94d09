"""The order of training samples: a pure function of (shard sizes, seed, position, batch size, ranks). No file is read.

A plan is one endless sequence of draws. In an epoch every sample is drawn exactly once (or as often as its weight says). Epochs
are concatenated, so a batch may span two of them, nothing is dropped or padded, and all ranks take equally many steps whatever
the sizes of the shards. A step of all ranks takes the next ``batch_size * world_size`` draws, rank r the r-th ``batch_size`` of
them. Loader workers take whole batches in turn and deliver them in order, so their number changes nothing.

Shuffling: every epoch permutes the shards, groups them into windows of at least ``window`` samples, and permutes each window. A
set of up to ``window`` samples is thus permuted as a whole; of a larger one no more than a window's shards are open at a time.
Draws before a position are skipped by arithmetic, not by reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import NamedTuple

import numpy as np

from ldm.errors import UsageError

#: samples permuted together: enough to mix well, few enough that a window's shards can stay open or cached
WINDOW = 2**20
#: draws of a sample per epoch
MAX_WEIGHT = 10**6

# purpose of a random stream: part of its seed, so that no two purposes share one
_SHARD_ORDER, _WITHIN_WINDOW, _WITHIN_SHARD = range(3)


class PlannedSample(NamedTuple):
    """One draw of a plan.

    Attributes:
        sample: number of the sample, counted shard by shard in the order of the manifest.
        number: of the draw, counted from the start of training; it seeds everything random about the sample.
    """

    sample: int
    number: int


class Position(NamedTuple):
    """Progress of training: ``consumed`` draws of ``epoch``, over all ranks."""

    epoch: int = 0
    consumed: int = 0


START = Position()


@dataclass(frozen=True)
class Plan:
    """The sequence of draws from shards of these sizes.

    Attributes:
        shard_samples: samples of each shard.
        weights: how often each shard's samples are drawn per epoch (2: twice; 0.5: every other epoch); None: once.
        seed: of the order.
        window: samples permuted together.
    """

    shard_samples: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    seed: int = 0
    window: int = WINDOW

    def __post_init__(self) -> None:
        if self.weights is not None and len(self.weights) != len(self.shard_samples):
            raise ValueError("a plan needs one weight for each shard")
        if wrong := [weight for weight in self.weights or () if not 0 <= weight <= MAX_WEIGHT]:  # NaN too
            raise UsageError(f"a weight of the training data is {wrong[0]}; give 0 to {MAX_WEIGHT:,}")
        if not any(size * weight > 0 for size, weight in zip(self.shard_samples, self.weights or repeat(1), strict=False)):
            raise UsageError("there is no sample to train on; add samples, or weights above 0")

    @cached_property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(self.shard_samples)

    @cached_property
    def _sizes(self) -> np.ndarray:  # (S,)
        return np.array(self.shard_samples, np.int64)

    @cached_property
    def _starts(self) -> np.ndarray:  # (S + 1,)
        return np.concatenate([[0], np.cumsum(self._sizes)])

    def epoch_samples(self, epoch: int) -> int:
        """Draws in ``epoch``: the number of samples, where all have weight 1."""
        if self.weights is None:
            return self.samples
        return self.draws_before(epoch + 1) - self.draws_before(epoch)

    def draws_before(self, epoch: int) -> int:
        """Draws in all epochs before this one."""
        return int(self._passes(epoch).sum())

    def order(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Sample numbers of ``epoch`` from its draw ``start`` on, window by window: int64 arrays."""
        first, last = self._passes(epoch), self._passes(epoch + 1)
        shards = self._random(_SHARD_ORDER, epoch).permutation(len(self.shard_samples))
        ends = np.cumsum((last - first)[shards])
        begin = 0  # of the window, among the permuted shards
        while begin < len(shards):
            before = int(ends[begin - 1]) if begin else 0
            end = min(int(np.searchsorted(ends, before + self.window)) + 1, len(shards))
            if start < ends[end - 1]:
                rows = [
                    self._starts[shard] + self._rows(shard, int(first[shard]), int(last[shard]))
                    for shard in shards[begin:end].tolist()
                ]
                mixed = self._random(_WITHIN_WINDOW, epoch, begin).permutation(np.concatenate(rows))
                yield mixed[max(start - before, 0) :]
            begin = end

    def draws(self, position: Position = START) -> Iterator[tuple[Position, np.ndarray]]:
        """Sample numbers from ``position`` on, without end, each array with the position of its first draw."""
        epoch, consumed = position
        while True:
            for samples in self.order(epoch, consumed):
                yield Position(epoch, consumed), samples
                consumed += len(samples)
            epoch, consumed = epoch + 1, 0

    def batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, position: Position = START
    ) -> Iterator[list[PlannedSample]]:
        """The batches of ``rank`` from ``position`` on, without end."""
        share = slice(rank * batch_size, (rank + 1) * batch_size)
        together = batch_size * world_size
        self.require(together)
        samples = numbers = np.empty(0, np.int64)
        for (epoch, consumed), more in self.draws(position):
            first = self.draws_before(epoch) + consumed
            samples = np.concatenate([samples, more])
            numbers = np.concatenate([numbers, np.arange(first, first + len(more))])
            whole = len(samples) // together * together
            for start in range(0, whole, together):
                mine = slice(start + share.start, start + share.stop)
                yield [PlannedSample(*draw) for draw in zip(samples[mine].tolist(), numbers[mine].tolist(), strict=True)]
            samples, numbers = samples[whole:], numbers[whole:]

    def advance(self, position: Position, draws: int) -> Position:
        """The position after so many more draws."""
        epoch, consumed = position.epoch, position.consumed + draws
        while consumed >= (size := self.epoch_samples(epoch)):
            epoch, consumed = epoch + 1, consumed - size
        return Position(epoch, consumed)

    def require(self, batch: int) -> None:
        """Raise :class:`UsageError` where an epoch does not fill one batch of all ranks together."""
        if batch < 1:
            raise UsageError(f"the batch of all processes together is {batch}; give a batch_size of 1 or more")
        if self.samples < batch:
            raise UsageError(
                f"{self.samples} samples do not fill one batch of {batch} (batch_size times processes); "
                "lower batch_size or add samples"
            )

    def _passes(self, epoch: int) -> np.ndarray:
        """Draws of each shard in all epochs before this one, (S,): whole ones, so that weights hold in the long run."""
        if self.weights is None:
            return self._sizes * epoch
        # the small term: 3 · 0.1 · 10 should be 3 and not 2.9999…
        return np.floor(self._sizes * np.array(self.weights) * epoch + 1e-6).astype(np.int64)

    def _rows(self, shard: int, first: int, last: int) -> np.ndarray:
        """Rows of a shard for its draws ``first`` to ``last``, counted over all epochs: pass after pass through the shard."""
        size = self.shard_samples[shard]
        rows = []
        while first < last:
            number, start = divmod(first, size)
            stop = min(size, start + last - first)
            whole = stop - start == size  # the order within does not matter: the window is permuted
            rows.append(np.arange(size) if whole else self._random(_WITHIN_SHARD, shard, number).permutation(size)[start:stop])
            first += stop - start
        return np.concatenate(rows) if rows else np.empty(0, np.int64)

    def _random(self, use: int, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, use, *map(int, what)])
