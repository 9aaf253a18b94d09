"""The command line: arguments -> the floors below. Every error that a user can mend is one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm import __version__
from ldm.errors import LdmError, UsageError
from ldm.progress import Progress

EXAMPLE = """example:
  ldm quickstart --out quickstart          the whole path on built-in pictures, with a report to look at
  ldm shards pack photos shards --size 256
  ldm autoencoder fit --config configs/emoji/autoencoder.yaml --out runs/autoencoder
  ldm latents export --autoencoder runs/autoencoder/autoencoder --shards shards --out latents
  ldm denoiser fit --config configs/emoji/denoiser.yaml --out runs/denoiser
  ldm sample runs/denoiser/pipeline "red heart" --out pictures
"""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, as every other error of ours."""

    def error(self, message: str) -> None:
        raise UsageError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Every command but the two ``fit``, which LightningCLI parses."""
    parser = Parser("ldm", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"ldm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(group: argparse._SubParsersAction, name: str, run: object, help: str, example: str) -> Parser:
        added = group.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    def group(name: str, help: str) -> argparse._SubParsersAction:
        return commands.add_parser(name, help=help).add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    quickstart = command(
        commands,
        "quickstart",
        run_quickstart,
        "the whole path on the built-in shapes, with a report",
        "ldm quickstart --minutes 10",
    )
    quickstart.add_argument("--out", default="quickstart", help="folder of everything it makes (default: quickstart)")
    quickstart.add_argument(
        "--minutes", type=float, default=10.0, help="time to aim at; more gives better pictures (default: 10)"
    )
    quickstart.add_argument("--seed", type=int, default=0)

    shards = group("shards", "image shards: draw, pack, index, check")
    shapes = command(
        shards, "shapes", run_shapes, "draw the built-in data set", "ldm shards shapes shards --count 10000 --size 64"
    )
    shapes.add_argument("out")
    shapes.add_argument("--count", type=int, default=10_000, help="pictures")
    shapes.add_argument("--size", type=int, default=64, help="side in pixels")
    shapes.add_argument("--seed", type=int, default=0)
    shapes.add_argument("--preset", choices=["one", "two"], default="one", help="objects per picture")
    shapes.add_argument("--shard-size", type=int, default=1000, help="samples per shard")
    shapes.add_argument("--held-out", action="store_true", help="just the colour-shape pairs that are never drawn otherwise")
    pack = command(shards, "pack", run_pack, "pack captioned images", "ldm shards pack photos shards --size 256")
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
    index = command(shards, "index", run_index, "make the manifest of tars from elsewhere", "ldm shards index shards")
    index.add_argument("dir", help="folder of tars, or a URL of some: https://host/train-{000..099}.tar")
    index.add_argument("--out", help="folder for the manifest of a URL's tars; give that folder to training")
    check = command(shards, "check", run_check, "prove that a shard folder is whole", "ldm shards check shards --deep")
    check.add_argument("dir")
    check.add_argument("--deep", action="store_true", help="also decode every sample")

    latents = group("latents", "latent shards: export")
    export = command(
        latents,
        "export",
        run_export,
        "encode image shards and their captions once",
        "ldm latents export --autoencoder runs/autoencoder/autoencoder --shards shards --out latents",
    )
    export.add_argument("--autoencoder", required=True, help="directory of an AutoencoderKL")
    export.add_argument("--shards", required=True, help="folder of image shards")
    export.add_argument("--out", required=True)
    export.add_argument("--text-encoder", default="minilm", help="minilm, a directory or a hub name (default: minilm)")
    export.add_argument("--batch-size", type=int, default=64)
    export.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="of what is stored")
    export.add_argument("--image-size", type=int, help="fit pictures to this side in pixels")

    sample = command(
        commands,
        "sample",
        run_sample,
        "draw pictures from words",
        'ldm sample pipeline "a red ring" --out pictures --seed 1',
    )
    sample.add_argument("model", help="pipeline directory")
    sample.add_argument("prompts", nargs="+", metavar="prompt")
    sample.add_argument("--out", required=True, help="new folder for the pictures and their grid")
    sample.add_argument("--steps", type=int, default=30, help="calls of the denoiser (default: 30)")
    sample.add_argument("--guidance", type=float, default=3.0, help="guidance scale; 1 is none (default: 3)")
    sample.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count on")
    sample.add_argument("--count", type=int, default=1, help="pictures per prompt")
    sample.add_argument("--negative", default="", help="what to lead away from")

    evaluate = group("evaluate", "figures of a trained model")
    autoencoder = command(
        evaluate,
        "autoencoder",
        run_evaluate_autoencoder,
        "PSNR, SSIM, LPIPS and FID of reconstructions, and the health of the latents",
        "ldm evaluate autoencoder runs/autoencoder/autoencoder sd-vae --shards validation --fid alex-random",
    )
    autoencoder.add_argument("models", nargs="+", metavar="model", help="directories of AutoencoderKLs, shown side by side")
    autoencoder.add_argument("--shards", required=True, help="folder of image shards")
    autoencoder.add_argument("--samples", type=int, default=256, help="the first so many pictures (default: 256)")
    autoencoder.add_argument("--image-size", type=int, help="fit pictures to this side in pixels (default: whole pictures)")
    autoencoder.add_argument("--lpips", metavar="WEIGHTS", default="random", help="random (default), pretrained or a path")
    autoencoder.add_argument("--lpips-trunk", choices=["alex", "vgg"], default="alex", help="default: alex")
    autoencoder.add_argument(
        "--fid",
        metavar="TRUNK",
        help="also a FID, by inception, alex-random, vgg-random or torchvision's checkpoint of alexnet or vgg16",
    )
    autoencoder.add_argument("--json", metavar="FILE", help="write every figure there, too; -: to stdout, without the table")
    pipeline = command(
        evaluate,
        "pipeline",
        run_evaluate_pipeline,
        "prompt accuracy on held-out shapes, read back from the pixels",
        "ldm evaluate pipeline quickstart/pipeline --prompts 256",
    )
    pipeline.add_argument("model", help="pipeline directory")
    pipeline.add_argument("--preset", choices=["one", "two"], default="one")
    pipeline.add_argument("--prompts", type=int, default=256, help="how many")
    pipeline.add_argument("--seen", action="store_true", help="prompts of the kind trained on, instead of held-out ones")
    pipeline.add_argument("--steps", type=int, default=30)
    pipeline.add_argument("--guidance", type=float, default=3.0)
    pipeline.add_argument("--seed", type=int, default=0)
    for name, what in (("autoencoder", "stage one"), ("denoiser", "stage two")):
        commands.add_parser(name, help=f"{what}: ldm {name} fit --config FILE --out DIR, ldm {name} export DIR OUT")
    return parser


def run_quickstart(options: argparse.Namespace) -> None:
    from ldm.quickstart import quickstart

    quickstart(Path(options.out), options.minutes, options.seed, run=dispatch)


def run_shapes(options: argparse.Namespace) -> None:
    from ldm.data.shapes import generate
    from ldm.data.writer import write_images

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
    print(f"{manifest.samples} pictures in {len(manifest.shards)} shards: {options.out}")


def run_pack(options: argparse.Namespace) -> None:
    from ldm.data.pack import pack
    from ldm.data.pack_journal import JOURNAL_NAME, QUARANTINE_NAME

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
    print(f"{result.packed} of {result.found} pictures in {len(result.manifest.shards)} shards: {options.out}")
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
    from rich.console import Console
    from rich.table import Table

    from ldm.data.check import check_folder

    with Progress("checking") as progress:
        folder_problems, shards = check_folder(options.dir, options.deep, on_progress=progress.update)
    table = Table("shard", "samples", "usable", "bytes", "state")
    for shard in shards:
        state = "whole" if not shard.problems else f"{len(shard.problems)} problem(s)"
        table.add_row(shard.entry.name, str(shard.entry.samples), str(shard.good), f"{shard.entry.bytes:,}", state)
    Console().print(table)
    problems = [*folder_problems, *(problem for shard in shards for problem in shard.problems)]
    for problem in problems:
        print(problem)
    if problems:
        raise LdmError(f"{options.dir}: {len(problems)} problem(s)")
    what = "every sample decodes" if options.deep else "names, sizes, hashes and counts agree with the manifest"
    print(f"{options.dir} is whole: {what}")


def run_export(options: argparse.Namespace) -> None:
    import torch

    from ldm.export import export_latents

    with Progress("exporting latents") as progress:
        manifest = export_latents(
            options.autoencoder,
            options.shards,
            options.out,
            options.text_encoder,
            options.batch_size,
            options.dtype,
            options.image_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            on_progress=progress.update,
        )
    print(f"{manifest.samples} latents in {len(manifest.shards)} shards: {options.out}")


def run_sample(options: argparse.Namespace) -> None:
    from ldm.evaluate import draw
    from ldm.files import atomic_folder, require_new_folder
    from ldm.pipeline import load_pipeline
    from ldm.report import captioned_grid

    for name, least in (("steps", 1), ("count", 1)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name} is {getattr(options, name)}; give {least} or more")
    if not 0 <= options.seed < 2**63:
        raise UsageError(f"--seed is {options.seed}; give a number from 0 to {2**63 - 1}")
    out = require_new_folder(options.out, "the pictures")
    pipeline = load_pipeline(options.model)
    prompts = [prompt for prompt in options.prompts for _ in range(options.count)]
    for prompt in (*options.prompts, *filter(None, [options.negative])):
        pipeline.check_prompt(prompt)
    # the folder first: that it cannot be written should be known before an hour of drawing
    with atomic_folder(out) as folder:
        with Progress("drawing", len(prompts)) as progress:
            pictures = draw(
                pipeline,
                prompts,
                options.seed,
                negative_prompt=options.negative,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                on_progress=progress.update,
            )
        for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
            words = "-".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())[:60]
            picture.save(folder / f"{number:04d}-{words}.png")
        captioned_grid(pictures, prompts, columns=options.count if options.count > 1 else None).save(folder / "grid.png")
    print(f"{len(pictures)} pictures and grid.png: {out}")


def run_evaluate_autoencoder(options: argparse.Namespace) -> None:
    import json

    import torch

    from ldm.data.images import ImageDataset
    from ldm.evaluate import figure_texts, reconstruction_figures
    from ldm.files import write_json
    from ldm.losses import PerceptualLoss
    from ldm.metrics import LatentHealth, ReconstructionFID
    from ldm.models.autoencoder import autoencoder_hash, load_autoencoder

    for name, number in (("samples", options.samples), ("image-size", options.image_size)):
        if number is not None and number < 1:
            raise UsageError(f"--{name} is {number}; give 1 or more")
    if options.json is not None and Path(options.json).is_dir():
        raise UsageError(f"--json {options.json} is a folder; give a file, or - for stdout")
    dataset = ImageDataset(options.shards, options.image_size, require_captions=False)
    autoencoders = [load_autoencoder(path) for path in options.models]
    perceptual = PerceptualLoss(options.lpips_trunk, options.lpips)
    fid = None if options.fid is None else ReconstructionFID(options.fid)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = []
    for path, autoencoder in zip(options.models, autoencoders, strict=True):
        health = LatentHealth(autoencoder.config.latent_channels)
        with Progress(f"reconstructing with {path}") as progress:
            figures = reconstruction_figures(
                autoencoder.to(device),
                dataset,
                perceptual,
                options.samples,
                on_progress=progress.update,
                fid=fid,
                health=health,
            )
        measured.append(figures)
    labels = {"lpips": perceptual.description} | ({} if fid is None else {fid.name: fid.description})
    if options.json is not None:
        source = dataset.sources[0]
        record = {
            "shards": source.spec,
            "shards_hash": source.manifest.hash,
            "image_size": options.image_size,
            "metrics": labels,
            "autoencoders": [
                {"path": path, "hash": autoencoder_hash(autoencoder)} | figures
                for path, autoencoder, figures in zip(options.models, autoencoders, measured, strict=True)
            ],
        }
        if options.json == "-":
            print(json.dumps(record, indent=2, ensure_ascii=False))
            return
        write_json(options.json, record)
    labels |= {"psnr": "PSNR (dB)", "ssim": "SSIM", "latent_kl": "latent KL (nats per value)", "latent_dead": "dead channels"}
    columns = [figure_texts(figures) for figures in measured]
    rows = {labels.get(name, name.replace("_", " ")): [column[name] for column in columns] for name in columns[0]}
    print_figures(rows, *options.models)


def run_evaluate_pipeline(options: argparse.Namespace) -> None:
    from ldm.data.shapes import held_out_prompts, seen_prompts
    from ldm.evaluate import draw, shape_accuracy
    from ldm.pipeline import load_pipeline

    pipeline = load_pipeline(options.model)
    prompts = (seen_prompts if options.seen else held_out_prompts)(options.preset, options.prompts, options.seed)
    with Progress("drawing", len(prompts)) as progress:
        pictures = draw(
            pipeline,
            prompts,
            options.seed,
            batch_size=64,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            on_progress=progress.update,
        )
    print_figures({name: [f"{value:.4f}"] for name, value in shape_accuracy(pictures, prompts).items()}, "value")


def print_figures(rows: Mapping[str, Sequence[str]], *columns: str) -> None:
    """A table with a name at the head of each row and each column."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", *columns)
    for name, figures in rows.items():
        table.add_row(name, *figures)
    Console().print(table)


