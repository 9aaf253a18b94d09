"""Memory, time and disk of a whole run, from the measurements of a few of its steps: a table and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from lightning import Trainer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from torch import nn

from ldm.data.datamodule import datamodule_of
from ldm.runs.checkpoints.callback import checkpoints_of
from ldm.runs.dry_run.flops import peak_flops
from ldm.runs.dry_run.measure import Measured
from ldm.runs.dry_run.memory import PeakMemory, module_memory, network_parameters
from ldm.runs.layout import RunFolder
from ldm.runs.lightning_private import log_interval
from ldm.terminal import printable
from ldm.training.base import TrainingModule
from ldm.training.encoded import EncodedTraining
from ldm.training.evaluation import evaluation_of
from ldm.training.fsdp import is_sharded

# share of a step spent waiting for data that is worth a warning
WAITING = 0.1

Row = tuple[str, str, str]


@dataclass(frozen=True)
class Total:
    """Of the whole run."""

    seconds: float  # of steps, validations, previews, evaluations and checkpoints
    validations: int
    evaluations: int
    bytes_of: dict[str, tuple[int, str]]  # what it leaves on the disk by name: bytes, and how they come about

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.bytes_of.values())


def total_of(module: TrainingModule, trainer: Trainer, measured: Measured, folder: Path) -> Total:
    """Time and disk of the whole run; ``folder`` is that of the dry run, with its previews and logs."""
    callback = checkpoints_of(trainer)
    every, steps = trainer.val_check_batch, trainer.max_steps
    validations = int(steps // every) if every and math.isfinite(every) else 0
    seconds = sum(kind.steps * kind.seconds for kind in measured.kinds)
    seconds += validations * measured.validation_seconds + (validations + 1) * measured.preview_seconds
    evaluations = steps // evaluation.asked.every if (evaluation := evaluation_of(trainer)) else 0
    seconds += evaluations * measured.evaluation_seconds
    timed = int(seconds / 60 / callback.every_minutes) if callback.every_minutes else 0
    written = 1 + timed + (steps // callback.every_steps if callback.every_steps else validations)
    if not callback.background:
        seconds += written * measured.checkpoint_seconds
    # while one is written the oldest is still there; those of every_minutes stay
    kept = min(callback.keep_last + 1 + (callback.best is not None), written) + timed
    images = max((file.stat().st_size for file in RunFolder(folder).previews_folder.glob("*.png")), default=0)
    rows, logged_rows = (number // log_interval(trainer) for number in (steps, trainer.global_step))
    logged = sum(file.stat().st_size for file in RunFolder(folder).logs.rglob("*") if file.is_file())
    averaged = sum(parameter.numel() * parameter.element_size() for parameter in module.average.averaged)
    # what is trained beside a network is exported without it
    exported = averaged
    if module.artifact not in ("adapter", "embedding"):
        exported = _bytes(module.averaged()) + sum(map(_bytes, _encoders(module).values()))
    bytes_of = {
        "checkpoints": (kept * measured.checkpoint_bytes, f"{kept:,} of {decimal(measured.checkpoint_bytes)}"),
        "previews": (2 * (validations + 1) * images, f"{validations + 1:,} of {decimal(images)}, in TensorBoard too"),
        "logs": (logged * rows // max(logged_rows, 1), f"about, {rows:,} rows"),
        "exported model": (exported, f"the {module.artifact}'s directory"),
    }
    if module.average.snapshot_every:
        number = (steps // module.average.snapshot_every + 1) * len(module.average.power)
        bytes_of["snapshots"] = (number * averaged, f"{number:,} of {decimal(averaged)}; model.power_averages")
    return Total(seconds, validations, evaluations, bytes_of)


def show_costs(module: TrainingModule, trainer: Trainer, measured: Measured, total: Total, free: int, place: Path) -> None:
    """Print the table and the warnings; ``free`` are the bytes free on the disk of ``place``, the run's parent folder."""
    table = Table("", "", "", title=f"dry run of {module.command} fit", show_header=False)
    sections = (
        data_rows(trainer),
        parameter_rows(module),
        memory_rows(module, trainer, measured),
        step_rows(trainer, measured),
        run_rows(measured, total, free, place),
    )
    for rows in sections:
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        table.add_section()
    console = Console()
    console.print(table)
    for warning in warnings_of(trainer, measured, total, free, place):
        console.print(Text.assemble(("warning:", "bold yellow"), f" {printable(warning)}"), soft_wrap=True)


def data_rows(trainer: Trainer) -> Iterable[Row]:
    data = datamodule_of(trainer)
    for name, dataset in (("training data", data.train_set), ("validation data", data.validation_set)):
        for source in dataset.sources:
            manifest = source.manifest
            what = f"{manifest.samples:,} samples in {len(manifest.shards):,} shards, {decimal(manifest.bytes)}"
            yield name, what, source.spec
    samples = trainer.max_steps * _images_per_step(trainer)
    yield "samples trained on", f"{samples:,}", f"{samples / len(data.train_set):.3g} epochs"


