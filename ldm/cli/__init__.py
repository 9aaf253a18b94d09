"""The command line: arguments -> the floors below. Every error that a user can mend is one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm import __version__
from ldm.cli import evaluate, latents, sample, shards
from ldm.cli.parser import Commands, Parser, add_command
from ldm.errors import LdmError, UsageError

EXAMPLE = """example:
  ldm quickstart --out quickstart          the whole path on built-in pictures, with a report to look at
  ldm shards pack photos shards --size 256
  ldm autoencoder fit --config configs/emoji/autoencoder.yaml --out runs/autoencoder
  ldm latents export --autoencoder runs/autoencoder/autoencoder --shards shards --out latents
  ldm denoiser fit --config configs/emoji/denoiser.yaml --out runs/denoiser
  ldm sample runs/denoiser/pipeline "red heart" --out pictures
"""


def build_parser() -> argparse.ArgumentParser:
    """Every command but those of the two stages, which LightningCLI parses."""
    what = "Train your own text-to-image model: from captioned images to pictures from words."
    parser = Parser("ldm", description=what, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"ldm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    add_quickstart(commands)
    for part in (shards, latents, sample, evaluate):
        part.add(commands)
    for name, what in (("autoencoder", "stage one"), ("denoiser", "stage two")):
        commands.add_parser(name, help=f"{what}: ldm {name} fit --config FILE --out DIR, ldm {name} export DIR OUT")
    return parser


def add_quickstart(commands: Commands) -> None:
    quickstart = add_command(
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


def run_quickstart(options: argparse.Namespace) -> None:
    from ldm.quickstart import quickstart

    quickstart(Path(options.out), options.minutes, options.seed, run=dispatch)


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
