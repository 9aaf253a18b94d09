"""``ldm autoencoder``, ``denoiser`` and ``matcher``: fit, whose options LightningCLI parses, and the exports of a run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.parser import Parser
from ldm.errors import UsageError
from ldm.terminal import printable, say

if TYPE_CHECKING:
    from ldm.training.base import TrainingModule
    from ldm.training.denoiser import DenoiserTraining

# entries of a run's config that name a place, which may be another one when the run is exported
MOVABLE = {
    "model.autoencoder": "directory of the autoencoder",
    "model.text_encoder": "directory of the text encoder",
    "model.init_from": "the model that an adapter is trained on",
    "data.train": "folder of the training data",
    "data.validation": "folder of the validation data",
    "data.regularisation": "folder of the images of regularisation",
}


def run(name: str, arguments: list[str]) -> None:
    """Run ``ldm NAME ARGUMENTS``; raises its errors."""
    from jsonargparse import ArgumentError

    from ldm.runs.config import explain
    from ldm.runs.dry_run.command import DryRunCLI
    from ldm.runs.fit import FitCLI
    from ldm.training.autoencoder import AutoencoderTraining
    from ldm.training.denoiser import DenoiserTraining
    from ldm.training.matcher import MatcherTraining
    from ldm.training.textual_inversion import TextualInversion

    kinds = AutoencoderTraining, DenoiserTraining, TextualInversion, MatcherTraining
    (module_class,) = (kind for kind in kinds if kind.command == name)
    commands = {"export": run_export} | {"denoiser": {"ema": run_ema}, "embedding": {"merge": run_merge}}.get(name, {})
    try:
        if arguments[0] in commands:
            commands[arguments[0]](module_class, arguments[1:])
        else:
            dry = {"--dry-run", "--find-batch", "--help", "-h"} & set(arguments)
            (DryRunCLI if dry else FitCLI)(module_class, arguments)
    except SystemExit as leave:
        if not leave.code:  # help, a finished run, or one that torchrun has run
            return
        if leave.code == 1:  # of Lightning after Ctrl-C
            raise KeyboardInterrupt from None
        raise
    except ArgumentError as error:
        raise UsageError(f"ldm {name}: {explain(error)}; see ldm {name} fit --help") from error


def run_export(module_class: type[TrainingModule], arguments: list[str]) -> None:
    from ldm.runs.export import export_run
    from ldm.runs.layout import RunFolder

    what = "The model of any checkpoint of a run, as a directory that other programs open."
    parser = _parser(module_class, "export", what, f"runs/{module_class.command} {module_class.artifact}")
    parser.add_argument("--checkpoint", type=Path, help="of the run (default: its last)")
    if module_class.command == "denoiser":
        add_denoiser_options(parser)
    options = parser.parse_args(arguments)
    write = denoiser_writer(options) if module_class.command == "denoiser" else None
    if write is not None and options.kind != "pipeline" and RunFolder(options.run).read_config()["model"].get("adapter"):
        raise UsageError(f"{options.run} trained an adapter, which is exported as a file for its base; leave out --as")
    export_run(module_class, options.run, options.out, options.checkpoint, write, options.trust, moved(options))


def add_denoiser_options(parser: Parser) -> None:
    kinds = "pixart: for diffusers' PixArtAlphaPipeline, which needs no code of ldm (default: ldm's own pipeline)"
    parser.add_argument("--as", dest="kind", choices=["pipeline", "pixart"], default="pipeline", help=kinds)
    card = "add a README.md for the Hugging Face hub, with images of the preview prompts; then: hf upload OWNER/NAME OUT"
    parser.add_argument("--model-card", action="store_true", help=card)
    parser.add_argument(
        "--license", metavar="ID", help="for the card, by its name on the hub, such as apache-2.0 (default: unknown)"
    )
    what = "for the card, the hub name of the model it was fine-tuned from (default: model.init_from, where that is one)"
    parser.add_argument("--base-model", metavar="NAME", help=what)
    parser.add_argument("--dataset", metavar="NAME", action="append", help="for the card, by its name on the hub; repeatable")
    parser.add_argument(
        "--report", metavar="FILE", type=Path, help="for the card: report.json of the quickstart that trained RUN"
    )


def denoiser_writer(options: argparse.Namespace) -> Callable[[DenoiserTraining, Path], None] | None:
    """What writes the folder instead of the module's ``save``; None for that."""
    from ldm.runs.model_card import CardFields, write_model_card

    write = write_pixart if options.kind == "pixart" else None
    given = {"license": options.license, "datasets": options.dataset and tuple(options.dataset), "report": options.report}
    given |= {"base_model": options.base_model}
    given = {name: value for name, value in given.items() if value is not None}
    if not options.model_card:
        if given:
            raise UsageError(
                f"--{next(iter(given)).removesuffix('s').replace('_', '-')} is for the model card; give --model-card, too"
            )
        return write
    fields = CardFields(**given)

    def write_with_card(model: DenoiserTraining, folder: Path) -> None:
        (write or type(model).save)(model, folder)
        write_model_card(folder, options.out.resolve().name, model, options.run, fields)

    return write_with_card


