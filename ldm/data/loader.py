"""The training loader: endless batches of a plan, a state that resumes without reading, and a count of bad samples."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice, repeat
from math import inf, prod
from typing import Annotated, Any, Protocol, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ldm.data.manifest import LATENT_SHARDS
from ldm.data.plan import LoaderRecord, Plan, PlannedBatch, PlannedSample, Position, PositionRecord, SourceRecord
from ldm.data.quarantine import Quarantine
from ldm.data.shard_dataset import ShardDataset
from ldm.errors import LdmError, first_line
from ldm.files import check_type
from ldm.terminal import printable, say

MIB = 2**20

_Number = Annotated[int, Field(ge=0, lt=2**63)]
_Draw = Annotated[list[_Number], Field(min_length=2, max_length=2)]  # sample and number, in a checkpoint


log = logging.getLogger(__name__)

# batches that each worker is asked for ahead of time
PREFETCH = 2
# A worker is asked for one more as soon as a batch arrives, before that is copied: this many may be in use at a time.
SLOTS = PREFETCH + 1
# interval at which a worker checks that its training process lives
END_CHECK_SECONDS = 5.0
# shards named when the loader stalls
NAMED_SHARDS = 3
# interval at which a wait for a batch looks whether it is over
TICK_SECONDS = 1.0
# batches whose memory is looked at before training: those of all frequent sizes
CHECKED_BATCHES = 32
# where workers put their batches, on Linux
SHARED_MEMORY = "/dev/shm"
# by Ctrl-C and by clusters, to every process of a run; macOS cannot tell who sent a SIGTERM, so there it ends a worker
SENT_TO_ALL = {signal.SIGINT, signal.SIGUSR1} | ({signal.SIGTERM} if hasattr(signal, "sigtimedwait") else set())


class BatchNoise(Protocol):
    """Draws what is random about the samples of a training batch, where the batch is made. It is sent to the workers."""

    def __call__(
        self, batch: Mapping[str, Any], draws: Sequence[PlannedSample], empty: Callable[..., Tensor] = torch.empty
    ) -> dict[str, Tensor]:
        """Tensors to add to the batch of these draws, allocated by one call of ``empty(shape, dtype=dtype)``."""
        ...


class _SharedMemory:
    """Allocates memory shared with the training process, and reuses it; called once per batch.

    New shared memory costs a page fault per 4 KiB on both sides: half as much time as decoding into it.
    """

    def __init__(self):
        self._slots: dict[int, Tensor] = {}  # bytes
        self._turn = 0

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        slot, self._turn = self._turn % SLOTS, self._turn + 1
        size = prod(shape) * dtype.itemsize
        memory = self._slots.get(slot)
        if memory is None or len(memory) < size:
            memory = self._slots[slot] = torch.empty(size, dtype=torch.uint8).share_memory_()
        return memory[:size].view(dtype).view(shape)


class _Batches(Dataset):
    """Whole batches by their samples' numbers, or in their place an error that the user can fix."""

    def __init__(self, dataset: ShardDataset, noise: BatchNoise | None = None):
        self.dataset, self.noise = dataset, noise
        self._memory, self._memory_of_noise = _SharedMemory(), _SharedMemory()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draws: list[Any]) -> Any:
        try:
            if get_worker_info() is None:
                return self._batch(draws, torch.empty, torch.empty)
            batch = self._batch(draws, self._memory, self._memory_of_noise)
            for value in batch.values():
                if isinstance(value, Tensor):  # else the queue's thread would do it, which loses the batch if that fails
                    value.share_memory_()
            return batch
        except LdmError as error:
            return error
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return LdmError(f"a loader worker found no room for a batch: {_shared_memory()}, or set workers to 0")

    def _batch(self, draws: list[Any], empty: Callable[..., Tensor], empty_for_noise: Callable[..., Tensor]) -> dict[str, Any]:
        batch = self.dataset.batch(draws, empty)
        return batch if self.noise is None else batch | self.noise(batch, draws, empty_for_noise)


