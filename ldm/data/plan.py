"""The order of training samples: a pure function of (shard sizes, seed, position, batch size, ranks). No file is read.

A plan is one endless sequence of draws. In an epoch every sample is drawn exactly once (or as often as its weight says). Epochs
are concatenated, so a batch may span two of them, nothing is dropped or padded, and all ranks take equally many steps whatever
the sizes of the shards. A step of all ranks takes the next ``batch_size * world_size`` draws, rank r the r-th ``batch_size`` of
them. Loader workers take whole batches in turn and deliver them in order, so their number changes nothing.

Samples of several sizes are in groups, one a size, and a step takes draws of one group. Each draw waits until its group has
enough of them for a step: groups come as often as their samples, at all times, and what waits is part of the position.

Shuffling: every epoch permutes the shards, groups them into windows of at least ``window`` samples, and permutes each window. A
set of up to ``window`` samples is thus permuted as a whole; of a larger one no more than a window's shards are open at a time.
Draws before a position are skipped by arithmetic, not by reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from typing import Any, NamedTuple, NotRequired

import numpy as np
from typing_extensions import TypedDict

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
    """Progress of training: ``consumed`` draws of ``epoch``, over all ranks.

    Attributes:
        waiting: draws before it that no step has taken yet, (W, 2) sample and number, in their order; None: none.
    """

    epoch: int = 0
    consumed: int = 0
    waiting: np.ndarray | None = None


START = Position()


class SourceRecord(TypedDict):
    """One source of training data: what the config calls it, the hash of its manifest, that of the manifest of its images (of
    latents, those that they were made from), its samples, and its weight."""

    path: str
    hash: str
    images: str
    samples: int
    weight: float


class PositionRecord(TypedDict):
    """The state of a loader; see :meth:`ldm.data.loader.ShardLoader.state_dict`."""

    seed: int
    epoch: int
    samples_consumed: int
    data: str
    waiting: NotRequired[list[list[int]]]


class LoaderRecord(TypedDict):
    """The training data of a start of a run, and the position it began at; see
    :meth:`ldm.data.loader.ShardLoader.record`."""

    sources: list[SourceRecord]
    window: int
    batch_sizes: list[int]
    buckets: dict[str, Any] | None
    position: PositionRecord


class PlannedBatch(list[PlannedSample]):
    """The draws of one rank's batch.

    Attributes:
        position: progress of training after the step. A batch that is sent to a loader worker goes without.
    """

    def __init__(self, draws: Iterable[PlannedSample], position: Position):
        super().__init__(draws)
        self.position = position

    def __reduce__(self) -> tuple[type[list], tuple[list[PlannedSample]]]:
        return list, ([*self],)


@dataclass(frozen=True)
class Plan:
    """The sequence of draws from shards of these sizes.

    Attributes:
        shard_samples: samples of each shard.
        weights: how often each shard's samples are drawn per epoch (2: twice; 0.5: every other epoch); None: once.
        seed: of the order.
        window: samples permuted together.
        groups: the number of each sample's group, (N,), from 0; -1: never trained on. None: all are of one group.
    """

    shard_samples: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    seed: int = 0
    window: int = WINDOW
    groups: np.ndarray | None = field(default=None, repr=False, compare=False)

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
        epoch, consumed, _ = position
        while True:
            for samples in self.order(epoch, consumed):
                yield Position(epoch, consumed), samples
                consumed += len(samples)
            epoch, consumed = epoch + 1, 0

    def steps(
        self, batch_size: int | Sequence[int], world_size: int = 1, position: Position = START
    ) -> Iterator[tuple[np.ndarray, Position]]:
        """The draws of each step of all ranks, (B * world_size, 2) sample and number, and the position after it; without end.

        Args:
            batch_size: samples of a rank, the same for all groups or one number for each.
            world_size: number of ranks.
            position: before the first step.
        """
        together = self.together(batch_size, world_size)
        waiting = np.empty((0, 2), np.int64) if position.waiting is None else position.waiting
        waiting = waiting[self._groups_of(waiting) >= 0]
        for (epoch, consumed, _), samples in self.draws(position):
            first = self.draws_before(epoch) + consumed
            draws, ends = np.stack([samples, np.arange(first, first + len(samples))], 1), np.arange(1, len(samples) + 1)
            if self.groups is not None:
                used = self.groups[samples] >= 0
                draws, ends = draws[used], ends[used]
            come = len(waiting)  # of the draws from here on
            draws, ends = np.concatenate([waiting, draws]), np.concatenate([np.zeros(come, np.int64), ends])
            groups = self._groups_of(draws)
            # a step takes place at each draw that completes the number its group needs
            for last in np.flatnonzero((_rank_within(groups) + 1) % together[groups] == 0).tolist():
                waiting = np.concatenate([waiting, draws[come : last + 1]])
                come = max(come, last + 1)
                group = groups[last]
                taken = np.flatnonzero(self._groups_of(waiting) == group)[: together[group]]
                step, waiting = waiting[taken], np.delete(waiting, taken, 0)
                after = self.advance(Position(epoch, consumed), int(ends[last]))
                yield step, after._replace(waiting=waiting if len(waiting) else None)
            waiting = np.concatenate([waiting, draws[come:]])

    def batches(
        self, batch_size: int | Sequence[int], rank: int = 0, world_size: int = 1, position: Position = START
    ) -> Iterator[PlannedBatch]:
        """The batches of ``rank`` from ``position`` on, without end; see :meth:`steps`."""
        for draws, after in self.steps(batch_size, world_size, position):
            share = len(draws) // world_size
            yield PlannedBatch(map(PlannedSample._make, draws[rank * share : (rank + 1) * share].tolist()), after)

    def advance(self, position: Position, draws: int) -> Position:
        """The position after so many more draws, of which none waits."""
        epoch, consumed = position.epoch, position.consumed + draws
        while consumed >= (size := self.epoch_samples(epoch)):
            epoch, consumed = epoch + 1, consumed - size
        return Position(epoch, consumed)

    def together(self, batch_size: int | Sequence[int], world_size: int = 1) -> np.ndarray:
        """Draws that a step of all ranks takes of each group, (G,).

        Raises :class:`UsageError` where an epoch fills no step.
        """
        sizes = np.array([batch_size] * len(self._counts) if isinstance(batch_size, int) else batch_size) * world_size
        if sizes.min() < 1:
            raise UsageError(f"the batch of all processes together is {sizes.min()}; give a batch_size of 1 or more")
        counts = np.pad(self._counts, (0, len(sizes) - len(self._counts)))
        if (counts < sizes).all():
            fullest = np.argmax(counts / sizes)
            raise UsageError(
                f"{counts[fullest]} samples {'' if self.groups is None else 'of the most frequent size '}do not fill one batch "
                f"of {sizes[fullest]} (batch_size times processes); lower batch_size, add samples or raise their weight"
            )
        return sizes

    @cached_property
    def _counts(self) -> np.ndarray:
        """Samples of each group, (G,): those that are drawn at all, and those drawn several times per epoch as often."""
        times = np.maximum(np.ceil(self.weights or np.ones(len(self._sizes))), 1).astype(np.int64)  # of each shard, (S,)
        if self.groups is None:
            return np.array([self._sizes @ times])
        drawn = self.groups >= 0
        if self.weights is None:
            return np.bincount(self.groups[drawn], minlength=1)
        drawn &= np.repeat(np.array(self.weights) > 0, self._sizes)
        return np.bincount(self.groups[drawn], np.repeat(times, self._sizes)[drawn], minlength=1).astype(np.int64)

    def _groups_of(self, draws: np.ndarray) -> np.ndarray:
        return np.zeros(len(draws), np.uint8) if self.groups is None else self.groups[draws[:, 0]]

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


def _rank_within(groups: np.ndarray) -> np.ndarray:
    """How many earlier entries are of the same group as each."""
    order = np.argsort(groups, kind="stable")
    in_order, ranks = groups[order], np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(groups)) - np.searchsorted(in_order, in_order)
    return ranks
