"""Sweeps: the metrics of one model under many settings of its sampler, kept in a folder, and which settings are best."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from PIL import Image
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from ldm.errors import LdmError, UsageError
from ldm.evaluation.image_sets import ImageSet
from ldm.evaluation.results import Results
from ldm.files import read_json, require_new_folder, require_version, write_json
from ldm.reporting.grids import paired_grid, read_grid, save_grid

RECORD, PAGE, IMAGES, REAL = "sweep.json", "index.html", "images", "real"
FORMAT_VERSION = 1  # of RECORD
STRIP, CELL = 8, 96  # images that are kept of each setting; their side in pixels
#: what results of one folder have in common
SAME = ("model_hash", "shards_hash", "count", "seed", "sizes", "networks")
Count = Annotated[int, Field(ge=1, le=10**9)]


class SamplerSettings(NamedTuple):
    """What a sweep varies: a scheduler by its name, its steps, and the guidance scale."""

    scheduler: str
    steps: int
    guidance: float

    def __str__(self) -> str:
        return f"{self.scheduler}, {self.steps} steps, guidance {self.guidance:g}"

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.scheduler}-{self.steps}-{self.guidance}"


def cross_product(schedulers: Sequence[str], steps: Sequence[int], guidance: Sequence[float]) -> list[SamplerSettings]:
    """All combinations, each once."""
    return [*dict.fromkeys(SamplerSettings(*each) for each in product(schedulers, steps, map(float, guidance)))]


class SweptMetric(TypedDict):
    """A metric as :meth:`ldm.evaluation.results.Results.to_json` gives it."""

    value: FiniteFloat
    real: FiniteFloat | None
    better: Literal["lower", "higher"]
    note: NotRequired[str]


class SweptSettings(TypedDict):
    """The metrics of one combination.

    Attributes:
        evaluations: of the denoiser for one image; guidance takes two a step.
    """

    scheduler: Annotated[str, Field(pattern=r"^[\w+-]+$")]  # a part of file names
    steps: Count
    guidance: FiniteFloat
    evaluations: Count
    metrics: dict[str, SweptMetric]


class Record(TypedDict):
    """``sweep.json``; ``captions``: of the images that are kept."""

    format_version: int
    protocol: dict[str, Any]
    captions: list[str | None]
    results: list[SweptSettings]


class SweepFolder:
    """The results of a sweep: ``sweep.json`` and some images of each combination. It is complete after each of them, so that a
    sweep can be interrupted, resumed and extended."""

    def __init__(self, path: str | os.PathLike, protocol: Mapping[str, Any]):
        """Open a folder of results with the same protocol, or a new one, which nothing is written to yet.

        Raises:
            UsageError: for a folder of anything else, or of a sweep that these results cannot be compared with.
        """
        self.path, self.protocol = Path(path), dict(protocol)
        self.captions: list[str | None] = []
        self.results: dict[SamplerSettings, SweptSettings] = {}
        file = self.path / RECORD
        if not os.path.lexists(file):
            require_new_folder(self.path, "the sweep", in_place=True)
            return
        require_version(read_json(file, dict[str, Any]).get("format_version"), FORMAT_VERSION, f"{file}: the sweep")
        record = read_json(file, Record)
        before, now = _comparable(record["protocol"]), _comparable(protocol)
        for name in SAME:
            if before.get(name) != now.get(name):
                shown = (str(each.get(name))[:80] for each in (before, now))
                raise UsageError(f"{file} is a sweep with {name} {', not '.join(shown)}; give a new folder")
        if len({frozenset(each["metrics"]) for each in record["results"]}) > 1:
            raise LdmError(f"{file} has other metrics for some settings than for others; give a new folder")
        self.protocol, self.captions = record["protocol"], record["captions"]
        self.results = {settings_of(each): each for each in record["results"]}

    def missing(self, wanted: Iterable[SamplerSettings]) -> list[SamplerSettings]:
        """Those that have no results yet."""
        return [settings for settings in wanted if settings not in self.results]

    def add(self, settings: SamplerSettings, evaluations: int, found: Results, generated: ImageSet) -> None:
        """Write the results of a combination."""
        self.save_images(settings.name, generated)
        self.protocol |= found.protocol
        metrics = {name: SweptMetric(**metric) for name, metric in found.to_json().items()}
        self.results[settings] = SweptSettings(**settings._asdict(), evaluations=evaluations, metrics=metrics)
        # in the order of the settings: however the folder came about, it holds the same
        results = [self.results[each] for each in sorted(self.results)]
        record = {"format_version": FORMAT_VERSION, "protocol": self.protocol, "captions": self.captions, "results": results}
        write_json(self.path / RECORD, record)

    def save_images(self, name: str, images: ImageSet) -> None:
        """Keep the first images of a set, reduced for the page."""
        shown = [images.shown[number] for number in sorted(images.shown)[:STRIP]]
        rows = [(name, shown)]
        save_grid(paired_grid(rows, CELL), rows, self._images(name))

    def images(self, name: str) -> list[Image.Image]:
        """What :meth:`save_images` kept; none where the file is gone."""
        path = self._images(name)
        return [image for _, images in read_grid(path)[1] for image in images] if path.is_file() else []

    def _images(self, name: str) -> Path:
        return self.path / IMAGES / f"{name}.png"


def settings_of(swept: SweptSettings) -> SamplerSettings:
    """The combination that results are of."""
    return SamplerSettings(swept["scheduler"], swept["steps"], float(swept["guidance"]))


def _comparable(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of :data:`SAME`; of networks their names and hashes, not their paths."""
    networks = protocol.get("networks")
    if isinstance(networks, list):
        networks = {str(each.get("name")): str(each.get("hash"))[:12] for each in networks if isinstance(each, Mapping)}
    return dict(protocol) | {"networks": networks}


def find_metric(name: str, names: Sequence[str]) -> str:
    """The metric of a name, or of its beginning: ``fid`` is that of the first network. Raises UsageError, listing them."""
    for each in names:
        if name in (each, each.partition("_")[0]):
            return each
    raise UsageError(f"there is no metric {name!r}; choose one of: {', '.join(names)}")


def loss(swept: SweptSettings, metric: str) -> float:
    """The value of a metric, so that lower is better."""
    found = swept["metrics"].get(metric)
    if found is None:
        raise LdmError(f"the sweep has no {metric} for {settings_of(swept)}; give a new folder")
    return found["value"] if found["better"] == "lower" else -found["value"]


def pareto_front(results: Iterable[SweptSettings], metric: str) -> list[SweptSettings]:
    """Those that no other one beats: which is no worse in the metric with fewer evaluations, or better with as many. By
    evaluations, so that the metric gets better from each to the next."""
    front: list[SweptSettings] = []
    for each in sorted(results, key=lambda one: (one["evaluations"], loss(one, metric), settings_of(one))):
        if not front or loss(each, metric) < loss(front[-1], metric):
            front.append(each)
    return front


def choose(results: Iterable[SweptSettings], metric: str, tolerance: float) -> SweptSettings:
    """The results of the fewest evaluations whose metric is within a share ``tolerance`` of the best value."""
    front = pareto_front(results, metric)
    best = loss(front[-1], metric)
    return next(each for each in front if loss(each, metric) <= best + tolerance * abs(best))
