"""What a model was made from: ``lineage.json`` in its directory, and what the record of a run says about its data.

``ldm trace`` follows both. The file names fingerprints and no folder of a machine, so that a model can be passed on with it;
the run's own records have the paths.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired
from urllib.parse import urlsplit

from lightning import Callback, LightningModule, Trainer
from typing_extensions import TypedDict

from ldm.data.datamodule import datamodule_of
from ldm.files import read_json, require_version, sha256_file, sha256_folder, write_json
from ldm.models.directories import downloaded
from ldm.runs.layout import Count, InitialRecord, RunFolder, Start
from ldm.runs.logging import amend_start

LINEAGE_NAME = "lineage.json"
FORMAT_VERSION = 1


class SourceLineage(TypedDict):
    """A source of training data: the hash of its manifest and of that of its images, its samples, and how often they were drawn
    per epoch."""

    hash: str
    images: str
    samples: Count
    weight: float


class Lineage(TypedDict):
    """``lineage.json``.

    Attributes:
        stage: the command whose ``fit`` made the model: ``autoencoder``, ``denoiser``.
        step: optimiser steps that its weights have been trained for.
        weights: :func:`weights_hash` of the directory.
        data: everything that it was trained on up to that step; empty where an older ldm kept no record of it.
        initial: what it began with, unless that was random.
        adapters: that were merged into these weights, with the sha256 of their files.
    """

    format_version: int
    stage: str
    step: Count
    weights: str
    data: list[SourceLineage]
    initial: NotRequired[InitialRecord]
    adapters: NotRequired[list[InitialRecord]]


def weights_hash(folder: Path) -> str:
    """Hex sha256 of the weights in a model's directory: those of its denoiser, where it is a pipeline. Configs do not count,
    which later commands complete (latent statistics, recommended settings)."""
    denoiser = folder / "transformer"
    return sha256_folder(denoiser if denoiser.is_dir() else folder, (".safetensors", ".bin", ".distcp"))


def initial_record(name: str) -> InitialRecord:
    """The record of ``model.init_from``; see :class:`ldm.runs.layout.InitialRecord`."""
    place = Path(name)
    if RunFolder(place).config.exists():
        place = RunFolder(place).last_checkpoint.resolve()
    if place.is_file():
        return {"name": name, "weights": sha256_file(place)}
    # the request with which its weights were loaded, not another one
    return {"name": name, "weights": weights_hash(downloaded(name, "transformer", "vae"))}


def history(starts: Sequence[Start], steps: int) -> list[tuple[range, Start]]:
    """Which of the first ``steps`` steps each start trained, in order. Steps that were trained anew after a crash count for the
    start that trained them last; steps before the first range are another run's."""
    kept: list[tuple[range, Start]] = []
    for start in starts:
        first = start["resumed_at_step"] or 0
        kept = [(range(each.start, min(each.stop, first)), before) for each, before in kept if each.start < first]
        kept.append((range(first, steps), start))
    return [(each, start) for each, start in kept if each]


def write_lineage(folder: Path, stage: str, step: int, starts: Sequence[Start]) -> None:
    """Write ``lineage.json`` into the directory of a model that ``step`` steps of a run have trained; ``starts``: of it."""
    trained = [start for _, start in history(starts, step)]
    data = [source for start in trained if "data" in start for source in start["data"]["sources"]]
    sources = {source["hash"]: {name: source[name] for name in ("hash", "images", "samples", "weight")} for source in data}
    initial = [start["initial"] for start in starts if "initial" in start][-1:]
    content = {
        "format_version": FORMAT_VERSION,
        "stage": stage,
        "step": step,
        "weights": weights_hash(folder),
        "data": [*sources.values()],
    }
    named = {"initial": initial[0] | {"name": base_name(initial[0]["name"])}} if initial else {}
    write_json(folder / LINEAGE_NAME, content | named)


def read_lineage(folder: Path) -> Lineage | None:
    """What a model's directory says; None for those of other programs and of an older ldm.

    Raises :class:`LdmError` for a broken file, or one of a newer format.
    """
    path = folder / LINEAGE_NAME
    if not path.exists():
        return None
    require_version(read_json(path, dict).get("format_version"), FORMAT_VERSION, f"{path}: the lineage")
    return read_json(path, Lineage)


def copy_lineage(source: Path, folder: Path) -> None:
    """Give a model that has the same weights as that of ``source`` its record, where there is one."""
    if (source / LINEAGE_NAME).is_file():
        shutil.copyfile(source / LINEAGE_NAME, folder / LINEAGE_NAME)


def write_merged_lineage(folder: Path, base: Path, adapters: Sequence[Path]) -> None:
    """Write ``lineage.json`` into the directory of a model whose weights are those of ``base`` with the adapters of these
    files."""
    before = read_lineage(base)
    known = [each for each in (before, *(read_lineage(path.parent) for path in adapters)) if each is not None]
    content = {
        "format_version": FORMAT_VERSION,
        "stage": "denoiser",
        "step": before["step"] if before else 0,
        "weights": weights_hash(folder),
        "data": [*{source["hash"]: source for each in known for source in each["data"]}.values()],
        "initial": {"name": base_name(str(base)), "weights": weights_hash(base)},
        "adapters": [{"name": base_name(str(path.parent)), "weights": sha256_file(path)} for path in adapters],
    }
    write_json(folder / LINEAGE_NAME, content)


def base_name(path: str) -> str:
    """The last part of a path or a URL."""
    if "://" in path:
        try:
            url = urlsplit(path)
        except ValueError:  # a host in half a pair of brackets
            return ""
        path = url.path.strip("/") or url.hostname or ""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


class DataRecord(Callback):
    """Records what a start of a run trains on, once its loader is at the position that it begins at."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = datamodule_of(trainer).loader
        if trainer.is_global_zero and loader is not None:
            amend_start(Path(trainer.default_root_dir), data=loader.record())
