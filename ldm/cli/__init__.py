"""The command line. Every error that a user can fix is one line on stderr and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm import __version__
from ldm.cli import (
    ablate,
    adapter,
    animation,
    doctor,
    evaluate,
    invert,
    latents,
    report,
    sample,
    serve,
    shards,
    sweep,
    trace,
    training,
)
from ldm.cli.parser import Commands, Parser, add_command
from ldm.errors import LdmError, UsageError, first_line, is_out_of_memory
from ldm.terminal import escape_logs, say

EXAMPLE = """example:
  ldm quickstart --out quickstart          train on built-in images for ten minutes, with a report
  ldm shards pack photos shards --size 256
  ldm autoencoder fit --config configs/emoji/autoencoder.yaml --out runs/autoencoder
  ldm latents export --autoencoder runs/autoencoder/autoencoder --shards shards --out latents
  ldm denoiser fit --config configs/emoji/denoiser.yaml --out runs/denoiser
  ldm sample runs/denoiser/pipeline "red heart" --out images
"""
LONGEST_LINE = 1000  # of an error, in characters
# these start quickly because they do not import torch; doctor checks whether torch can be imported at all
WITHOUT_NETWORKS = ("shards", "report", "doctor")
TRAININGS = {
    "autoencoder": "stage one",
    "denoiser": "stage two",
    "embedding": "a new word for a few images (textual inversion)",
    "matcher": "a model of images and text, for metrics",
}


def build_parser() -> argparse.ArgumentParser:
    """A parser of every command except those of :data:`TRAININGS`, which LightningCLI parses."""
    what = "Train your own text-to-image model, from captioned images to images from prompts."
    parser = Parser("ldm", description=what, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"ldm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    add_quickstart(commands)
    for part in (shards, latents, adapter, sample, invert, animation, serve, evaluate, sweep, ablate, report, trace, doctor):
        part.add(commands)
    for name, what in TRAININGS.items():
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
    for argument in arguments:
        if "\0" in argument or argument != argument.encode(errors="replace").decode():
            raise UsageError(f"the argument {argument[:80]!r} is not UTF-8 text; rename the file, or correct the argument")
    if arguments[:1] and arguments[0] in TRAININGS:
        load_libraries()
        training.run(arguments[0], arguments[1:] or ["--help"])
        return
    options = build_parser().parse_args(arguments)
    if arguments[0] not in WITHOUT_NETWORKS:
        load_libraries()
    options.run(options)


def load_libraries() -> None:
    """Import the large libraries, without their progress bars and warnings, which would break up ours; errors are shown."""
    if sys.flags.optimize > 1:
        raise UsageError("python -OO (PYTHONOPTIMIZE=2) removes docstrings, which transformers needs; use -O or no option")
    import torch  # noqa: F401  (first: the others hide why it cannot be imported)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (transformers_logging, diffusers_logging):
        logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Exit codes: 0, 1 (failed), 2 (invalid usage), 130 (interrupted)."""
    escape_logs()
    try:
        dispatch(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader of a pipe has left, as head does: Python's own flush at the exit should not fail, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (Exception, KeyboardInterrupt) as error:
        line, code = explain(error)
        if line is None or (code != 130 and os.environ.get("LDM_DEBUG")):
            raise
        if len(line) > LONGEST_LINE:  # it quotes what was given
            line = f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"
        say(f"ldm: {line}", sys.stderr)
        raise SystemExit(code) from None


def explain(error: BaseException) -> tuple[str | None, int]:
    """The line to print for an error, and the exit code; no line for a bug, whose traceback is needed."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    # libraries can turn what happens during an import into an error of their own
    if any(isinstance(each, KeyboardInterrupt) for each in (*causes, causes[-1].__context__)):
        return "interrupted", 130
    if isinstance(error, LdmError | OSError):
        return " ".join(str(error).split()), getattr(error, "exit_code", 1)
    if any(map(is_out_of_memory, causes)):
        return "there is not enough memory; end other programs, or make the images, the batch or the model smaller", 1
    for each in causes:
        if isinstance(each, ImportError):
            return f"a package cannot be imported ({first_line(each)}); install it again, or give the process more memory", 1
    return None, 1
