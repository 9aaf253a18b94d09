"""``ldm latents``: export, check, show, import, decode."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.buckets import add_buckets, buckets_of
from ldm.cli.parser import Commands, Parser, add_command, add_group, print_table
from ldm.errors import LdmError, UsageError, first_line
from ldm.progress import Progress
from ldm.terminal import printable, say

if TYPE_CHECKING:
    import torch

    from ldm.data.manifest import Manifest
    from ldm.models.text_encoder import TextEncoderConfig


def add(commands: Commands) -> None:
    """Its commands."""
    latents = add_group(commands, "latents", "latent shards: export, check, show, import, decode")
    export = add_command(
        latents,
        "export",
        run_export,
        "encode image shards and their captions",
        "ldm latents export --autoencoder runs/autoencoder/autoencoder --shards shards --out latents",
    )
    where = "directory of an autoencoder, or its name on the hub; identity: pixels"
    export.add_argument("--autoencoder", required=True, help=where)
    export.add_argument("--shards", required=True, help="folder of image shards")
    export.add_argument("--out", required=True, help="a new folder, or that of an interrupted export with the same settings")
    add_text_encoder(export)
    export.add_argument("--image-size", type=int, help="crop and resize to this side in pixels (default: keep the size)")
    add_buckets(export)
    export.add_argument("--mode", action="store_true", help="store the posterior's mode only, without the standard deviation")
    export.add_argument("--flip", action="store_true", help="also store the latents of mirrored images")
    captions = "of each image: first (default), all, or names: fields of its .json, or txt (for data.caption by weight)"
    export.add_argument("--captions", nargs="+", default=["first"], metavar="WHICH", help=captions)
    add_dtype(export)
    precision = "of the computation: bf16 and fp16 for GPUs, bf16 also for CPUs that support it (default: fp32)"
    export.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help=precision)
    export.add_argument("--batch-size", type=int, default=64, help="images per forward pass (default: 64)")
    export.add_argument("--threads", type=int, help="of this process (default: one per CPU core)")
    export.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: this process's own GPU, or the CPU)")
    export.add_argument("--max-bad-share", type=float, default=0.01, help="unusable samples tolerated (default: 0.01)")
    keep = "also write mean and standard deviation per channel into the autoencoder's config"
    export.add_argument("--keep-statistics", action="store_true", help=keep)

    check = add_command(
        latents,
        "check",
        run_check,
        "verify a folder of latents, and compare it with its images",
        "ldm latents check latents --deep --autoencoder runs/autoencoder/autoencoder",
    )
    check.add_argument("dir", help="folder of latent shards")
    check.add_argument("--deep", action="store_true", help="also check every tensor")
    decode = "also decode a sample of the latents, encode their images again where available, and compare"
    check.add_argument("--autoencoder", metavar="DIR", help=decode)
    add_sampled(check, 64)

    show = add_command(
        latents,
        "show",
        run_show,
        "write a page with decoded images, channels, histograms and captions",
        "ldm latents show latents --out latents.html --autoencoder runs/autoencoder/autoencoder",
    )
    show.add_argument("dir", help="folder of latent shards")
    show.add_argument("--out", required=True, metavar="FILE", help="the .html file to write")
    show.add_argument("--autoencoder", metavar="DIR", help="to decode a sample of the latents")
    add_sampled(show, 256)

    importing = add_command(
        latents,
        "import",
        run_import,
        "make latent shards from another codebase's latents: LightningDiT's safetensors, or one .npy or .pt per image",
        "ldm latents import features latents --autoencoder sd-vae --captions classes.txt",
    )
    importing.add_argument("src", help="folder of the other codebase's latents")
    importing.add_argument("out", help="a new folder")
    importing.add_argument("--autoencoder", required=True, metavar="DIR", help="the autoencoder that encoded the latents")
    captions = "the caption of each class (.txt, .json), or a table with columns file, caption (default: a .txt beside each)"
    importing.add_argument("--captions", metavar="FILE", help=captions)
    scaled = "the latents were multiplied by the autoencoder's scaling factor: undo that"
    importing.add_argument("--scaled", action="store_true", help=scaled)
    add_text_encoder(importing)
    add_dtype(importing)
    importing.add_argument("--samples-per-shard", type=int, default=1000, help="default: 1000")

    decode = add_command(
        latents,
        "decode",
        run_decode,
        "decode latents to images",
        "ldm latents decode latents images --autoencoder runs/autoencoder/autoencoder --samples 100",
    )
    decode.add_argument("dir", help="folder of latent shards")
    decode.add_argument("out", help="a new folder for the PNGs and captions.jsonl")
    decode.add_argument("--autoencoder", required=True, metavar="DIR", help="the autoencoder that encoded the latents")
    decode.add_argument("--samples", type=int, help="decode the first so many (default: all)")
    decode.add_argument("--flips", action="store_true", help="also decode the latents of mirrored images")
    decode.add_argument("--batch-size", type=int, default=16, help="latents per forward pass (default: 16)")


def add_text_encoder(parser: Parser) -> None:
    what = (
        "minilm, a directory, a hub name, a .txt of class names (label embedding) or none (unconditional); with several, each "
        "encodes every caption (default: minilm). For a name also: '{name: NAME, layer: -2, prefix: TEXT, max_tokens: 300}'"
    )
    parser.add_argument("--text-encoder", nargs="+", metavar="NAME", default=["minilm"], help=what)


def text_encoders_of(given: Sequence[str]) -> list[str | TextEncoderConfig]:
    """What ``--text-encoder`` names; a YAML mapping as its config. Raises UsageError for another mapping."""
    import json

    import yaml
    from pydantic import TypeAdapter, ValidationError

    from ldm.files import check_yaml
    from ldm.models.text_encoder import TextEncoderConfig

    found: list[str | TextEncoderConfig] = []
    for one in given:
        if not one.lstrip().startswith("{"):
            found.append(one)
            continue
        try:
            check_yaml(one)
            found.append(
                TypeAdapter(TextEncoderConfig).validate_json(json.dumps(yaml.safe_load(one)), strict=True, extra="forbid")
            )
        except (yaml.YAMLError, TypeError, ValidationError) as error:
            fix = "give {name: NAME, layer: -2, prefix: TEXT, max_tokens: 300}, of which all but the name may be left out"
            raise UsageError(f"--text-encoder {printable(one)[:200]}: {first_line(error)}; {fix}") from None
    return found


def add_dtype(parser: Parser) -> None:
    what = "of the stored tensors (default: float16)"
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help=what)


def add_sampled(parser: Parser, samples: int) -> None:
    where = "the image shards they were encoded from (default: where they were at the export)"
    parser.add_argument("--shards", metavar="DIR", help=where)
    parser.add_argument("--samples", type=int, default=samples, help=f"latents to sample (default: {samples})")


def run_export(options: argparse.Namespace) -> None:
    from ldm.latents.compute import Process
    from ldm.latents.export import export_latents

    first = Process.from_environment().rank == 0
    with Progress("exporting latents", quiet=not first) as progress:
        manifest = export_latents(
            options.autoencoder,
            options.shards,
            options.out,
            text_encoders_of(options.text_encoder),
            options.batch_size,
            options.dtype,
            options.image_size,
            options.device,
            progress.update,
            precision=options.precision,
            mode=options.mode,
            flip=options.flip,
            captions=options.captions if options.captions not in (["first"], ["all"]) else options.captions[0],
            max_bad_share=options.max_bad_share,
            keep_statistics=options.keep_statistics,
            threads=options.threads,
            buckets=buckets_of(options),
        )
    if first:
        print_counts(manifest, options.out)


def print_counts(manifest: Manifest, out: str) -> None:
    """Latents written, images skipped, captions truncated."""
    say(f"{manifest.samples} latents in {len(manifest.shards)} shards: {out}")
    if skipped := manifest.extra["quarantined"]:
        say(f"{skipped} could not be used; {Path(out) / 'quarantine.jsonl'} says why")
    if small := manifest.extra.get("too_small"):
        say(f"{small} of these are too small for every bucket; --max-upscale allows to enlarge them")
    if cropped := manifest.extra.get("too_long"):
        say(f"{cropped} of these would be cropped too much in every bucket; --max-crop allows more")
    if enlarged := manifest.extra.get("enlarged"):
        say(f"{enlarged} were enlarged to fill their buckets")
    for encoder in manifest.extra["text_encoders"]:
        if encoder["cut"]:
            which = f"{encoder['max_tokens']} tokens of {printable(encoder['name'])}"
            say(f"{encoder['cut']} captions were truncated to the {which}")


def run_check(options: argparse.Namespace) -> None:
    from ldm.cli.shards import check
    from ldm.data.manifest import LATENT_SHARDS, Manifest
    from ldm.latents.check import compare

    if options.shards is not None and options.autoencoder is None:
        raise UsageError("--shards compares latents with images, which needs the autoencoder; give --autoencoder too")
    Manifest.load(options.dir, LATENT_SHARDS)
    count = check(options.dir, options.deep)
    found = "every latent is finite" if options.deep else "names, sizes, hashes and counts agree with the manifest"
    if not count and options.autoencoder is not None:
        with Progress("comparing") as progress:
            comparison = compare(
                options.dir, options.autoencoder, options.shards, options.samples, default_device(), progress.update
            )
        if views := comparison.measured:
            metrics = next(iter(views.values()))
            print_table({metric: [f"{view[metric]:.4g}" for view in views.values()] for metric in metrics}, *views)
        for problem in comparison.problems:
            say(printable(problem))
        if comparison.note:
            say(printable(comparison.note))
        count = len(comparison.problems)
        found += f"; {comparison.decoded} decoded, {comparison.compared} of their images encoded again"
    if count:
        raise LdmError(f"{options.dir}: {count} problem(s)")
    say(f"{options.dir} is complete: {found}")


def run_show(options: argparse.Namespace) -> None:
    from ldm.latents.show import show

    with Progress("sampling latents") as progress:
        show(options.dir, options.out, options.autoencoder, options.shards, options.samples, default_device(), progress.update)
    say(f"the page: {options.out}")


def run_import(options: argparse.Namespace) -> None:
    from ldm.latents.importing import import_latents

    with Progress("importing latents") as progress:
        manifest = import_latents(
            options.src,
            options.out,
            options.autoencoder,
            text_encoders_of(options.text_encoder),
            options.captions,
            options.scaled,
            options.dtype,
            options.samples_per_shard,
            on_progress=progress.update,
        )
    print_counts(manifest, options.out)


def run_decode(options: argparse.Namespace) -> None:
    from ldm.latents.decode import decode_latent_shards

    with Progress("decoding latents") as progress:
        count = decode_latent_shards(
            options.dir,
            options.out,
            options.autoencoder,
            options.samples,
            options.flips,
            batch_size=options.batch_size,
            on_progress=progress.update,
        )
    say(f"{count} images and captions.jsonl: {options.out}")


def default_device() -> torch.device:
    from ldm.latents.compute import Process

    return Process.from_environment().device()
