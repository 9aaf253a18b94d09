"""``ldm shards``: generate, pack, index, check, show."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.buckets import add_buckets, buckets_of
from ldm.cli.parser import Commands, add_command, add_group
from ldm.errors import LdmError, UsageError, first_line
from ldm.progress import Progress
from ldm.terminal import printable, say

if TYPE_CHECKING:
    from ldm.data.pack.sources import ImageSource


def add(commands: Commands) -> None:
    """Its commands."""
    shards = add_group(commands, "shards", "image shards: generate, pack, index, check, show")
    shapes = add_command(
        shards,
        "shapes",
        run_shapes,
        "generate the built-in data set of coloured shapes",
        "ldm shards shapes shards --count 10000 --size 64",
    )
    shapes.add_argument("out")
    shapes.add_argument("--count", type=int, default=10_000, help="images")
    what = "in pixels: one number, WxH, or several in turn, such as 60x40,48,40x60 (default: 64)"
    shapes.add_argument("--size", default="64", help=what)
    shapes.add_argument("--seed", type=int, default=0)
    shapes.add_argument("--preset", choices=["one", "two"], default="one", help="objects per image")
    shapes.add_argument("--shard-size", type=int, default=1000, help="samples per shard")
    shapes.add_argument("--held-out", action="store_true", help="only the colour-shape pairs that are excluded otherwise")
    pack = add_command(shards, "pack", run_pack, "pack captioned images", "ldm shards pack photos shards --size 256")
    what = "folder of images, each with a .txt, .caption or .json of the same name or a row in metadata.jsonl; a Parquet file "
    pack.add_argument("src", help=what + "with images, or a folder of such; or a folder of datasets' save_to_disk")
    pack.add_argument("out")
    pack.add_argument(
        "--captions", metavar="FILE", help="CSV, TSV, JSONL or Parquet: which images of SRC to pack, with captions"
    )
    what = "of FILE (default: file, file_name), or of Parquet files or a data set (default: image)"
    pack.add_argument("--image-column", metavar="NAME", help=what)
    pack.add_argument(
        "--caption-columns",
        metavar="A,B",
        default="",
        help="of the same (default: caption, captions, text or tags); a cell may hold a list of captions",
    )
    pack.add_argument(
        "--caption-names",
        metavar="A,B",
        default="",
        help="captions that training draws by name, such as short,long: columns of the same, or of a folder the files "
        "photo.short.txt or fields of photo.json; short=brief is called brief there",
    )
    what = "images alone, for an autoencoder: captions are neither read nor stored"
    pack.add_argument("--no-captions", action="store_true", help=what)
    what = "of images that have none: 'a photo of sks dog' (default: such images cannot be used)"
    pack.add_argument("--caption", metavar="TEXT", help=what)
    what = "so many images (500) or such a share (2%%) go to OUT/validation; an image stays there when others are added"
    pack.add_argument("--validation", metavar="N", help=what)
    source = "package.module.Class, a subclass of ldm.data.pack.sources.ImageSource that reads SRC"
    pack.add_argument("--source-class", metavar="CLASS", help=source)
    pack.add_argument("--size", type=int, help="side in pixels")
    pack.add_argument(
        "--resize",
        choices=["square", "shorter", "none"],
        help="scale the shorter side to --size and crop the centre (default with --size), without the crop, or not at all",
    )
    pack.add_argument("--min-size", type=int, metavar="M", help="skip images whose shorter side has fewer pixels")
    pack.add_argument("--keep-bytes", action="store_true", help="store files that need no change as they are, EXIF included")
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
    index = add_command(shards, "index", run_index, "write the manifest of tars from elsewhere", "ldm shards index shards")
    index.add_argument("dir", help="folder of tars, or their URL: https://host/train-{000..099}.tar")
    index.add_argument("--out", help="new folder for the manifest of remote or read-only tars; train on that folder")
    index.add_argument(
        "--key-dot",
        choices=["first", "last"],
        default="first",
        help="dot of a name that ends its key: by the first, as in webdataset, 0.input.jpg is a file of sample 0 that is not "
        "read; by the last, the image of sample 0.input (default: first)",
    )
    check = add_command(shards, "check", run_check, "verify a folder of shards", "ldm shards check shards --deep")
    check.add_argument("dir", help="folder of shards, a pattern of its tars, or a URL of either")
    check.add_argument("--deep", action="store_true", help="also decode every sample")
    show = add_command(
        shards,
        "show",
        run_show,
        "write a page with the images' sizes and what aspect-ratio buckets crop off",
        "ldm shards show shards --out shards.html --buckets 256",
    )
    show.add_argument("dir", help="folder of image shards, a pattern of its tars, or a URL of either")
    show.add_argument("--out", required=True, metavar="FILE", help="the .html file to write")
    add_buckets(show)


def run_shapes(options: argparse.Namespace) -> None:
    from ldm.data.writer import write_images
    from ldm.inference.prompts import parse_size
    from ldm.shapes.scenes import generate

    if options.count < 1:
        raise UsageError(f"--count is {options.count}; give 1 or more")
    sizes = [parse_size(size) for size in str(options.size).split(",")]
    squares = [height if height == width else (height, width) for width, height in sizes]
    images = generate(options.count, squares, options.seed, options.preset, options.held_out)
    extra = {
        "source": f"shapes, preset {options.preset}, seed {options.seed}" + (", held out" if options.held_out else ""),
        "image_size": squares[0] if len(squares) == 1 else options.size,
        "captioned": options.count,
    }
    with Progress("generating shapes", options.count) as progress:
        manifest = write_images(
            options.out, "shapes", images, options.shard_size, extra, options.count, on_progress=progress.update
        )
    say(f"{manifest.samples} images in {len(manifest.shards)} shards: {options.out}")


def run_pack(options: argparse.Namespace) -> None:
    from ldm.data.pack.journal import JOURNAL_NAME, QUARANTINE_NAME
    from ldm.data.pack.packer import VALIDATION_NAME, pack

    try:
        with Progress("packing") as progress:
            result = pack(
                options.src if options.source_class is None else _custom_source(options.source_class, options.src),
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
                caption_columns=_caption_columns(options.caption_columns, options.caption_names),
                with_captions=not options.no_captions,
                default_caption=options.caption,
                validation=options.validation,
                workers=options.workers,
            )
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C or SIGTERM
        if (Path(options.out) / JOURNAL_NAME).is_file():
            say(f"{options.out} holds the shards packed so far; run the same command again to resume", sys.stderr)
        raise
    shards = len(result.manifest.shards) + (0 if result.validation is None else len(result.validation.shards))
    say(f"{result.packed} of {result.found} images in {shards} shards: {options.out}")
    if result.validation is not None:
        say(f"{result.validation.samples} of them are for validation: {Path(options.out) / VALIDATION_NAME}")
    if result.named:
        say("captions: " + ", ".join(f"{count} {printable(name)}" for name, count in result.named.items()))
    if result.quarantined:
        say(f"{result.quarantined} could not be used; {Path(options.out) / QUARANTINE_NAME} says why")
    if result.enlarged:
        say(f"{result.enlarged} were smaller and have been enlarged; --min-size {options.size} skips them")


def _caption_columns(columns: str, names: str) -> list[str] | dict[str, str]:
    """The columns of captions, or the column of each name."""
    given, named = ([part.strip() for part in text.split(",") if part.strip()] for text in (columns, names))
    if given and named:
        raise UsageError("--caption-columns and --caption-names both say where captions are; give one of them")
    pairs = [(name.strip(), called.strip() or name.strip()) for name, _, called in (part.partition("=") for part in named)]
    if len(dict(pairs)) < len(pairs):
        raise UsageError(f"--caption-names {names} has a name twice; give each once")
    return dict(pairs) or given


def _custom_source(class_path: str, src: str) -> ImageSource:
    """An :class:`ImageSource` of the user's own that reads ``src``. Raises :class:`UsageError` for anything else."""
    from ldm.data.pack.sources import ImageSource

    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"--source-class {class_path} cannot be imported ({first_line(error)}); give package.module.Class, and its folder "
            "in PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, ImageSource)):
        raise UsageError(f"--source-class {class_path} is no subclass of ldm.data.pack.sources.ImageSource; make it one")
    return found(src)


