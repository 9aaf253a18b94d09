"""Random access to samples across the shards of one or more sources: the base of image and latent data sets."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ldm.data.decode import DecodeError
from ldm.data.manifest import ShardEntry
from ldm.data.plan import PlannedSample
from ldm.data.quarantine import MAX_IN_A_ROW, BadSample, too_many_in_a_row
from ldm.data.shards import KeyDot
from ldm.data.sources import ShardSource, open_source
from ldm.errors import LdmError

# a shard's index is kept longer than its file is open: building it costs milliseconds, keeping it little memory
KNOWN_SHARDS = 4096


class Shard(Protocol):
    """One shard, whose file can be closed and reopened without losing its index."""

    def close(self) -> None:
        """Close the file."""

    def reopen(self, path: Path) -> Any:
        """Open the same shard again, perhaps at another path (a cache)."""


AnyShard = TypeVar("AnyShard", bound=Shard)


class ShardDataset(Dataset, Generic[AnyShard]):
    """Random access to samples, in the order of the sources and their manifests.

    A subclass defines how a shard is opened and a sample loaded. Shards are opened on first use, in whichever process uses
    them, and a limited number stays open.

    Attributes:
        max_in_a_row: consecutive bad samples skipped in search of a good one.
        open_shards: per process; well under the common limit of 1024 open files.
        decode_threads: threads that decode a batch in the training process.
    """

    format: str
    max_in_a_row: int = MAX_IN_A_ROW
    open_shards: int = 128
    decode_threads: int = 1

    def __init__(self, sources: str | Path | ShardSource | Sequence[ShardSource]):
        """
        Args:
            sources: a folder of shards, or sources opened by :func:`ldm.data.sources.open_source`.
        """
        if isinstance(sources, str | Path):
            sources = open_source(sources, self.format)
        self.sources = (sources,) if isinstance(sources, ShardSource) else tuple(sources)
        for source in self.sources:
            source.check_cheap()
        self.shards = [(source, number) for source in self.sources for number in range(len(source.manifest.shards))]
        self.starts = np.cumsum([0] + [entry.samples for source in self.sources for entry in source.manifest.shards])
        self._forget()

    def open_shard(self, path: Path, entry: ShardEntry, key_dot: KeyDot = "first") -> AnyShard:
        """Open one shard; :class:`LdmError` where that is impossible."""
        raise NotImplementedError

    def read(self, source: ShardSource, shard: AnyShard, row: int) -> Any:
        """Sample ``row`` of an open shard as stored. Raises :class:`DecodeError` where it cannot be used."""
        raise NotImplementedError

    def decode(self, raw: Any, draw: int | None, out: np.ndarray | None = None) -> dict[str, Any]:
        """Decode what :meth:`read` returned; ``draw`` seeds its random augmentation, None: without augmentation.

        ``out`` is memory that the largest part of the sample may be written to, where it fits. Raises :class:`DecodeError`
        where the sample cannot be used.
        """
        raise NotImplementedError

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples => a batch."""
        raise NotImplementedError

    def batch(self, draws: Sequence[PlannedSample | int], empty: Callable[..., Tensor] = torch.empty) -> dict[str, Any]:
        """The batch of these draws; large tensors are allocated by ``empty(shape, dtype=dtype)``."""
        return self.collate(self.__getitems__(draws))

    def batch_bytes(self, draws: Sequence[PlannedSample | int]) -> int:
        """Bytes of the batch of these draws, at least; 0 where that is not known without reading one."""
        return 0

    @cached_property
    def groups(self) -> np.ndarray | None:
        """The number of each sample's group, (N,): those of a batch are of one; -1: never in a batch. None: all are of one."""
        return None

    @cached_property
    def group_sizes(self) -> Sequence[tuple[int, int]]:
        """(height, width) of each group: pixels of images, positions of latents; empty where that is not known."""
        return ()

    def key(self, shard: AnyShard, row: int) -> str:
        """The key of a sample that cannot be used."""
        raise NotImplementedError

    def keys(self, shard: AnyShard, samples: int) -> Sequence[str]:
        """The keys of all ``samples`` of a shard, in order."""
        return [self.key(shard, row) for row in range(samples)]

    def find(self, keys: Collection[str], on_progress: Callable[[int, int], None] | None = None) -> dict[str, list[int]]:
        """The numbers of all samples with each of these keys, mostly one or none. Reads the index of every shard, and calls
        ``on_progress`` with (shards read, shards)."""
        found: dict[str, list[int]] = {key: [] for key in keys}
        for number, first in enumerate(self.starts[:-1].tolist()):
            with self._lock:
                of_shard = self.keys(self._open(number), int(self.starts[number + 1]) - first)
            for row, key in enumerate(of_shard):
                if key in found:
                    found[key].append(first + row)
            if on_progress is not None:
                on_progress(number + 1, len(self.shards))
        return found

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _forget(self) -> None:
        # shards by number, most recently used last: those with open files, and closed ones whose index is kept
        self._opened: OrderedDict[int, AnyShard] = OrderedDict()
        self._known: OrderedDict[int, AnyShard] = OrderedDict()
        self._lock, self._pool = Lock(), None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_opened", "_known", "_lock", "_pool")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample ``index`` without randomness. Raises :class:`LdmError` naming it where it cannot be used."""
        sample = self.attempt(index)
        if isinstance(sample, BadSample):
            raise LdmError(f"{sample}; `ldm shards check --deep` names all such samples")
        return sample

    def attempt(self, index: int) -> dict[str, Any] | BadSample:
        """Sample ``index`` without randomness, or the record of why it cannot be used."""
        try:
            return self._load(index, None)
        except DecodeError as error:
            return self.bad(index, error)

    def __getitems__(
        self, draws: Sequence[PlannedSample | int], outs: Iterable[np.ndarray] | None = None
    ) -> list[dict[str, Any]]:
        """The samples of these draws. A sample that cannot be used is replaced by the next good one, whose ``bad`` records it.

        ``outs``: the ``out`` of :meth:`decode` for each.
        """
        wanted = [*zip(draws, [None] * len(draws) if outs is None else outs, strict=True)]
        # One thread in a loader worker: the workers are the parallelism. In the training process all cores, which are idle.
        if self.decode_threads == 1 or len(draws) == 1 or get_worker_info() is not None:
            return [self._next_good(*one) for one in wanted]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.decode_threads, "ldm-decode")
        # one task per thread, not per sample: submitting a task costs a tenth of decoding a sample
        shares = [wanted[start :: self.decode_threads] for start in range(self.decode_threads)]
        samples: list[dict[str, Any]] = [{}] * len(draws)
        for start, done in enumerate(self._pool.map(lambda share: [self._next_good(*one) for one in share], shares)):
            samples[start :: self.decode_threads] = done
        return samples

    def _next_good(self, draw: PlannedSample | int, out: np.ndarray | None = None) -> dict[str, Any]:
        index, number = draw if isinstance(draw, PlannedSample) else (draw, None)
        first = index
        bad: list[BadSample] = []
        while True:
            try:
                return self._load(index, number, out) | {"bad": bad}
            except DecodeError as error:
                bad.append(self.bad(index, error))
            following = self.following(index)
            if len(bad) > self.max_in_a_row or following == first:
                raise too_many_in_a_row(len(bad), bad[-1])
            index = following

    def following(self, index: int) -> int:
        """The next sample of the same size, which replaces one that cannot be used; after the last one, the first."""
        if self.groups is None:
            return (index + 1) % len(self)
        same = np.flatnonzero(self.groups == self.groups[index])
        return int(same[np.searchsorted(same, index, "right") % len(same)])

    @property
    def used_sizes(self) -> list[tuple[int, int]]:
        """Those of ``group_sizes`` that samples have, the most frequent first."""
        groups = np.zeros(1, np.int64) if self.groups is None else self.groups[self.groups >= 0]
        counts = np.bincount(groups, minlength=len(self.group_sizes))
        return [self.group_sizes[number] for number in np.argsort(-counts, kind="stable").tolist() if counts[number]]

    def batches_of_one_size(self, samples: Sequence[int] | np.ndarray, batch_size: int | Sequence[int]) -> list[list[int]]:
        """Split samples into batches, size by size and in their order; ``batch_size``: of all sizes, or of each."""
        numbers = np.asarray(samples, np.int64)
        groups = np.zeros(len(numbers), np.int64) if self.groups is None else self.groups[numbers].astype(np.int64)
        batches = []
        for group in np.unique(groups[groups >= 0]).tolist():
            own, most = numbers[groups == group], batch_size if isinstance(batch_size, int) else batch_size[group]
            batches += [own[start : start + most].tolist() for start in range(0, len(own), most)]
        return batches

    def bad(self, index: int, error: DecodeError) -> BadSample:
        """The record of sample ``index``, which cannot be used."""
        return BadSample(*self.name_of(index), str(error))

    def name_of(self, index: int) -> tuple[str, str]:
        """The shard of sample ``index``, and its key, or its row where the shard cannot be read."""
        shard, row = self.locate(index)
        source, number = self.shards[shard]
        try:
            with self._lock:
                key = self.key(self._open(shard), row)
        except LdmError:
            key = f"#{row}"
        return source.name(number), key

    def locate(self, index: int) -> tuple[int, int]:
        """The shard that holds sample ``index``, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])

    def _load(self, index: int, draw: int | None, out: np.ndarray | None = None) -> dict[str, Any]:
        shard, row = self.locate(index)
        with self._lock:
            raw = self.read(self.shards[shard][0], self._open(shard), row)
        return self.decode(raw, draw, out)

    def _open(self, shard: int) -> AnyShard:
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        while len(self._opened) >= self.open_shards:
            oldest, opened = self._opened.popitem(last=False)
            opened.close()
            self._known[oldest] = opened
        while len(self._known) > KNOWN_SHARDS:
            self._known.popitem(last=False)
        source, number = self.shards[shard]
        path = source.path(number)
        if (opened := self._known.pop(shard, None)) is not None:
            opened.reopen(path)
        else:
            opened = self.open_shard(path, source.manifest.shards[number], source.manifest.key_dot)
        entry = source.manifest.shards[number]
        if (size := os.stat(path).st_size) != entry.bytes:  # it was right when the run began
            opened.close()
            raise LdmError(f"{source.name(number)} has {size} bytes now, its manifest says {entry.bytes}; restore it")
        self._opened[shard] = opened
        return opened
