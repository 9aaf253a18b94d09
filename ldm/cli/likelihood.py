"""``ldm evaluate likelihood``: how likely images are under a pipeline, and which seem to have a wrong caption."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm.cli.parser import Commands, add_command, print_table
from ldm.errors import UsageError
from ldm.progress import Progress, duration
from ldm.terminal import say

MEASURES = ["latent", "image", "ddpm", "captions"]


def add(commands: Commands) -> None:
    likelihood = add_command(
        commands,
        "likelihood",
        run_evaluate_likelihood,
        "bits per dimension of images and their latents, and suspects of a wrong caption",
        "ldm evaluate likelihood quickstart/pipeline --shards quickstart/shards-validation --page likelihood.html",
    )
    likelihood.add_argument("model", help="pipeline directory")
    likelihood.add_argument("--shards", required=True, help="folder of image shards; images are fitted to the model's sizes")
    likelihood.add_argument("--count", type=int, default=256, help="the first so many images (default: 256)")
    likelihood.add_argument("--seed", type=int, default=0, help="of latents, probes and noise (default: 0)")
    likelihood.add_argument(
        "--measure",
        nargs="+",
        choices=MEASURES,
        help="latent: ln p of the latents by the probability-flow ODE; image: lower bound of that of the pixels through the "
        "autoencoder; ddpm: DDPM's bound, of variance-preserving models; captions: each image's own caption against others "
        "(default: all that the model has)",
    )
    likelihood.add_argument(
        "--solver",
        choices=["dopri5", "rk4", "midpoint", "euler"],
        default="dopri5",
        help="of the ODE; all but dopri5 (default) take fixed steps",
    )
    likelihood.add_argument("--tolerance", type=float, default=1e-4, help="of dopri5, a step (default: 1e-4)")
    likelihood.add_argument("--steps", type=int, default=50, help="of the other solvers (default: 50)")
    likelihood.add_argument("--probes", type=int, default=1, help="of the divergence, for each image (default: 1)")
    likelihood.add_argument("--ddpm-steps", type=int, default=50, help="terms of DDPM's bound that are evaluated (default: 50)")
    likelihood.add_argument("--levels", type=int, default=8, help="of noise, at which captions are compared (default: 8)")
    likelihood.add_argument(
        "--others", type=int, default=3, help="captions to compare an image's own with, beside the empty one (default: 3)"
    )
    likelihood.add_argument("--suspects", type=int, default=20, metavar="N", help="images to list at most (default: 20)")
    likelihood.add_argument("--batch-size", type=int, default=16, help="default: 16")
    likelihood.add_argument("--page", metavar="FILE", help="write a page with images and plots there")
    likelihood.add_argument("--json", metavar="FILE", help="write all results there; -: to stdout, without the table")


def run_evaluate_likelihood(options: argparse.Namespace) -> None:
    import json

    from ldm.evaluation.image_sets import several_processes
    from ldm.evaluation.likelihood import LikelihoodEvaluator, LikelihoodSettings, inapplicable
    from ldm.evaluation.likelihood_page import NO_SUSPECTS, metric_rows, save_page
    from ldm.files import require_output_file, write_json
    from ldm.latents.compute import Process
    from ldm.models.fingerprint import network_hash
    from ldm.pipeline import load_pipeline

    if options.suspects < 1:
        raise UsageError(f"--suspects is {options.suspects}; give 1 or more")
    for name, out in (("json", options.json), ("page", options.page)):
        if out not in (None, "-"):
            if Path(out).is_dir():
                raise UsageError(f"--{name} {out} is a folder; give a file")
            require_output_file(out, [options.shards, options.model])
    names = ("count", "seed", "solver", "tolerance", "steps", "probes", "ddpm_steps", "levels", "others", "batch_size")
    asked = None if options.measure is None else tuple(name for name in MEASURES if name in options.measure)
    settings = {name: getattr(options, name) for name in names}
    LikelihoodSettings(asked or ("latent", "image"), **settings)  # before the pipeline is loaded
    process = Process.from_environment()
    quiet, pipeline = process.rank > 0, load_pipeline(options.model, process.device())
    lacking = {} if asked is not None else inapplicable(pipeline)
    measures = asked or tuple(name for name in MEASURES if name not in lacking)
    evaluator = LikelihoodEvaluator(pipeline, options.shards, LikelihoodSettings(measures, **settings), process)
    for name, reason in () if quiet else lacking.items():
        say(f"{name} is not measured: {reason}", sys.stderr)

    def estimate(seconds: float) -> None:
        about = "" if options.solver != "dopri5" or "latent" not in measures else ", if dopri5 needs 100 evaluations"
        say(f"this takes about {duration(seconds)}{about}", sys.stderr)

    count = min(settings["count"], len(evaluator.dataset))
    with several_processes(process), Progress("measuring", count, quiet) as progress:
        found = evaluator.measure(progress.update, None if quiet else estimate)
    if quiet:
        return
    if options.page is not None:
        save_page(found, evaluator, options.page, options.model, options.suspects)
    if options.json is not None:
        source = evaluator.source
        record = {
            "model": options.model,
            "denoiser": network_hash(pipeline.transformer, pipeline.transformer.config),
            "trained_on": pipeline.config["trained_on"],
            "diffusion": pipeline.config["diffusion"],
            "shards": source.spec,
            "shards_hash": source.manifest.hash,
            **found.record(),
        }
        if options.json == "-":
            say(json.dumps(record, indent=2))
            return
        write_json(options.json, record)
    print_table({name: [value] for name, value in metric_rows(found).items()}, "value")
    if "captions" in measures:
        rows: dict[str, list[str]] = {}
        for image in found.suspects(options.suspects):
            shard, key = evaluator.dataset.name_of(image.number)
            rows[f"{Path(shard).name}: {key}"] = [f"{image.margin:+.2f}", image.caption]
        if rows:
            print_table(rows, "nats above the likeliest other caption", "its own caption", first="suspects of a wrong caption")
        else:
            say(f"suspects of a wrong caption: {NO_SUSPECTS[0].lower()}{NO_SUSPECTS[1:]}")
    if options.page is not None:
        say(f"look at {options.page}")
