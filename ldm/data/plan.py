"""Which sample goes where: a pure function of (samples, seed, epoch, batch size, world size, rank)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ldm.errors import UsageError


@dataclass(frozen=True)
class Plan:
    """The order in which one training run sees its samples, without end.

    Every epoch is a new permutation of all samples; the global batch is cut from it and dealt to the ranks, so that all
    ranks take equally many steps whatever the sizes of the shards. What is left at an epoch's end and fills no global
    batch is dropped for that epoch (less than one batch, other samples each time).

    Attributes:
        samples: how many there are.
        batch_size: per rank.
        seed: of the permutations.
        world_size: number of ranks.
    """

    samples: int
    batch_size: int
    seed: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"data.batch_size is {self.batch_size}; give 1 or more")
        if self.samples < self.batch_size * self.world_size:
            raise UsageError(
                f"{self.samples} samples do not fill one batch of data.batch_size {self.batch_size} on "
                f"{self.world_size} process(es); lower data.batch_size or add samples"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches that each rank takes per epoch."""
        return self.samples // (self.batch_size * self.world_size)

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of ``epoch``, (samples,) int64."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.samples)

    def batches(self, rank: int = 0, first_step: int = 0) -> Iterator[list[int]]:
        """Batches of sample numbers for ``rank`` from ``first_step`` on, epoch after epoch, without end."""
        epoch, step = divmod(first_step, self.steps_per_epoch)
        while True:
            order = self.order(epoch)
            for position in range(step, self.steps_per_epoch):
                start = (position * self.world_size + rank) * self.batch_size
                yield order[start : start + self.batch_size].tolist()
            epoch, step = epoch + 1, 0