def run_index(options: argparse.Namespace) -> None:
    from ldm.data.check import compressed_tars, index_elsewhere, index_here

    with Progress("indexing") as progress:
        if options.out is not None:
            manifest, path = index_elsewhere(options.dir, options.out, progress.update, options.key_dot)
        elif "://" in options.dir:
            raise UsageError(f"{options.dir} is remote; give a folder for its manifest with --out")
        else:
            manifest, path = index_here(options.dir, progress.update, options.key_dot)
    say(f"{manifest.samples} samples in {len(manifest.shards)} shards: {path}")
    extra, details = manifest.extra, f"`ldm shards check {path.parent}` names them"
    if unusable := extra["unusable"]:
        say(f"{unusable} of them have no image or a duplicate key and are skipped; {details}")
    if without := manifest.samples - unusable - extra["captioned"]:
        say(f"{without} have no caption" if manifest.captioned else "none has a caption: they can train an autoencoder only")
    if unread := extra.get("unread_images"):
        say(f"{unread} more images are in no sample, such as {printable('; '.join(extra['unread_such_as']))}; {details}")
    if "://" not in options.dir and (others := compressed_tars(options.dir)):
        say(f"{len(others)} files are not read, such as {printable(others[0])}: shards are uncompressed and end in .tar")


def run_show(options: argparse.Namespace) -> None:
    from ldm.latents.show_images import show_images

    show_images(options.dir, options.out, buckets_of(options))
    say(f"the page: {options.out}")


def run_check(options: argparse.Namespace) -> None:
    if count := check(options.dir, options.deep):
        raise LdmError(f"{options.dir}: {count} problem(s)")
    what = "every sample decodes" if options.deep else "names, sizes, hashes and counts agree with the manifest"
    say(f"{options.dir} is complete: {what}")


def check(folder: str, deep: bool) -> int:
    """Print a table of the shards and all problems found; returns the number of problems."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ldm.data.check import check_folder

    with Progress("checking") as progress:
        folder_problems, shards = check_folder(folder, deep, on_progress=progress.update)
    table = Table("shard", "samples", "usable", "bytes", "state")
    for shard in shards:
        state = "complete" if not shard.problems else f"{len(shard.problems)} problem(s)"
        name = Text(printable(shard.entry.name))  # not markup
        table.add_row(name, str(shard.entry.samples), str(shard.good), f"{shard.entry.bytes:,}", state)
    Console().print(table)
    problems = [*folder_problems, *(problem for shard in shards for problem in shard.problems)]
    for problem in problems:
        say(printable(problem))
    return len(problems)