class _PlainLoader(DataLoader):
    """Raises errors returned in a batch's place, and copies batches out of memory that a worker will reuse."""

    def __init__(self, dataset: _Batches, max_wait: float, rank: int, on_wait: Callable[[], None], **options: Any):
        in_workers = options.get("num_workers", 0) > 0
        # its own generator: otherwise each iteration would draw a worker seed, which nothing needs, from the global one
        tick = min(max_wait or TICK_SECONDS, TICK_SECONDS)
        super().__init__(dataset, timeout=tick if in_workers else 0, generator=torch.Generator(), **options)
        self.samples, self.max_wait, self.rank, self.on_wait = dataset.dataset, max_wait, rank, on_wait

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]  torch names a private class
        for _, batch in self.with_draws():
            yield batch

    def with_draws(self) -> Iterator[tuple[list[Any], Any]]:
        """Every batch with its draws."""
        # memory referenced here stays mapped, so that it is not mapped again when a worker reuses it
        mapped: deque[list[Tensor]] = deque(maxlen=SLOTS * self.num_workers)
        self._require_shared_memory()
        try:
            if self.num_workers:
                multiprocessing.Lock()  # first: torch's iterator, half made, would print a traceback
            with _signals_blocked():
                batches = super().__iter__()
        except OSError as error:
            reason = f"{error.strerror or error}; {_shared_memory()}, or set workers to 0"
            raise LdmError(f"{self.num_workers} loader workers cannot be started: {reason}") from None
        with _Watchdog(0 if self.num_workers else self.max_wait, self._stalled, self.on_wait) as watchdog:
            for draws in self.sampler:
                watchdog.awaited = draws
                batch = self._next(batches, draws)
                watchdog.awaited = None
                if isinstance(batch, LdmError):
                    try:
                        raise batch
                    finally:
                        # break the cycle of error and frame: workers that wait for the garbage collector end late
                        del batch
                shared = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.is_shared()}
                mapped.append([*shared.values()])
                yield draws, batch | {name: value.clone() for name, value in shared.items()}

    def _next(self, batches: Iterator[Any], draws: list[Any]) -> Any:
        """The next batch. Waits in short intervals, so that a dead worker, a signal and the end of the time are all seen."""
        waited = 0.0
        while True:
            try:
                return next(batches)
            except RuntimeError as error:
                if "DataLoader worker" in str(error):
                    fix = "a worker killed by the system was mostly short of memory: lower workers or batch_size"
                    raise LdmError(f"a loader worker ended ({first_line(error)}); {fix}") from None
                if "DataLoader timed out" not in str(error):
                    raise
            waited += self.timeout
            self.on_wait()
            if self.max_wait and waited >= self.max_wait:
                raise LdmError(self._stalled(draws))

    def _require_shared_memory(self) -> None:
        """Raise :class:`LdmError` where the workers' batches cannot fit at a time: better now than at a later step."""
        batch = max(map(self.samples.batch_bytes, islice(self.sampler, CHECKED_BATCHES)), default=0)
        if (need := batch * SLOTS * self.num_workers) and need > (free := _free_shared_memory()):
            fits = int(free / batch / SLOTS)
            raise LdmError(
                f"{self.num_workers} loader workers need {need / MIB:,.0f} MiB for their batches: {_shared_memory()}, or set "
                f"workers to {f'{fits} or less' if fits else '0, which needs none'}"
            )

    def _stalled(self, draws: list[Any]) -> str:
        shards = dict.fromkeys(
            self.samples.locate(draw.sample if isinstance(draw, PlannedSample) else draw)[0] for draw in draws
        )
        names = [source.name(number) for source, number in (self.samples.shards[shard] for shard in shards)]
        more = f" and {len(names) - NAMED_SHARDS} more" if len(names) > NAMED_SHARDS else ""
        return (
            f"the loader of rank {self.rank} has stalled: no batch for {self.max_wait:g} s, to be read from "
            f"{', '.join(names[:NAMED_SHARDS])}{more}; check that storage, or raise max_wait_seconds"
        )


class _Watchdog(threading.Thread):
    """Ends the process with one line when it waits too long for a batch that it reads itself, or was asked to stop meanwhile.

    Nothing else interrupts a system call that does not return. Time is counted in wake-ups of this thread, so that a process
    that was suspended for a while is not ended when it continues.
    """

    def __init__(self, seconds: float, message: Callable[[list[Any]], str], on_wait: Callable[[], None]):
        super().__init__(name="ldm-loader-watchdog", daemon=True)
        self.seconds, self.message, self.on_wait = seconds, message, on_wait
        self.awaited: list[Any] | None = None  # one assignment per batch
        self._over = threading.Event()

    def __enter__(self) -> _Watchdog:
        if self.seconds:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def run(self) -> None:
        tick = min(TICK_SECONDS, self.seconds / 20)
        before, waited = None, 0.0
        while not self._over.wait(tick):
            awaited = self.awaited
            waited = waited + tick if awaited is not None and awaited is before else 0.0
            before = awaited
            try:
                if waited:
                    self.on_wait()
                if waited > self.seconds:
                    raise LdmError(self.message(awaited or []))
            except LdmError as error:
                say(f"ldm: {printable(error)}", sys.stderr)
                os._exit(error.exit_code)


def nothing() -> None:
    pass