def parameter_rows(module: TrainingModule) -> Iterable[Row]:
    for name, (trained, frozen) in network_parameters(module).items():
        of_them = "frozen" if not trained else "trained" if not frozen else f"{trained:,} of them trained"
        yield f"parameters, {name}", f"{trained + frozen:,}", of_them
    for name, network in _encoders(module).items():
        yield f"parameters, {name}", f"{sum(parameter.numel() for parameter in network.parameters()):,}", "frozen"


def memory_rows(module: TrainingModule, trainer: Trainer, measured: Measured) -> Iterable[Row]:
    static = module_memory(module, trainer.world_size if is_sharded(module.averaged()) else 1)
    parts = ", ".join(f"{name} {decimal(int(size))}" for name, size in vars(static).items())
    yield "memory kept, computed", decimal(int(static.total)), parts
    what = PeakMemory(trainer.strategy.root_device).what
    for kind in measured.kinds:
        yield f"peak memory, {kind.name}", decimal(kind.peak_bytes), what
    yield "peak memory, validation", decimal(measured.later_peak_bytes), "and preview"


def step_rows(trainer: Trainer, measured: Measured) -> Iterable[Row]:
    peak = peak_flops(trainer.strategy.root_device, str(trainer.precision))
    images, batch = _images_per_step(trainer), datamodule_of(trainer).mean_batch_size
    for kind in measured.kinds:
        rate, flops = images / kind.seconds, kind.flops / batch
        on_device = flops * rate / trainer.world_size
        mfu = f", MFU {on_device / peak:.1%}" if peak else ""
        yield f"{kind.name}: FLOPs", f"{flops_text(flops)} an image", f"{flops_text(kind.flops_forward / batch)} of it forward"
        yield f"{kind.name}: time", f"{kind.seconds:.3g} s", f"{images:,} images, {kind.waiting:.0%} of it waiting for data"
        yield f"{kind.name}: speed", f"{rate:.3g} images/s", f"{flops_text(on_device)}/s a device{mfu}"


def run_rows(measured: Measured, total: Total, free: int, place: Path) -> Iterable[Row]:
    yield "a validation", f"{measured.validation_seconds:.3g} s", f"{total.validations:,} of them"
    yield "a preview", f"{measured.preview_seconds:.3g} s", f"{total.validations + 1:,} of them"
    if total.evaluations:
        yield "an evaluation", f"{measured.evaluation_seconds:.3g} s", f"{total.evaluations:,} of them, from its first batch"
    yield "a checkpoint", f"{measured.checkpoint_seconds:.3g} s", f"{measured.reading_seconds:.3g} s to read"
    steps = " and ".join(f"{kind.steps:,}" for kind in measured.kinds)
    yield "the whole run", str(timedelta(seconds=round(total.seconds))), f"{steps} steps, validations, previews, checkpoints"
    for name, (size, why) in total.bytes_of.items():
        yield f"disk, {name}", decimal(size), why
    yield "disk, total", decimal(total.bytes), f"{decimal(free)} free in {place}"


def warnings_of(trainer: Trainer, measured: Measured, total: Total, free: int, place: Path) -> Iterable[str]:
    """What to fix before the run."""
    data = datamodule_of(trainer)
    if total.bytes > free:
        largest = max(total.bytes_of, key=lambda name: total.bytes_of[name][0])
        settings = {"checkpoints": "checkpoints.keep_last or every_minutes", "snapshots": "model.power_averages.snapshot_every"}
        yield (
            f"the disk is too small: the run needs {decimal(total.bytes)}, {largest} most of all, and {decimal(free)} are free "
            f"in {place}; make room, give another --out, or change {settings.get(largest, 'trainer.val_check_interval')}"
        )
    trained_on = {source.manifest.hash for source in data.train_set.sources}
    if any(source.manifest.hash in trained_on for source in data.validation_set.sources):
        yield "data.validation is trained on as well: its metrics say nothing about unseen images"
    for kind in measured.kinds:
        if kind.waiting > WAITING:
            yield f"{kind.waiting:.0%} of a {kind.name} is waiting for data; raise data.workers, which is {data.workers}"


def flops_text(flops: float) -> str:
    """With a unit."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}FLOP"
    return f"{flops / 1e6:.3g} MFLOP"


def _images_per_step(trainer: Trainer) -> int:
    """On average."""
    return round(datamodule_of(trainer).mean_batch_size * trainer.world_size)


def _encoders(module: TrainingModule) -> dict[str, nn.Module]:
    """Frozen networks that are no children of the module."""
    if not isinstance(module, EncodedTraining):
        return {}
    texts = nn.ModuleList(encoder.model for encoder in module.encoders.text_encoders)
    return {"autoencoder": module.encoders.autoencoder, "text encoder": texts}


def _bytes(network: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
