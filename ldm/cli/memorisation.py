"""``ldm evaluate memorisation``: whether a model returns the images that it was trained on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.evaluated import BATCH_SIZE, EvaluatedPipeline, add_sampling, check_sampling, open_shards, require_count
from ldm.cli.parser import Commands, add_command, print_table
from ldm.cli.sample import sampling, say_recommended
from ldm.errors import UsageError
from ldm.progress import Progress
from ldm.terminal import say

if TYPE_CHECKING:
    from ldm.data.image_dataset import ImageDataset
    from ldm.evaluation.image_sets import ImageSet, Scorer
    from ldm.evaluation.memorisation import ComparedImages, Memorised, Pair

COUNT = 256
SHOWN, PRINTED = 16, 5  # pairs, on the page and in the terminal


def add(commands: Commands) -> None:
    memorisation = add_command(
        commands,
        "memorisation",
        run_evaluate_memorisation,
        "how many images generated from the captions of training images come nearer to a training image than a control does "
        "(5%% do if nothing is memorised), and which",
        """ldm evaluate memorisation pipeline --shards shards --held-out validation-shards --network dinov2 --page copies.html
  torchrun --nproc-per-node 8 -m ldm evaluate memorisation pipeline --shards shards --held-out validation-shards""",
    )
    memorisation.add_argument("model", help="pipeline directory")
    memorisation.add_argument("--shards", required=True, metavar="DIR", help="image shards that the model was trained on")
    memorisation.add_argument(
        "--held-out",
        metavar="DIR",
        help="image shards of the same kind that it was not trained on: the control are images of their captions, and how near "
        "these come to theirs (default: training images, and how near the nearest other one is)",
    )
    add_sampling(memorisation)
    memorisation.add_argument("--count", type=int, metavar="N", help=f"how many images to generate (default: up to {COUNT})")
    memorisation.add_argument(
        "--network",
        action="append",
        default=[],
        metavar="NAME",
        help="feature network beside pixels, as of ldm evaluate pipeline; again for several",
    )
    memorisation.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"images at a time (default: {BATCH_SIZE})")
    memorisation.add_argument("--json", metavar="FILE", help="write all results and the protocol there; -: to stdout alone")
    memorisation.add_argument("--page", metavar="FILE", help="write a page with plots and the nearest pairs there (.html)")


def run_evaluate_memorisation(options: argparse.Namespace) -> None:
    import json

    from ldm.evaluation.features import load_feature_network
    from ldm.evaluation.image_sets import FixedSizes, Scorer, several_processes
    from ldm.evaluation.memorisation import LEAST, PixelFeatures, require_threshold, write_page
    from ldm.evaluation.results import networks_protocol
    from ldm.files import require_output_file, write_json
    from ldm.latents.compute import Process, versions

    check_sampling(options)
    for name in ("count", "batch_size"):
        if getattr(options, name) is not None:
            require_count(name.replace("_", "-"), getattr(options, name))
    for path in (options.json, options.page):
        if path not in (None, "-"):
            require_output_file(path, [options.shards, options.held_out, options.model])
    process = Process.from_environment()
    quiet, chosen = process.rank > 0, EvaluatedPipeline(options, process)
    if not quiet:
        say_recommended(chosen.pipeline, sampling(options))
    folders = {"shards": options.shards} | ({} if options.held_out is None else {"held_out": options.held_out})
    need_captions = not chosen.pipeline.is_unconditional
    datasets = {name: open_shards(folder, need_captions, options.count) for name, folder in folders.items()}
    require_threshold(len([*datasets.values()][-1]), options.held_out is None)
    if options.count is not None and options.count < LEAST:
        raise UsageError(f"--count is {options.count}, which sets no threshold; give {LEAST} or more")
    limits = _unlike_training(options.model, datasets)
    for dataset in datasets.values():
        dataset.buckets = FixedSizes(sizes=chosen.sizes)
    networks = [PixelFeatures(), *(load_feature_network(name, process.device()) for name in options.network)]
    with several_processes(process):
        images = _gather(chosen, Scorer(networks, process, options.batch_size), options, *datasets.values())
    if quiet:
        return
    found, limits = images.by_network(networks), limits + images.limits()
    names = {name: _names(datasets["shards"], images.trained, each) for name, each in found.items()}
    generated = [
        {"seed": options.seed + number, "caption": images.generated.captions[number]}
        | {"nearest": {name: [names[name][number], float(each.distances[number])] for name, each in found.items()}}
        for number in range(len(images.generated))
    ]
    protocol = {
        **{name: dataset.sources[0].spec for name, dataset in datasets.items()},
        **{f"{name}_hash": dataset.sources[0].manifest.hash for name, dataset in datasets.items()},
        "seed": options.seed,
        "control": "training images, and the nearest other ones"
        if images.held_out is None
        else "images generated from captions of held-out images, and the nearest of these",
        "limits": limits,
        "trained": len(images.trained),
        "generated": len(generated),
        **({} if images.held_out is None else {"held_out_images": len(images.held_out)}),
        **chosen.protocol(),
        "sizes": [f"{width}x{height}" for height, width in images.generated.different_sizes],
        "networks": networks_protocol(networks),
        "versions": versions(),
    }
    if options.page is not None:
        pairs = _pairs(chosen, found, images.trained, datasets["shards"], names)
        write_page(options.page, f"{options.model}, trained on {options.shards}", found, pairs, protocol)
    summary = {name: each.summary() for name, each in found.items()}
    record = {"format_version": 1, "memorisation": summary, "images": generated, "protocol": protocol}
    if options.json == "-":
        say(json.dumps(record, indent=2))
        return
    if options.json is not None:
        write_json(options.json, record)
    _print(found, images, names, limits, options.seed)
    if options.page is not None:
        say(f"look at {options.page}")


def _unlike_training(model: str, datasets: Mapping[str, ImageDataset]) -> list[str]:
    """What the model's record of its training says against these shards, in words.

    Raises UsageError for held-out images that it was trained on.
    """
    from ldm.runs.lineage import read_lineage

    hashes = {name: dataset.sources[0].manifest.hash for name, dataset in datasets.items()}
    if hashes.get("held_out") == hashes["shards"]:
        raise UsageError(f"--held-out and --shards are the same, {datasets['shards'].sources[0].spec}; give other images")
    lineage = read_lineage(Path(model))
    known = {source[name] for source in lineage["data"] for name in ("hash", "images")} if lineage else set()
    if hashes.get("held_out") in known:
        raise UsageError(
            f"{datasets['held_out'].sources[0].spec} is what the model was trained on; give --held-out other images"
        )
    if not known:
        return [f"{model} has no record of what it was trained on"]
    return [] if hashes["shards"] in known else [f"{model} was trained on other shards, by its record"]


def _gather(
    chosen: EvaluatedPipeline,
    scorer: Scorer,
    options: argparse.Namespace,
    train: ImageDataset,
    held_out: ImageDataset | None = None,
) -> ComparedImages:
    """Score real images in a random order, and generate from the captions of the first."""
    from functools import partial

    import numpy as np

    from ldm.evaluation.memorisation import ComparedImages, through_autoencoder

    order, quiet = np.random.default_rng(options.seed), scorer.process.rank > 0

    def score(name: str, dataset: ImageDataset) -> ImageSet:
        with Progress(f"scoring {name} images", len(dataset), quiet) as progress:
            return scorer.real_images(dataset, order.permutation(len(dataset)).tolist(), progress.update)

    def generate(name: str, images: ImageSet) -> ImageSet:
        with Progress(f"generating from captions of {name} images", len(images), quiet) as progress:
            return chosen.generate(scorer, images, progress.update)

    trained, unseen = score("training", train), None if held_out is None else score("held-out", held_out)
    count = min(options.count or COUNT, len(trained), len(trained if unseen is None else unseen))
    change = partial(through_autoencoder, autoencoder=chosen.pipeline.vae, device=scorer.process.device())
    with Progress("scoring training images through the autoencoder", count, quiet) as progress:
        copies = scorer.real_images(train, trained.samples[:count], progress.update, change)
    generated = generate("training", trained.part(0, count))
    if unseen is None:
        return ComparedImages(trained, generated, copies)
    # an unconditional model would generate the same images again
    alike = chosen.pipeline.is_unconditional
    return ComparedImages(
        trained, generated, copies, unseen, generated if alike else generate("held-out", unseen.part(0, count))
    )


def _names(dataset: ImageDataset, trained: ImageSet, found: Memorised) -> list[str]:
    """Of each generated image the shard and key of the nearest training image."""
    places = (dataset.name_of(trained.samples[number]) for number in found.neighbours.tolist())
    return [f"{Path(shard).name}: {key}" for shard, key in places]


def _pairs(
    chosen: EvaluatedPipeline,
    found: Mapping[str, Memorised],
    trained: ImageSet,
    dataset: ImageDataset,
    names: Mapping[str, Sequence[str]],
) -> list[Pair]:
    """The generated images that are nearest to a training image, each generated again, beside that image."""
    from PIL import Image

    from ldm.evaluation.image_sets import Scorer
    from ldm.evaluation.memorisation import Pair, closest

    pairs, alone = [], Scorer([])
    for number, network in closest(found, SHOWN):
        generated = chosen.generate(alone, trained.part(number, number + 1), first=number)
        real = dataset[trained.samples[int(found[network].neighbours[number])]]["image"].transpose(1, 2, 0)
        distance = float(found[network].distances[number])
        pairs.append(Pair(generated.shown[0], Image.fromarray(real), names[network][number], network, distance))
    return pairs


def _print(
    found: Mapping[str, Memorised],
    images: ComparedImages,
    names: Mapping[str, Sequence[str]],
    limits: Sequence[str],
    seed: int,
) -> None:
    from ldm.evaluation.memorisation import HEADER, closest

    print_table({name: each.row() for name, each in found.items()}, *HEADER, first="network")
    nearest = {
        f"{images.generated.captions[number] or ''} (seed {seed + number})": [
            names[network][number],
            f"{float(found[network].distances[number]):.4g} ({network})",
        ]
        for number, network in closest(found, PRINTED)
    }
    print_table(nearest, "nearest training image", "distance", first="generated from")
    for limit in limits:
        say(limit)