def batch_loader(
    dataset: ShardDataset,
    batches: Iterable[list[Any]],
    max_wait: float = 0,
    rank: int = 0,
    on_wait: Callable[[], None] = nothing,
    noise: BatchNoise | None = None,
    **options: Any,
) -> _PlainLoader:
    """A loader whose workers' errors reach the caller unchanged, as one line.

    Raised in a worker, they would arrive as a traceback of many lines, and each worker would take five seconds to end.

    Args:
        dataset: samples by number.
        batches: the draws of each batch: a sampler of torch, but of whole batches.
        max_wait: seconds to wait for a batch before the loader counts as stalled: :class:`LdmError` with workers; without,
            the same line and the end of the process. 0: no limit.
        rank: that the line names.
        on_wait: called about once a second while a batch is awaited; its exception ends the wait, or, without workers, an
            :class:`LdmError` of it ends the process.
        noise: adds to each batch what is random about its samples.
        options: of ``torch.utils.data.DataLoader``.
    """
    ahead = {"prefetch_factor": PREFETCH} if options.get("num_workers") else {}
    return _PlainLoader(
        _Batches(dataset, noise),
        max_wait,
        rank,
        on_wait,
        sampler=batches,
        batch_size=None,
        collate_fn=_unchanged,
        worker_init_fn=_ignore_signals,
        **ahead,
        **options,
    )


def _free_shared_memory() -> float:
    """Free bytes where workers put their batches; infinite where that is not a file system (macOS)."""
    try:
        about = os.statvfs(SHARED_MEMORY)
    except OSError:
        return inf
    return about.f_bavail * about.f_frsize


def _shared_memory() -> str:
    """What is known of shared memory, and the first fix."""
    try:
        about = os.statvfs(SHARED_MEMORY)
    except OSError:
        return "raise the system's limit of shared memory"
    size, free = about.f_blocks * about.f_frsize / MIB, about.f_bavail * about.f_frsize / MIB
    return f"{SHARED_MEMORY} has {size:,.0f} MiB, {free:,.0f} free; make it larger (docker run --shm-size=2g)"


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block them, so that a process started meanwhile has them blocked from the start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SENT_TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(_worker: int) -> None:
    """Ignore Ctrl-C and the signals that clusters send to every process: the training process handles them and ends its
    workers.

    A worker that died of one would take the training process with it before that has saved.
    """
    # blocked already, except by a fork server that was running before
    signal.pthread_sigmask(signal.SIG_BLOCK, SENT_TO_ALL)
    if signal.SIGTERM in SENT_TO_ALL:
        threading.Thread(target=_await_end, name="ldm-loader-end", daemon=True).start()


def _await_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a worker
    while True:
        signalled = signal.sigtimedwait({signal.SIGTERM}, END_CHECK_SECONDS)
        # torch checks for its parent's death too, but takes a fork server (the default of Python 3.14) for the parent: both
        # would keep running
        if not parent.is_alive() or (signalled is not None and signalled.si_pid == parent.pid):
            os._exit(0)


def _unchanged(batch: Any) -> Any:
    return batch


class PlannedBatches:
    """The batches of a plan for one rank, from a position on, without end."""

    def __init__(self, plan: Plan, batch_size: int | Sequence[int], rank: int, world_size: int, position: Position):
        self.arguments = (batch_size, rank, world_size, position)
        self.plan = plan

    def __iter__(self) -> Iterator[PlannedBatch]:
        return self.plan.batches(*self.arguments)


