"""``ldm sweep``: metrics of a pipeline under many settings of its sampler, and the best of them as its defaults."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ldm.cli.evaluated import (
    BATCH_SIZE,
    DEFAULT_COUNT,
    EvaluatedPipeline,
    check_sampling,
    open_shards,
    real_reference,
    require_count,
)
from ldm.cli.parser import Commands, add_command, print_table
from ldm.errors import UsageError
from ldm.progress import Progress
from ldm.terminal import printable, say

if TYPE_CHECKING:
    from ldm.data.image_dataset import ImageDataset
    from ldm.evaluation.image_sets import Scorer
    from ldm.evaluation.sweep import SamplerSettings, SweepFolder, SweptSettings
    from ldm.pipeline import LatentDiffusionPipeline

BEST = "best"
STEPS, GUIDANCE = (5, 10, 20, 50), (1.0, 2.0, 3.0, 5.0)
SCHEDULERS = ("euler", "dpm++2m", "unipc")  # beside the model's own, where they follow its path
EXAMPLES = {"scheduler": "euler,unipc", "steps": "5,10,20", "guidance": "1,2,3"}
TOLERANCE = 0.02


def add(commands: Commands) -> None:
    sweep = add_command(
        commands,
        "sweep",
        run_sweep,
        "metrics of a pipeline under all combinations of schedulers, steps and guidance, on the same captions and noise; "
        "--recommend makes the best one its default",
        "ldm sweep pipeline --shards validation --out sweep --steps 5,10,20,50 --guidance 1,2,3,5 --scheduler euler,unipc\n"
        "  ldm sweep pipeline --shards validation --out sweep --by clipscore_clip --recommend\n"
        "  ldm sweep pipeline --shards validation --out sweep --recommend unipc,10,2\n\n"
        "The same command again computes what is missing; another one adds its combinations to the folder.",
    )
    sweep.add_argument("model", help="pipeline directory")
    sweep.add_argument(
        "--shards", required=True, metavar="DIR", help="image shards, best of a validation set: captions, images"
    )
    sweep.add_argument("--out", required=True, metavar="DIR", help="folder for sweep.json, index.html and images")
    sweep.add_argument("--steps", metavar="N,N", help=f"numbers of steps (default: {','.join(map(str, STEPS))})")
    guidance = ",".join(f"{scale:g}" for scale in GUIDANCE)
    sweep.add_argument("--guidance", metavar="W,W", help=f"guidance scales; 1 is none (default: {guidance})")
    sweep.add_argument(
        "--scheduler", metavar="NAME,NAME", help="default: the model's own, euler, dpm++2m and unipc, where they fit the model"
    )
    sweep.add_argument("--size", metavar="WxH", help="in pixels, or one number (default: the sizes that it was trained on)")
    sweep.add_argument("--count", type=int, metavar="N", help="images of each combination (default: up to 1000)")
    sweep.add_argument("--seed", type=int, default=0, help="of the choice of captions, and of the first image's noise")
    sweep.add_argument(
        "--network", action="append", metavar="NAME", help="as in ldm evaluate pipeline (default: inception and clip)"
    )
    sweep.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"images at a time (default: {BATCH_SIZE})")
    sweep.add_argument("--by", default="fid", metavar="METRIC", help="what is best (default: the FID of the first network)")
    sweep.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="SHARE",
        help=f"the fewest evaluations win among settings within this share of the best value (default: {TOLERANCE:g})",
    )
    sweep.add_argument(
        "--recommend",
        nargs="?",
        const=BEST,
        metavar="SCHEDULER,STEPS,GUIDANCE",
        help="make the best settings, or these, the defaults of the model, in its directory",
    )


def run_sweep(options: argparse.Namespace) -> None:
    from ldm.evaluation.features import load_feature_network
    from ldm.evaluation.image_sets import Scorer, several_processes
    from ldm.evaluation.results import metric_names, networks_protocol
    from ldm.evaluation.sweep import PAGE, SamplerSettings, SweepFolder, choose, find_metric, settings_of
    from ldm.evaluation.sweep_page import write_page
    from ldm.inference.recommended import recommend
    from ldm.latents.compute import Process, versions
    from ldm.locks import hold_folder

    sampled = argparse.Namespace(**vars(options) | dict.fromkeys(SamplerSettings._fields))  # they vary
    check_sampling(sampled)
    if not 0 <= options.tolerance < math.inf:
        raise UsageError(f"--tolerance is {options.tolerance:g}; give a share of the best value, such as {TOLERANCE:g}")
    count = DEFAULT_COUNT if options.count is None else options.count
    for name, number in (("count", count), ("batch-size", options.batch_size)):
        require_count(name, number)
    given = {name: parse_list(name, getattr(options, name)) for name in SamplerSettings._fields}
    named = None if options.recommend in (None, BEST) else parse_settings(options.recommend)

    process = Process.from_environment()
    chosen = EvaluatedPipeline(sampled, process)
    with_captions = not chosen.pipeline.is_unconditional
    if options.recommend is not None and not os.access(options.model, os.W_OK):
        raise UsageError(f"{options.model} cannot be written, where --recommend writes to; leave it out, or copy the model")
    dataset = open_shards(options.shards, with_captions, options.count)
    networks = [load_feature_network(name, process.device()) for name in options.network or ("inception", "clip")]
    metric = find_metric(options.by, metric_names(networks, with_captions))
    made_by, source = chosen.protocol(), dataset.sources[0]
    protocol = {name: made_by[name] for name in ("model", "model_hash", "dtype", "device", "ldm")}
    protocol |= {"shards": source.spec, "shards_hash": source.manifest.hash, "seed": options.seed}
    protocol |= {"count": min(count, len(dataset)), "sizes": [f"{width}x{height}" for height, width in chosen.sizes]}
    protocol |= {"networks": networks_protocol(networks), "versions": versions()}

    first = process.rank == 0
    lock = hold_folder(options.out, f"sweeping into {options.out}") if first else nullcontext()
    with lock, several_processes(process):
        folder = SweepFolder(options.out, protocol)
        wanted = plan(given, [*folder.results], chosen.pipeline) + ([named] if named else [])
        missing = {settings: evaluations(settings, chosen) for settings in folder.missing(wanted)}

        def publish() -> SweptSettings:
            """Write the page of what there is. Returns the best of it."""
            best = choose(folder.results.values(), metric, options.tolerance)
            write_page(folder, f"{options.model}, against {source.spec}", metric, best)
            return best

        if missing:
            sweep(chosen, Scorer(networks, process, options.batch_size), dataset, folder, missing, publish)
        if first:
            best = publish()
            print_front(folder, metric, best)
            if options.recommend is not None:
                settings = named or settings_of(best)
                recommend(chosen.pipeline, options.model, *settings)
                say(
                    f"{printable(options.model)} now recommends {settings}; ldm sample and others take that where none is given"
                )
            say(f"look at {printable(folder.path / PAGE)}")


def parse_list(name: str, text: str | None) -> list[Any]:
    """The values of an option ``5,10,20``, each once; none where it is not given."""
    kind = {"scheduler": str, "steps": int, "guidance": float}[name]
    try:
        found = [kind(part.strip()) for part in text.split(",")] if text is not None else []
    except ValueError:
        found = [""]
    if not all(part != "" and part == part and part not in (math.inf, -math.inf) for part in found):
        raise UsageError(f"--{name} is {text!r}; give values with commas between them, such as {EXAMPLES[name]}")
    return [*dict.fromkeys(found)]


def parse_settings(text: str) -> SamplerSettings:
    """The settings of ``unipc,10,2``."""
    from ldm.evaluation.sweep import SamplerSettings

    parts = text.split(",")
    if len(parts) != 3:
        raise UsageError(f"--recommend is {text!r}; give a scheduler, steps and guidance, such as unipc,10,2, or no value")
    (scheduler,), (steps,), (guidance,) = map(parse_list, SamplerSettings._fields, parts)
    return SamplerSettings(scheduler, steps, guidance)


def plan(
    given: Mapping[str, Sequence[Any]], existing: Sequence[SamplerSettings], pipeline: LatentDiffusionPipeline
) -> list[SamplerSettings]:
    """All combinations of what the options give; what they leave out is as in the folder, or has its default."""
    from ldm.diffusion.scheduler import samplers_for
    from ldm.evaluation.sweep import cross_product

    if existing and not any(given.values()):
        return [*existing]
    fitting = samplers_for(*pipeline.diffusion)
    defaults = {
        "scheduler": [name for name in fitting if name == fitting[0] or name in SCHEDULERS],
        "steps": STEPS,
        "guidance": (1.0,) if pipeline.is_unconditional else GUIDANCE,
    }
    before = {name: sorted({getattr(each, name) for each in existing}) for name in defaults}
    return cross_product(*(given[name] or before[name] or defaults[name] for name in defaults))


def evaluations(settings: SamplerSettings, chosen: EvaluatedPipeline) -> int:
    """Of the denoiser for one image. Raises UsageError for settings that the model cannot take."""
    require_count("steps", settings.steps)
    steps = len(chosen.sample_with(*settings))
    if chosen.pipeline.is_unconditional and settings.guidance != 1:
        raise UsageError("the model is unconditional, so that there is nothing to guide to; give --guidance 1, or leave it out")
    return steps if settings.guidance == 1 else 2 * steps


def sweep(
    chosen: EvaluatedPipeline,
    scorer: Scorer,
    dataset: ImageDataset,
    folder: SweepFolder,
    missing: Mapping[SamplerSettings, int],
    publish: Callable[[], object],
) -> None:
    """Generate and score images of each of the ``missing`` settings, whose evaluations for an image are given."""
    from ldm.evaluation.sweep import REAL, STRIP

    first, count = scorer.process.rank == 0, folder.protocol["count"]
    reference = real_reference(scorer, dataset, chosen.sizes, count, chosen.options.seed)
    images, done = reference.images, 0
    if first:
        folder.save_images(REAL, images)
    folder.captions = images.captions[:STRIP]
    with Progress("sweeping", len(images) * sum(missing.values()), quiet=not first) as progress:
        for number, (settings, cost) in enumerate(missing.items()):

            def show(made: int, total: int, settings=settings, cost=cost, before=done) -> None:
                progress.update(before + made * cost, None, {"now": str(settings)})

            chosen.sample_with(*settings)
            try:
                generated = chosen.generate(scorer, images, show)
            except KeyboardInterrupt:
                say(f"ldm: {number} of {len(missing)} settings are finished; the same command computes the rest", sys.stderr)
                raise
            found = reference.compare(generated)
            if first:
                folder.add(settings, cost, found, generated)
                publish()
            done += len(images) * cost


def print_front(folder: SweepFolder, metric: str, best: SweptSettings) -> None:
    """Print the settings that no others beat, and the chosen ones."""
    from ldm.evaluation.page import label
    from ldm.evaluation.sweep import pareto_front, settings_of

    shown = [metric, *(name for name in best["metrics"] if name.startswith("clipscore_") and name != metric)]
    rows = {
        str(settings_of(each)): [f"{each['evaluations']}", *(f"{each['metrics'][name]['value']:.4g}" for name in shown)]
        for each in pareto_front(folder.results.values(), metric)
    }
    print_table(rows, "evaluations", *map(label, shown), first="settings")
    for note in dict.fromkeys(one["note"] for one in best["metrics"].values() if "note" in one):
        say(f"note: {note}")
    say(f"{len(folder.results)} settings; chosen by {label(metric)}: {settings_of(best)}")
