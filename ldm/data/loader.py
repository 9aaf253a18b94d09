"""Training batches without end, from a plan: stateful, resumed by arithmetic, with bad samples counted."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ldm.data.plan import Draw, Plan, Position
from ldm.data.quarantine import Quarantine
from ldm.data.samples import ShardSamples
from ldm.errors import LdmError

log = logging.getLogger(__name__)

# batches that each worker is asked for ahead of time
PREFETCH = 2
# A worker is asked for one more as soon as one arrives, before that is copied: this many may be in use at a time.
SLOTS = PREFETCH + 1


class _Batches(Dataset):
    """Whole batches by their samples' numbers, or the error that a user can mend in their place."""

    def __init__(self, dataset: ShardSamples):
        self.dataset = dataset
        self._shared: dict[int, Tensor] = {}  # bytes, by slot
        self._turn = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draws: list[Any]) -> Any:
        try:
            return self.dataset.batch(draws, torch.empty if get_worker_info() is None else self._share)
        except LdmError as error:
            return error

    def _share(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory shared with the training process, the same again and again; once for each batch.

        Fresh shared memory would cost a page fault for every 4 KiB, on both sides: as much as half of decoding into it.
        """
        slot, self._turn = self._turn % SLOTS, self._turn + 1
        size = prod(shape) * dtype.itemsize
        memory = self._shared.get(slot)
        if memory is None or len(memory) < size:
            memory = self._shared[slot] = torch.empty(size, dtype=torch.uint8).share_memory_()
        return memory[:size].view(dtype).view(shape)


class _PlainLoader(DataLoader):
    """Raises errors that came in a batch's place, and copies what a worker will write over."""

    def __iter__(self) -> Iterator[Any]:
        # as long as memory is held here it stays mapped, and comes back without being mapped anew
        mapped: deque[list[Tensor]] = deque(maxlen=SLOTS * self.num_workers)
        for batch in super().__iter__():
            if isinstance(batch, LdmError):
                raise batch
            shared = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.is_shared()}
            mapped.append([*shared.values()])
            yield batch | {name: value.clone() for name, value in shared.items()}


def batch_loader(dataset: ShardSamples, **options: Any) -> DataLoader:
    """A loader whose workers' errors reach the caller as they are, one line.

    Raised there, torch would hand them on as a traceback of many lines, and each worker would take five seconds to end.
    """
    ahead = {"prefetch_factor": PREFETCH} if options.get("num_workers") else {}
    return _PlainLoader(_Batches(dataset), collate_fn=_unchanged, **ahead, **options)


def _unchanged(batch: Any) -> Any:
    return batch


class PlannedBatches:
    """A batch sampler that deals out a plan's batches for one rank, from a position on, without end."""

    def __init__(self, plan: Plan, batch_size: int, rank: int, world_size: int, position: Position):
        self.arguments = (batch_size, rank, world_size, position)
        self.plan = plan

    def __iter__(self) -> Iterator[list[Draw]]:
        return self.plan.batches(*self.arguments)


class ShardLoader:
    """Batches of a plan for one rank, without end; each carries ``position``, how far training is once it is consumed.

    Iterated anew it goes on where it stands. Its state is that of all ranks alike (seed, epoch, samples consumed, what the
    data were), so one rank's copy serves all, and a run may go on with other ranks, workers or another batch size: what an
    epoch has left still comes exactly once.
    """

    def __init__(
        self,
        dataset: ShardSamples,
        plan: Plan,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        quarantine: Quarantine | None = None,
        data_hash: str = "",
        confirm: bool = False,
    ):
        """
        Args:
            dataset: samples by number.
            plan: their order.
            batch_size: samples per batch of one rank.
            rank, world_size: which of how many processes this is.
            workers: loader processes; 0 reads in this one.
            pin_memory: copy batches to page-locked memory, for the way to a GPU.
            quarantine: told of every bad sample.
            data_hash: identity of the data, kept in the state.
            confirm: batches count as consumed when :meth:`consumed` says so, for a trainer that fetches ahead; otherwise
                when they are handed out.
        """
        plan.require(batch_size * world_size)
        self.dataset, self.plan, self.batch_size = dataset, plan, batch_size
        self.rank, self.world_size, self.workers, self.pin_memory = rank, world_size, workers, pin_memory
        self.quarantine = quarantine if quarantine is not None else Quarantine(len(dataset))
        self.data_hash, self.confirm = data_hash, confirm
        self.position = Position()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        position = self.position
        sampler = PlannedBatches(self.plan, self.batch_size, self.rank, self.world_size, position)
        loader = batch_loader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=self.workers,  # they live as long as this iteration, which does not end with an epoch
            pin_memory=self.pin_memory,
        )
        for batch in loader:
            self.quarantine.add(batch.pop("bad"))
            position = self.plan.advance(position, self.batch_size * self.world_size)
            if not self.confirm:
                self.position = position
            yield batch | {"position": position}

    def consumed(self, position: Position) -> None:
        """The batch that carried this ``position`` reached the training step."""
        self.position = Position(*position)

    def state_dict(self) -> dict[str, Any]:
        """Seed, epoch, samples consumed in it, and the identity of the data; the same on every rank."""
        epoch, consumed = self.position
        return {"seed": self.plan.seed, "epoch": epoch, "samples_consumed": consumed, "data": self.data_hash}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. Where the data are others now, from the start of the next epoch, and the log says so."""
        self.plan = self.plan.with_seed(state["seed"])
        self.position = Position(state["epoch"], state["samples_consumed"])
        if state["data"] != self.data_hash:
            self.position = Position(state["epoch"] + 1, 0)
            log.warning(
                "the training data changed since the checkpoint: going on from the start of epoch %d", state["epoch"] + 1
            )