def write_pixart(model: DenoiserTraining, folder: Path) -> None:
    from ldm.runs.pixart import export_pixart

    for remark in export_pixart(model.pipeline(), folder):
        say(remark)


def run_ema(module_class: type[TrainingModule], arguments: list[str]) -> None:
    from ldm.runs.posthoc_ema import export_average

    what = "The model of a run with an average of any length, made of the averages that the run stored."
    parser = _parser(module_class, "ema", what, f"runs/{module_class.command} {module_class.artifact} --sigma-rel 0.1")
    length = "length of the average: the standard deviation of the steps it is over, relative to the training"
    parser.add_argument("--sigma-rel", type=float, required=True, help=length)
    parser.add_argument("--step", type=int, help="step where it ends (default: the last one stored)")
    options = parser.parse_args(arguments)
    export_average(module_class, options.run, options.out, options.sigma_rel, options.step, options.trust, moved(options))


def run_merge(module_class: type[TrainingModule], arguments: list[str]) -> None:
    from ldm.files import atomic_folder, require_new_folder
    from ldm.pipeline import load_pipeline
    from ldm.runs.lineage import copy_lineage

    parser = Parser(
        "ldm embedding merge",
        description="A pipeline that knows learned tokens: its text encoder with their embeddings, all else as it was.",
        epilog="example:\n  ldm embedding merge runs/denoiser/pipeline runs/sks/embedding pipeline-sks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pipeline", type=Path, help="pipeline directory, for whose text encoder the tokens were learned")
    parser.add_argument("tokens", type=Path, nargs="+", metavar="token", help="learned_embeds.safetensors, or its folder")
    parser.add_argument("out", type=Path, help="new folder")
    options = parser.parse_args(arguments)
    require_new_folder(options.out, "the pipeline")
    pipeline = load_pipeline(options.pipeline, "cpu")
    for token in options.tokens:
        pipeline.load_textual_inversion(token)
    with atomic_folder(options.out) as folder:
        pipeline.save_pretrained(folder)
        copy_lineage(options.pipeline, folder)
    say(f"pipeline: {printable(options.out)}")


def _parser(module_class: type[TrainingModule], command: str, description: str, example: str) -> Parser:
    parser = Parser(
        f"ldm {module_class.command} {command}",
        description=description,
        epilog=f"example:\n  ldm {module_class.command} {command} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of the run: --out of fit")
    parser.add_argument("out", type=Path, help="new folder")
    trust = "build any class that the config of RUN names, not only those of ldm, torch, diffusers and lightning: it runs code"
    parser.add_argument("--trust", action="store_true", help=trust)
    has = {"autoencoder": ("data.",), "matcher": ("data.", "model.autoencoder", "model.text_encoder")}
    for name, what in MOVABLE.items():
        if name.startswith(has.get(module_class.command, "")):
            since = f"{what}, if it has moved since the training: the one that it was trained with"
            parser.add_argument(f"--{name.partition('.')[2].replace('_', '-')}", dest=name, metavar="DIR", help=since)
    return parser


def moved(options: argparse.Namespace) -> dict[str, str]:
    """The entries of the run's config that the options say the present place of."""
    return {name: value for name, value in vars(options).items() if name in MOVABLE and value is not None}
