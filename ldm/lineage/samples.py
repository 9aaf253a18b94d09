"""How often, and at which steps, a run trained on a sample: its plan is a pure function of what the run has recorded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.buckets import Buckets
from ldm.data.datamodule import ShardDataModule, WeightedSource
from ldm.data.image_dataset import ImageDataset
from ldm.data.latent_dataset import LatentDataset
from ldm.data.manifest import LATENT_SHARDS
from ldm.data.plan import START, LoaderRecord, Plan, Position
from ldm.data.quarantine import BadSample, read_quarantine
from ldm.data.sources import ShardSource
from ldm.errors import LdmError, UsageError
from ldm.files import open_regular, parse_json, read_yaml
from ldm.progress import Progress
from ldm.runs.layout import RunFolder
from ldm.runs.lineage import history
from ldm.runs.report import RunRecord
from ldm.training.nonfinite import SKIPPED_NAME

#: what a config calls a source, and the hash of its manifest (None: not recorded) => the source, with that hash
Find = Callable[[str, str | None], ShardSource]
REPORT_EVERY = 1000  # steps


@dataclass
class SampleUses:
    """What a run did with one sample.

    Attributes:
        shard, key: of the sample.
        steps: that trained on it, from 0 and in order; twice where a step has it twice.
        skipped: the same of steps whose update was skipped, because its loss or gradients were not finite.
        reason: why it could not be used; "" where it could.
    """

    shard: str
    key: str
    steps: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    reason: str = ""


def sample_uses(run: RunRecord, key: str, steps: int, find: Find) -> list[SampleUses]:
    """What the first ``steps`` steps of a run did with the samples of this key.

    Raises:
        UsageError: no sample of the data has the key, or the order of an older run is not known.
        LdmError: the data cannot be had.
    """
    uses: dict[str, SampleUses] = {}
    ranges = history(run.starts, steps)
    if not ranges:
        raise UsageError(f"{run.folder} has no record of its starts; nothing is known of the order of its samples")
    if ranges[0][0].start and "data" not in ranges[0][1]:
        raise UsageError(f"{run.folder} begins at step {ranges[0][0].start}, trained elsewhere; trace that run")
    position = START
    with Progress("planning", steps) as progress:
        for trained, start in ranges:
            record = start.get("data") or _record_of_config(run, find)
            order = _Order(record, [find(source["path"], source["hash"]) for source in record["sources"]])
            position = order.position if "data" in start else position
            wanted = order.wanted(key, _quarantined(run.folder), uses)
            for step, (draws, after) in zip(trained, order.steps(start["processes"], position), strict=False):
                position = after
                for sample in draws[np.isin(draws[:, 0], [*wanted])][:, 0].tolist():
                    wanted[sample].steps.append(step)
                if step % REPORT_EVERY == 0:
                    progress.update(step)
    if not uses:
        raise UsageError(f"no sample of its data has the key {key}; `ldm shards show` has the keys")
    skipped = _skipped(run)
    for each in uses.values():
        each.skipped = [step for step in each.steps if step in skipped]
        each.steps = [step for step in each.steps if step not in skipped]
    return [*uses.values()]


class _Order:
    """The order of samples of one start of a run."""

    def __init__(self, record: LoaderRecord, sources: Sequence[ShardSource]):
        latents = sources[0].manifest.format == LATENT_SHARDS
        buckets = None if record["buckets"] is None else Buckets(**_tuples(record["buckets"]))
        self.dataset: LatentDataset | ImageDataset
        self.dataset = LatentDataset(sources) if latents else ImageDataset(sources, read_captions=False, buckets=buckets)
        shards = [
            (entry.samples, described["weight"])
            for source, described in zip(sources, record["sources"], strict=True)
            for entry in source.manifest.shards
        ]
        sizes, weights = zip(*shards, strict=True)
        weighted = None if {*weights} == {1.0} else weights
        self.plan = Plan(sizes, weighted, record["position"]["seed"], record["window"], self.dataset.groups)
        self.batch_sizes, self.specs = record["batch_sizes"], [source.spec for source in sources]
        state = record["position"]
        waiting = state.get("waiting")
        draws = np.array(waiting, np.int64) if waiting else None
        self.position = Position(state["epoch"], state["samples_consumed"], draws)

    def steps(self, processes: int, position: Position) -> Iterator[tuple[np.ndarray, Position]]:
        return self.plan.steps(self.batch_sizes, processes, position)

    def wanted(self, key: str, bad: Sequence[BadSample], uses: dict[str, SampleUses]) -> dict[int, SampleUses]:
        """The samples of a key, by the numbers whose draws train on them: their own, and those of the bad samples that they
        replaced. Adds to ``uses``, by shard, those that are not there yet."""
        numbers = self.dataset.find({key, *(each.key for each in bad)})
        broken = {number: each.reason for each in bad for number in numbers[each.key] if self._is_in(number, each.shard)}
        found = {number: uses.setdefault(self._shard(number), SampleUses(self._shard(number), key)) for number in numbers[key]}
        for number in broken.keys() & found.keys():
            found[number].reason = broken[number]
        for number in broken:
            instead, tried = self.dataset.following(number), 1
            while instead in broken and tried <= len(broken):
                instead, tried = self.dataset.following(instead), tried + 1
            if instead in found:
                found[number] = found[instead]
            else:
                found.pop(number, None)
        return found

    def _shard(self, number: int) -> str:
        source, shard = self.dataset.shards[self.dataset.locate(number)[0]]
        return source.name(shard)

    def _is_in(self, number: int, shard: str) -> bool:
        """Whether a sample is in the shard of a record, whose folder may have moved since."""
        return os.path.basename(self._shard(number)) == os.path.basename(shard)


def _record_of_config(run: RunRecord, find: Find) -> LoaderRecord:
    """The record of a run of an older ldm, which had none, from its config."""
    config = read_yaml(RunFolder(run.folder).config, dict[str, Any]).get("data", {})
    if config.get("max_tokens") is not None:
        raise UsageError(f"{run.folder} has batches of max_tokens and no record of their sizes; nothing is known of its order")
    given = config["train"]
    named = [WeightedSource(given)] if isinstance(given, str) else [WeightedSource(**source) for source in given]
    located = [WeightedSource(find(source.path, None).spec, source.weight) for source in named]
    known = {name: value for name, value in config.items() if name not in ("train", "validation")}
    data = ShardDataModule(train=located, validation=located[0].path, **known)
    data.setup("fit")
    record = data.train_dataloader().record()
    for source, given in zip(record["sources"], named, strict=True):
        source["path"] = given.path
    return record


def _tuples(buckets: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in buckets.items()}


def _quarantined(folder: Path) -> list[BadSample]:
    return [sample for path in RunFolder(folder).quarantines() for sample in read_quarantine(path)[0]]


def _skipped(run: RunRecord) -> set[int]:
    """The steps that left the weights as they were."""
    steps = set()
    for path in sorted(run.folder.glob(f"*{SKIPPED_NAME}")):
        with open_regular(path) as lines:
            for line in lines:
                try:
                    entry = parse_json(line, str(path), dict[str, Any])
                except LdmError:  # the last line of a process that was killed
                    continue
                if entry.get("network") == run.stage:
                    steps.add(entry.get("step"))
    return steps
