"""``ldm autoencoder`` and ``ldm denoiser``: fit, which LightningCLI parses, and what is made of a run afterwards."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.parser import Parser
from ldm.errors import UsageError

if TYPE_CHECKING:
    from ldm.training.denoiser import DenoiserTraining


def run(name: str, arguments: list[str]) -> None:
    """Errors as exceptions."""
    from jsonargparse import ArgumentError

    from ldm.runs.dry_run.command import DryRunCLI
    from ldm.runs.fit import FitCLI
    from ldm.training.autoencoder import AutoencoderTraining
    from ldm.training.denoiser import DenoiserTraining

    stage = {"autoencoder": AutoencoderTraining, "denoiser": DenoiserTraining}[name]
    commands = {"export": run_export} | ({"ema": run_ema} if name == "denoiser" else {})
    try:
        if arguments[0] in commands:
            commands[arguments[0]](stage, arguments[1:])
        else:
            aside = {"--dry-run", "--find-batch", "--help", "-h"} & set(arguments)
            (DryRunCLI if aside else FitCLI)(stage, arguments)
    except SystemExit as leave:
        if not leave.code:  # help, a run that is finished already, or one that torchrun has run
            return
        # Lightning, interrupted, puts its house in order and leaves with 1
        if leave.code == 1:
            raise KeyboardInterrupt from None
        raise
    except ArgumentError as error:
        raise UsageError(f"ldm {name}: {' '.join(str(error).split())}; see ldm {name} fit --help") from error


def run_export(stage: type, arguments: list[str]) -> None:
    from ldm.runs.fit import ExportCLI

    parser = _parser(stage, "export", ExportCLI, f"runs/{stage.command} {stage.artifact}")
    parser.add_argument("--checkpoint", type=Path, help="of the run (default: its last)")
    if stage.command == "denoiser":
        add_denoiser_options(parser)
    options = parser.parse_args(arguments)
    write = denoiser_writer(options) if stage.command == "denoiser" else None
    ExportCLI(stage, options.run, options.out, options.checkpoint, write)


def add_denoiser_options(parser: Parser) -> None:
    kinds = "pixart: what diffusers' own PixArtAlphaPipeline opens (default: a pipeline directory of ours)"
    parser.add_argument("--as", dest="kind", choices=["pipeline", "pixart"], default="pipeline", help=kinds)
    card = "also a README.md for the Hugging Face hub, with images of the preview prompts; then: hf upload OWNER/NAME OUT"
    parser.add_argument("--model-card", action="store_true", help=card)
    parser.add_argument("--license", metavar="ID", help="for the card, as the hub names it: apache-2.0 (default: unknown)")
    parser.add_argument("--dataset", metavar="NAME", action="append", help="for the card: on the hub; may be given again")
    parser.add_argument(
        "--report", metavar="FILE", type=Path, help="for the card: the quickstart's report.json, if it is of RUN"
    )


def denoiser_writer(options: argparse.Namespace) -> Callable[[DenoiserTraining, Path], None] | None:
    """What writes the folder in the place of the stage's own ``save``."""
    from ldm.runs.model_card import CardFields, write_model_card

    write = write_pixart if options.kind == "pixart" else None
    given = {"license": options.license, "datasets": options.dataset and tuple(options.dataset), "report": options.report}
    given = {name: value for name, value in given.items() if value is not None}
    if not options.model_card:
        if given:
            raise UsageError(f"--{next(iter(given)).removesuffix('s')} is for the model card; give --model-card, too")
        return write
    fields = CardFields(**given)

    def write_with_card(model: DenoiserTraining, folder: Path) -> None:
        (write or type(model).save)(model, folder)
        write_model_card(folder, options.out.resolve().name, model, options.run, fields)

    return write_with_card


def write_pixart(model: DenoiserTraining, folder: Path) -> None:
    """In the place of the stage's own ``save``."""
    from ldm.runs.pixart import export_pixart

    for remark in export_pixart(model.pipeline(), folder):
        print(remark)


def run_ema(stage: type, arguments: list[str]) -> None:
    from ldm.runs.posthoc_ema import PostHocCLI

    parser = _parser(stage, "ema", PostHocCLI, f"runs/{stage.command} {stage.artifact} --sigma-rel 0.1")
    lengths = "length of the average, as the standard deviation of the steps it is over, relative to the training"
    parser.add_argument("--sigma-rel", type=float, required=True, help=lengths)
    parser.add_argument("--step", type=int, help="that it ends at (default: the last that was stored)")
    options = parser.parse_args(arguments)
    PostHocCLI(stage, options.run, options.out, options.sigma_rel, options.step)


def _parser(stage: type, command: str, made_by: type, example: str) -> Parser:
    parser = Parser(
        f"ldm {stage.command} {command}",
        description=made_by.__doc__,
        epilog=f"example:\n  ldm {stage.command} {command} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of the run: what --out of fit was")
    parser.add_argument("out", type=Path, help="new folder")
    return parser
