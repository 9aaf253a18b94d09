"""The command line. Every error that a user can fix is one line on stderr and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm import __version__
from ldm.cli import animation, doctor, evaluate, invert, latents, report, sample, serve, shards, training
from ldm.cli.parser import Commands, Parser, add_command
from ldm.errors import LdmError

EXAMPLE = """example:
  ldm quickstart --out quickstart          train on built-in images for ten minutes, with a report
  ldm shards pack photos shards --size 256
  ldm autoencoder fit --config configs/emoji/autoencoder.yaml --out runs/autoencoder
  ldm latents export --autoencoder runs/autoencoder/autoencoder --shards shards --out latents
  ldm denoiser fit --config configs/emoji/denoiser.yaml --out runs/denoiser
  ldm sample runs/denoiser/pipeline "red heart" --out images
"""
# these start quickly because they do not import torch; doctor checks whether torch can be imported at all
WITHOUT_NETWORKS = ("shards", "report", "doctor")


def build_parser() -> argparse.ArgumentParser:
    """A parser of every command except those of the two stages, which LightningCLI parses."""
    what = "Train your own text-to-image model, from captioned images to images from prompts."
    parser = Parser("ldm", description=what, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"ldm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    add_quickstart(commands)
    for part in (shards, latents, sample, invert, animation, serve, evaluate, report, doctor):
        part.add(commands)
    for name, what in (("autoencoder", "stage one"), ("denoiser", "stage two")):
        commands.add_parser(name, help=f"{what}: ldm {name} fit --config FILE --out DIR, ldm {name} export DIR OUT")
    return parser


def add_quickstart(commands: Commands) -> None:
    quickstart = add_command(
        commands,
        "quickstart",
        run_quickstart,
        "train a small model on built-in images, with a report",
        "ldm quickstart --minutes 10",
    )
    quickstart.add_argument("--out", default="quickstart", help="output folder (default: quickstart)")
    quickstart.add_argument("--minutes", type=float, default=10.0, help="time budget; more gives better images (default: 10)")
    quickstart.add_argument("--seed", type=int, default=0, help="of images, weights and noise (default: 0)")


def run_quickstart(options: argparse.Namespace) -> None:
    from ldm.quickstart import quickstart

    quickstart(Path(options.out), options.minutes, options.seed, run=dispatch)


def dispatch(arguments: Sequence[str]) -> None:
    """Run one command line; errors are raised."""
    arguments = list(arguments)
    if arguments[:1] and arguments[0] in ("autoencoder", "denoiser"):
        silence_libraries()
        training.run(arguments[0], arguments[1:] or ["--help"])
        return
    options = build_parser().parse_args(arguments)
    if arguments[0] not in WITHOUT_NETWORKS:
        silence_libraries()
    options.run(options)


def silence_libraries() -> None:
    """Progress bars and warnings of other libraries would break up ours; errors are still shown."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Exit codes: 0, 1 (failed), 2 (invalid usage), 130 (interrupted)."""
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