class ShardLoader:
    """Batches of a plan for one rank, without end.

    Each batch carries its ``draws``, the :class:`ldm.data.plan.PlannedSample` of each sample as a row of an int64 array
    (B, 2), and ``position``, the progress of training after it. Both stay on the host: an array is not moved to the device.

    A new iteration continues at the current position. The state (seed, epoch, samples consumed, hash of the data) is the same
    on every rank, so one rank's copy serves all, and a run may resume with other ranks, workers or another batch size: the rest
    of the epoch still comes exactly once.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        plan: Plan,
        batch_size: int | Sequence[int],
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        quarantine: Quarantine | None = None,
        data_hash: str = "",
        confirm: bool = False,
        max_wait: float = 0,
        on_wait: Callable[[], None] = nothing,
        noise: BatchNoise | None = None,
        loss_weights: Sequence[float] | None = None,
    ):
        """
        Args:
            dataset: samples by number.
            plan: their order.
            batch_size: samples per batch of one rank, the same for all groups of the plan or one number for each.
            rank, world_size: of this process.
            workers: loader processes; 0 reads in this one.
            pin_memory: copy batches to page-locked memory, for the transfer to a GPU.
            quarantine: counts every bad sample.
            data_hash: identity of the data, kept in the state.
            confirm: batches count as consumed when :meth:`consumed` is called, for a trainer that prefetches; otherwise when
                they are yielded.
            max_wait, on_wait, noise: see :func:`batch_loader`.
            loss_weights: of the samples of each source; each batch then holds ``loss_weight`` (B,). None: all count alike.
        """
        plan.together(batch_size, world_size)  # or refuse them now
        self.dataset, self.plan, self.batch_size = dataset, plan, batch_size
        self.rank, self.world_size, self.workers, self.pin_memory = rank, world_size, workers, pin_memory
        self.quarantine = quarantine if quarantine is not None else Quarantine(len(dataset))
        self.data_hash, self.confirm, self.max_wait, self.on_wait = data_hash, confirm, max_wait, on_wait
        self.noise, self.loss_weights = noise, loss_weights
        self.position = Position()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loader = batch_loader(
            self.dataset,
            PlannedBatches(self.plan, self.batch_size, self.rank, self.world_size, self.position),
            self.max_wait,
            self.rank,
            self.on_wait,
            self.noise,
            num_workers=self.workers,  # they live as long as this iteration, which does not end with an epoch
            pin_memory=self.pin_memory,
        )
        for draws, batch in loader.with_draws():
            self.quarantine.add(batch.pop("bad"))
            assert isinstance(draws, PlannedBatch)
            if not self.confirm:
                self.position = draws.position
            yield batch | self._about(draws) | {"position": draws.position}

    def batch(self, draws: Sequence[PlannedSample]) -> dict[str, Any]:
        """The batch of these draws, as training gets it; it does not count."""
        batch = self.dataset.batch(draws)
        noise = {} if self.noise is None else self.noise(batch, draws)
        return batch | noise | self._about(draws)

    def _about(self, draws: Sequence[PlannedSample]) -> dict[str, Any]:
        """``draws`` and, where sources differ in it, ``loss_weight``."""
        numbers = np.array(draws, np.int64)
        if self.loss_weights is None:
            return {"draws": numbers}
        ends = np.cumsum([source.manifest.samples for source in self.dataset.sources])
        weights = np.array(self.loss_weights, np.float32)[np.searchsorted(ends, numbers[:, 0], side="right")]
        loss_weight = torch.from_numpy(weights)
        return {"draws": numbers, "loss_weight": loss_weight.pin_memory() if self.pin_memory else loss_weight}

    def record(self) -> LoaderRecord:
        """All that the order of the samples depends on from here on, but the number of processes; the same on every rank."""
        sources, weights = self.dataset.sources, iter(self.plan.weights or repeat(1.0))
        buckets = getattr(self.dataset, "buckets", None)
        described: list[SourceRecord] = []
        for source in sources:
            weight, *_ = [next(weights) for _ in source.manifest.shards]
            manifest = source.manifest
            images = manifest.extra.get("source", "") if manifest.format == LATENT_SHARDS else manifest.hash
            described.append(
                {
                    "path": source.spec,
                    "hash": manifest.hash,
                    "images": images,
                    "samples": manifest.samples,
                    "weight": weight,
                }
            )
        sizes = [self.batch_size] if isinstance(self.batch_size, int) else [*self.batch_size]
        return {
            "sources": described,
            "window": self.plan.window,
            "batch_sizes": sizes,
            "buckets": None if buckets is None else asdict(buckets),
            "position": cast(PositionRecord, self.state_dict()),
        }

    def consumed(self, position: Position) -> None:
        """The batch that carried this ``position`` reached the training step."""
        self.position = Position(*position)

    def state_dict(self) -> dict[str, Any]:
        """Seed, epoch, samples consumed in it and those that wait, the identity of the data; the same on every rank."""
        epoch, consumed, waiting = self.position
        state = {"seed": self.plan.seed, "epoch": epoch, "samples_consumed": consumed, "data": self.data_hash}
        return state if waiting is None else state | {"waiting": waiting.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state. Where the data has changed, start at the next epoch and log it.

        Raises :class:`LdmError` where the state names samples that are not there.
        """
        self.plan = replace(self.plan, seed=state["seed"])
        self.position = Position(state["epoch"], state["samples_consumed"], self._waiting(state))
        if state["data"] != self.data_hash:
            self.position = Position(state["epoch"] + 1, 0)
            log.warning("the training data changed since the checkpoint: resuming at the start of epoch %d", state["epoch"] + 1)

    def _waiting(self, state: dict[str, Any]) -> np.ndarray | None:
        """The draws that wait in a state of these data, (W, 2)."""
        if not state.get("waiting") or state["data"] != self.data_hash:
            return None
        waiting = np.array(check_type(state["waiting"], "the checkpoint's samples that wait", list[_Draw]), np.int64)
        if waiting[:, 0].max() >= len(self.dataset):
            raise LdmError(f"the checkpoint names sample {waiting[:, 0].max()} of {len(self.dataset)}; resume from another one")
        return waiting
