"""``ldm adapter``: show, merge, resize and extract low-rank adapters."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.parser import Commands, add_command, add_force, add_group, print_table
from ldm.errors import UsageError
from ldm.terminal import printable, say

if TYPE_CHECKING:
    from ldm.models.adapter_file import Record
    from ldm.models.low_rank import LowRank
    from ldm.runs.initial import DirectoryWeights

LISTED = 5  # weights that are not in an extracted adapter


def add(commands: Commands) -> None:
    group = add_group(commands, "adapter", "show, merge, resize and extract low-rank adapters (LoRA)")
    show = add_command(
        group,
        "show",
        run_show,
        "what a file of an adapter says of itself: its base, rank, training, trigger words",
        "ldm adapter show runs/lora/adapter",
    )
    show.add_argument("file", help=".safetensors file of an adapter, or its folder")
    show.add_argument("--json", action="store_true", help="as JSON, with all metadata and the rank of every layer")

    merge = add_command(
        group,
        "merge",
        run_merge,
        "a model with adapters added to its weights, which every program opens that opens the model",
        "ldm adapter merge pipeline runs/lora/adapter=0.8 runs/style/adapter merged",
    )
    merge.add_argument("base", help="pipeline directory, or that of a denoiser; an LDM's or PixArt's")
    merge.add_argument(
        "adapters", nargs="+", metavar="FILE[=W]", help="file or folder of an adapter, and its weight (default: 1)"
    )
    merge.add_argument("out", type=Path, help="new folder")
    add_force(merge)

    extract = add_command(
        group,
        "extract",
        run_extract,
        "an adapter out of a fine-tuned model: the low-rank part of what it has more than its base",
        "ldm adapter extract runs/tuned/pipeline pipeline adapter --rank 16",
    )
    extract.add_argument("tuned", help="directory of the fine-tuned pipeline or denoiser")
    extract.add_argument("base", help="directory of the one that it was trained from")
    extract.add_argument("out", type=Path, help="new folder")
    extract.add_argument("--rank", type=int, required=True, metavar="R", help="of every layer, at most")

    resize = add_command(
        group, "resize", run_resize, "the same adapter with a lower rank", "ldm adapter resize adapter small --rank 4"
    )
    resize.add_argument("file", help=".safetensors file of an adapter, or its folder")
    resize.add_argument("out", type=Path, help="new folder")
    resize.add_argument("--rank", type=int, required=True, metavar="R", help="of every layer, at most")


def run_show(options: argparse.Namespace) -> None:
    import json

    from ldm.models.adapter_file import describe

    described = describe(options.file)
    if options.json:
        say(json.dumps(described, indent=2))
        return
    print_table({name: [value] for name, value in _rows(described)}, "value", first="adapter")


def _rows(described: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Lines of a table; a mapping has one for each of its entries."""
    for name, value in described.items():
        if name in ("metadata", "ranks", "target_modules"):
            continue
        if isinstance(value, Mapping):
            yield from _rows(value, f"{above}{name}: ")
        elif isinstance(value, list):
            yield f"{above}{name}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{above}{name}", f"{value:,}" if type(value) is int else str(value)


def run_merge(options: argparse.Namespace) -> None:
    from ldm.files import atomic_folder, require_new_folder
    from ldm.inference.settings import split_lora
    from ldm.models.adapter_file import AdapterFile, merge_into
    from ldm.runs.lineage import write_merged_lineage

    require_new_folder(options.out, "the model")
    base = _directory(options.base)
    given = [split_lora(adapter) for adapter in options.adapters]
    adapters = [(AdapterFile.read(file), 1.0 if weight is None else weight) for file, weight in given]
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            raise UsageError(f"the weight of {adapter.source} is {weight}; give a finite number")
    network = base.network()
    for adapter, _ in adapters:
        adapter.require_fits(network, options.force)
    merge_into(network, adapters)
    with atomic_folder(options.out) as folder:
        base.copy_with(network, folder)
        write_merged_lineage(folder, base.place, [adapter.path for adapter, _ in adapters])
    say(f"model: {printable(options.out)}")


def run_extract(options: argparse.Namespace) -> None:
    from ldm.models.adapter_file import RECORD_VERSION
    from ldm.models.adapters import base_of
    from ldm.models.directories import model_name
    from ldm.models.low_rank import difference
    from ldm.progress import Progress

    _require_rank(options)
    tuned, base = _directory(options.tuned).network(), _directory(options.base).network()
    with Progress("weights", len([*base.parameters()])) as progress:
        found = difference(tuned, base, options.rank, progress.update)
    extracted = {"from": model_name(options.tuned), "rank": options.rank, "kept": round(found.kept, 6)}
    record: Record = {
        "format_version": RECORD_VERSION,
        "base": base_of(base, model_name(options.base)),
        "trigger_words": [],
        "training": {"extracted": extracted},
    }
    _write(options.out, found, record)
    if found.left_out:
        largest = sorted(found.left_out.items(), key=lambda entry: -entry[1])[:LISTED]
        named = ", ".join(f"{name} ({change:.1%})" for name, change in largest)
        say(f"an adapter cannot hold {len(found.left_out)} weights that differ, too (change, relative to their size): {named}")


def run_resize(options: argparse.Namespace) -> None:
    from ldm.models.adapter_file import AdapterFile
    from ldm.models.low_rank import resized

    _require_rank(options)
    adapter = AdapterFile.read(options.file)
    found, record = resized(adapter, options.rank), adapter.record
    if record is not None:
        record["training"]["resized_from"] = {"rank": adapter.rank, "kept": round(found.kept, 6)}
    _write(options.out, found, record, adapter.metadata)


def _directory(name: str) -> DirectoryWeights:
    """The model of a directory or of a name on the hub."""
    from ldm.runs.initial import DirectoryWeights, initial_weights

    found = initial_weights(name)
    if not isinstance(found, DirectoryWeights):
        raise UsageError(f"{name} is a run; give the pipeline that it exported")
    return found


def _require_rank(options: argparse.Namespace) -> None:
    from ldm.files import require_new_folder

    if options.rank < 1:
        raise UsageError(f"--rank is {options.rank}; give 1 or more")
    require_new_folder(options.out, "the adapter")


def _write(out: Path, found: LowRank, record: Record | None, metadata: Mapping[str, str] | None = None) -> None:
    from ldm.files import atomic_folder
    from ldm.models.adapter_file import write_adapter

    with atomic_folder(out) as folder:
        write_adapter(folder, found.tensors, found.config, record, metadata)
    say(f"rank {found.rank}, with {found.kept:.2%} of the squared change of the weights: {printable(out)}")