def run_stage(name: str, arguments: list[str]) -> None:
    """``ldm autoencoder`` and ``ldm denoiser``: fit, export."""
    from jsonargparse import ArgumentError

    from ldm.training.autoencoder import AutoencoderTraining
    from ldm.training.denoiser import DenoiserTraining
    from ldm.training.run import ExportCLI, FitCLI

    stage = {"autoencoder": AutoencoderTraining, "denoiser": DenoiserTraining}[name]
    try:
        if arguments[0] == "export":
            example = f"example:\n  ldm {name} export runs/{name} {stage.product}"
            parser = Parser(f"ldm {name} export", description=ExportCLI.__doc__, epilog=example)
            parser.formatter_class = argparse.RawDescriptionHelpFormatter
            parser.add_argument("run", type=Path, help="folder of the run: what --out of fit was")
            parser.add_argument("out", type=Path, help="new folder")
            parser.add_argument("--checkpoint", type=Path, help="of the run (default: its last)")
            options = parser.parse_args(arguments[1:])
            ExportCLI(stage, options.run, options.out, options.checkpoint)
        else:
            FitCLI(stage, arguments)
    except SystemExit as leave:
        # Lightning, interrupted, puts its house in order and leaves with 1
        if leave.code == 1:
            raise KeyboardInterrupt from None
        raise
    except ArgumentError as error:
        raise UsageError(f"ldm {name}: {' '.join(str(error).split())}; see ldm {name} fit --help") from error


def dispatch(arguments: Sequence[str]) -> None:
    """Run one command line, errors as exceptions."""
    import diffusers
    import transformers

    # their bars and hints would tear ours; their errors still reach the user
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    arguments = list(arguments)
    if arguments[:1] and arguments[0] in ("autoencoder", "denoiser"):
        run_stage(arguments[0], arguments[1:] or ["--help"])
        return
    options = build_parser().parse_args(arguments)
    options.run(options)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: run, and leave with 0, 1 (failed), 2 (bad usage) or 130 (interrupted)."""
    debug = bool(os.environ.get("LDM_DEBUG"))
    try:
        dispatch(sys.argv[1:] if arguments is None else arguments)
    except (LdmError, OSError) as error:
        if debug:
            raise
        print(f"ldm: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    except KeyboardInterrupt:
        print("ldm: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
