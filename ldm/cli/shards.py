"""``ldm shards``: draw, pack, index, check."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm.cli.parser import Commands, add_command, add_group
from ldm.errors import LdmError, UsageError
from ldm.progress import Progress


def add(commands: Commands) -> None:
    """Its commands."""
    shards = add_group(commands, "shards", "image shards: draw, pack, index, check")
    shapes = add_command(
        shards, "shapes", run_shapes, "draw the built-in data set", "ldm shards shapes shards --count 10000 --size 64"
    )
    shapes.add_argument("out")
    shapes.add_argument("--count", type=int, default=10_000, help="images")
    shapes.add_argument("--size", type=int, default=64, help="side in pixels")
    shapes.add_argument("--seed", type=int, default=0)
    shapes.add_argument("--preset", choices=["one", "two"], default="one", help="objects per image")
    shapes.add_argument("--shard-size", type=int, default=1000, help="samples per shard")
    shapes.add_argument("--held-out", action="store_true", help="just the colour-shape pairs that are never drawn otherwise")
    pack = add_command(shards, "pack", run_pack, "pack captioned images", "ldm shards pack photos shards --size 256")
    pack.add_argument("src", help="folder of images, each with a .txt of the same name, or what datasets' save_to_disk wrote")
    pack.add_argument("out")
    pack.add_argument("--captions", metavar="FILE", help="CSV, JSONL or Parquet: which images of SRC to pack, with captions")
    pack.add_argument("--image-column", metavar="NAME", help="of FILE (default: file) or the data set (default: image)")
    pack.add_argument(
        "--caption-columns",
        metavar="A,B",
        default="",
        help="of FILE or the data set (default: caption); a cell may hold a list of captions",
    )
    pack.add_argument("--size", type=int, help="side in pixels")
    pack.add_argument(
        "--resize",
        choices=["square", "shorter", "none"],
        help="shorter side to --size and the centre cut out (default with --size), or without the cut, or as it is",
    )
    pack.add_argument("--min-size", type=int, metavar="M", help="leave out images whose shorter side has fewer pixels")
    pack.add_argument("--keep-bytes", action="store_true", help="keep files that need no change as they are, their EXIF too")
    pack.add_argument(
        "--format",
        choices=["auto", "jpg", "png", "webp"],
        default="auto",
        help="default: auto, which is png up to 128 pixels a side and jpg above",
    )
    pack.add_argument("--quality", type=int, default=95, help="of jpg and webp (default: 95)")
    pack.add_argument("--background", default="white", help="of transparent images: white, black or #rrggbb (default: white)")
    pack.add_argument("--shard-size", default="1000", help="samples (1000) or bytes (256MB, 1GB) per shard (default: 1000)")
    pack.add_argument("--workers", type=int, help="threads (default: as many as CPU cores)")
    index = add_command(shards, "index", run_index, "make the manifest of tars from elsewhere", "ldm shards index shards")
    index.add_argument("dir", help="folder of tars, or a URL of some: https://host/train-{000..099}.tar")
    index.add_argument("--out", help="folder for the manifest of a URL's tars; give that folder to training")
    check = add_command(shards, "check", run_check, "prove that a shard folder is whole", "ldm shards check shards --deep")
    check.add_argument("dir")
    check.add_argument("--deep", action="store_true", help="also decode every sample")


def run_shapes(options: argparse.Namespace) -> None:
    from ldm.data.writer import write_images
    from ldm.shapes.scenes import generate

    if options.count < 1:
        raise UsageError(f"--count is {options.count}; give 1 or more")
    drawn = generate(options.count, options.size, options.seed, options.preset, options.held_out)
    extra = {
        "source": f"shapes, preset {options.preset}, seed {options.seed}" + (", held out" if options.held_out else ""),
        "image_size": options.size,
        "captioned": options.count,
    }
    with Progress("drawing shapes", options.count) as progress:
        manifest = write_images(
            options.out, "shapes", drawn, options.shard_size, extra, options.count, on_progress=progress.update
        )
    print(f"{manifest.samples} images in {len(manifest.shards)} shards: {options.out}")


def run_pack(options: argparse.Namespace) -> None:
    from ldm.data.pack.journal import JOURNAL_NAME, QUARANTINE_NAME
    from ldm.data.pack.packer import pack

    try:
        with Progress("packing") as progress:
            result = pack(
                options.src,
                options.out,
                options.captions,
                options.size,
                options.shard_size,
                on_progress=progress.update,
                resize=options.resize,
                min_size=options.min_size,
                keep_bytes=options.keep_bytes,
                format=options.format,
                quality=options.quality,
                background=options.background,
                image_column=options.image_column,
                caption_columns=[column.strip() for column in options.caption_columns.split(",") if column.strip()],
                workers=options.workers,
            )
    except KeyboardInterrupt:
        if (Path(options.out) / JOURNAL_NAME).is_file():
            print(f"{options.out} holds the shards made so far; the same command goes on from there", file=sys.stderr)
        raise
    print(f"{result.packed} of {result.found} images in {len(result.manifest.shards)} shards: {options.out}")
    if result.quarantined:
        print(f"{result.quarantined} could not be used; {Path(options.out) / QUARANTINE_NAME} says why")
    if result.enlarged:
        print(f"{result.enlarged} were smaller and have been enlarged; --min-size {options.size} leaves them out")


def run_index(options: argparse.Namespace) -> None:
    from ldm.data.check import index_folder, index_remote

    with Progress("indexing") as progress:
        if options.out is not None or "://" in options.dir:
            if options.out is None:
                raise UsageError(f"{options.dir} is remote; say with --out in which folder its manifest goes")
            manifest, path = index_remote(options.dir, options.out, on_progress=progress.update)
        else:
            manifest = index_folder(options.dir, on_progress=progress.update)
            path = manifest.save(options.dir)
    print(f"{manifest.samples} samples in {len(manifest.shards)} shards: {path}")
    if unusable := manifest.extra["unusable"]:
        print(
            f"{unusable} of them have no image or come twice and will be left out; `ldm shards check {path.parent}` names them"
        )


def run_check(options: argparse.Namespace) -> None:
    if count := check(options.dir, options.deep):
        raise LdmError(f"{options.dir}: {count} problem(s)")
    what = "every sample decodes" if options.deep else "names, sizes, hashes and counts agree with the manifest"
    print(f"{options.dir} is whole: {what}")


def check(folder: str, deep: bool) -> int:
    """Print what is found of a shard folder; returns how many problems."""
    from rich.console import Console
    from rich.table import Table

    from ldm.data.check import check_folder

    with Progress("checking") as progress:
        folder_problems, shards = check_folder(folder, deep, on_progress=progress.update)
    table = Table("shard", "samples", "usable", "bytes", "state")
    for shard in shards:
        state = "whole" if not shard.problems else f"{len(shard.problems)} problem(s)"
        table.add_row(shard.entry.name, str(shard.entry.samples), str(shard.good), f"{shard.entry.bytes:,}", state)
    Console().print(table)
    problems = [*folder_problems, *(problem for shard in shards for problem in shard.problems)]
    for problem in problems:
        print(problem)
    return len(problems)
