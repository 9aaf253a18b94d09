"""``ldm evaluate``: metrics of a trained model."""

from __future__ import annotations

import argparse

from ldm.cli import likelihood, memorisation
from ldm.cli.evaluated import (
    BATCH_SIZE,
    DEFAULT_COUNT,
    EvaluatedPipeline,
    add_sampling,
    check_sampling,
    open_shards,
    real_reference,
    require_count,
)
from ldm.cli.parser import Commands, add_command, add_group, print_table
from ldm.cli.sample import sampling, say_recommended
from ldm.errors import UsageError
from ldm.progress import Progress
from ldm.terminal import say


def add(commands: Commands) -> None:
    evaluate = add_group(commands, "evaluate", "metrics of a trained model")
    autoencoder = add_command(
        evaluate,
        "autoencoder",
        run_evaluate_autoencoder,
        "PSNR, SSIM, LPIPS and FID of reconstructions, and the health of the latents",
        "ldm evaluate autoencoder runs/autoencoder/autoencoder sd-vae --shards validation --fid alex-random",
    )
    autoencoder.add_argument("models", nargs="+", metavar="model", help="directories of autoencoders, shown side by side")
    autoencoder.add_argument("--shards", required=True, help="folder of image shards")
    autoencoder.add_argument("--samples", type=int, default=256, help="the first so many images (default: 256)")
    autoencoder.add_argument("--image-size", type=int, help="fit images to this side in pixels (default: whole images)")
    autoencoder.add_argument("--lpips", metavar="WEIGHTS", default="random", help="random (default), pretrained or a path")
    autoencoder.add_argument("--lpips-trunk", choices=["alex", "vgg"], default="alex", help="default: alex")
    autoencoder.add_argument(
        "--fid",
        metavar="TRUNK",
        help="also a FID, by a feature network: inception, dinov2, clip, alex-random, vgg-random, a hub name or a path",
    )
    autoencoder.add_argument("--json", metavar="FILE", help="write all metrics there, too; -: to stdout, without the table")
    _add_pipeline(evaluate)
    likelihood.add(evaluate)
    memorisation.add(evaluate)


def _add_pipeline(evaluate: Commands) -> None:
    pipeline = add_command(
        evaluate,
        "pipeline",
        run_evaluate_pipeline,
        "FID, KID, CMMD, precision, recall, density, coverage, diversity and agreement with captions, of images generated "
        "from the captions of --shards or of the images in a folder; without --shards, prompt accuracy on held-out shapes, "
        "read back from the pixels",
        """ldm evaluate pipeline pipeline --shards validation --network inception --network clip --page evaluation.html
  ldm evaluate pipeline --images other-tool/images --shards validation --network runs/matcher/matcher
  torchrun --nproc-per-node 8 -m ldm evaluate pipeline pipeline --shards validation --json evaluation.json
  ldm evaluate pipeline quickstart/pipeline --prompts 256""",
    )
    pipeline.add_argument("model", nargs="?", help="pipeline directory; none with --images")
    add_sampling(pipeline)
    own = pipeline.add_argument_group("on image shards")
    own.add_argument("--shards", metavar="DIR", help="image shards, best of a validation set: captions, and real images")
    own.add_argument("--images", metavar="DIR", help="score these images, which ldm sample or another tool made")
    own.add_argument(
        "--network",
        action="append",
        metavar="NAME",
        help="feature network: inception, dinov2, clip, alex-random, vgg-random, a hub name or a path; again for several "
        "(default: inception and clip)",
    )
    own.add_argument("--count", type=int, metavar="N", help="how many images (default: as many as there are, up to 1000)")
    own.add_argument("--batch-size", type=int, help="images at a time (default: 32)")
    own.add_argument("--json", metavar="FILE", help="write all metrics and the protocol there; -: to stdout, without the table")
    own.add_argument("--page", metavar="FILE", help="write a page with plots and images there (.html)")
    shapes = pipeline.add_argument_group("on the built-in shapes")
    shapes.add_argument("--preset", choices=["one", "two"])
    shapes.add_argument("--prompts", type=int, help="how many (default: 256)")
    shapes.add_argument("--seen", action="store_true", help="prompts of the kind trained on, instead of held-out ones")


def run_evaluate_autoencoder(options: argparse.Namespace) -> None:
    import json

    import torch

    from ldm.data.image_dataset import ImageDataset
    from ldm.evaluation.metrics import LatentHealth, ReconstructionFID
    from ldm.evaluation.reconstruction import metric_texts, reconstruction_metrics
    from ldm.files import require_output_file, write_json
    from ldm.losses.perceptual import PerceptualLoss
    from ldm.models.autoencoder import autoencoder_hash, load_autoencoder

    for name, number in (("samples", options.samples), ("image-size", options.image_size)):
        if number is not None:
            require_count(name, number)
    if options.json not in (None, "-"):
        require_output_file(options.json, [options.shards, *options.models])
    dataset = ImageDataset(options.shards, options.image_size, read_captions=False)
    autoencoders = [load_autoencoder(path) for path in options.models]
    perceptual = PerceptualLoss(options.lpips_trunk, options.lpips)
    fid = None if options.fid is None else ReconstructionFID(options.fid)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = []
    for path, autoencoder in zip(options.models, autoencoders, strict=True):
        health = LatentHealth(autoencoder.config["latent_channels"])
        with Progress(f"reconstructing with {path}") as progress:
            metrics = reconstruction_metrics(
                autoencoder.to(device),  # pyright: ignore[reportArgumentType]  diffusers hides the method's own types
                dataset,
                perceptual,
                options.samples,
                on_progress=progress.update,
                fid=fid,
                health=health,
            )
        measured.append(metrics)
    labels = {"lpips": perceptual.description} | ({} if fid is None else {fid.name: fid.description})
    if options.json is not None:
        source = dataset.sources[0]
        record = {
            "shards": source.spec,
            "shards_hash": source.manifest.hash,
            "image_size": options.image_size,
            "metrics": labels,
            "autoencoders": [
                {"path": path, "hash": autoencoder_hash(autoencoder)} | metrics
                for path, autoencoder, metrics in zip(options.models, autoencoders, measured, strict=True)
            ],
        }
        if options.json == "-":
            say(json.dumps(record, indent=2))
            return
        write_json(options.json, record)
    labels |= {"psnr": "PSNR (dB)", "ssim": "SSIM", "latent_kl": "latent KL (nats per value)", "latent_dead": "dead channels"}
    columns = [metric_texts(metrics) for metrics in measured]
    rows = {labels.get(name, name.replace("_", " ")): [column[name] for column in columns] for name in columns[0]}
    print_table(rows, *options.models)


def run_evaluate_pipeline(options: argparse.Namespace) -> None:
    if options.shards:
        wrong, why = ("preset", "prompts", "seen"), "is of the built-in shapes; leave it out, or --shards"
    else:
        wrong = ("images", "network", "count", "batch_size", "json", "page", "scheduler")
        why = "is of real images to compare with; give --shards, too"
    if options.images is not None and options.shards:
        wrong, why = (*wrong, "size", "steps", "guidance", "scheduler"), "is of images that a pipeline generates; leave it out"
    for name in wrong:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise UsageError(f"--{name.replace('_', '-')} {why}")
    check_sampling(options)
    if options.shards:
        _evaluate_on_shards(options)
    elif options.model is None:
        raise UsageError("there is nothing to evaluate; give the directory of a pipeline, or --images and --shards")
    else:
        _evaluate_on_shapes(options)


def _evaluate_on_shapes(options: argparse.Namespace) -> None:
    from ldm.evaluation.prompts import generate_from_captions, shape_accuracy
    from ldm.inference.prompts import parse_size
    from ldm.pipeline import load_pipeline
    from ldm.shapes.scenes import held_out_prompts, seen_prompts

    count = 256 if options.prompts is None else options.prompts
    require_count("prompts", count)
    width, height = (None, None) if options.size is None else parse_size(options.size)
    pipeline = load_pipeline(options.model)
    say_recommended(pipeline, sampling(options))
    prompts = (seen_prompts if options.seen else held_out_prompts)(options.preset or "one", count, options.seed)
    with Progress("generating", len(prompts)) as progress:
        images = generate_from_captions(
            pipeline,
            prompts,
            options.seed,
            batch_size=64,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            width=width,
            height=height,
            on_progress=progress.update,
        )
    print_table({name: [f"{value:.4f}"] for name, value in shape_accuracy(images, prompts).items()}, "value")


def _evaluate_on_shards(options: argparse.Namespace) -> None:
    import json

    from ldm.evaluation.features import load_feature_network
    from ldm.evaluation.image_sets import Scorer, open_folder, several_processes
    from ldm.evaluation.page import label, write_page
    from ldm.evaluation.results import record_of
    from ldm.files import require_output_file, write_json
    from ldm.latents.compute import Process

    if (options.model is None) == (options.images is None):
        raise UsageError("give the directory of a pipeline, or --images with a folder of images: one of them")
    for name in ("count", "batch_size"):
        if getattr(options, name) is not None:
            require_count(name.replace("_", "-"), getattr(options, name))
    for path in (options.json, options.page):
        if path not in (None, "-"):
            require_output_file(path, [options.shards, options.model, options.images])
    process = Process.from_environment()
    quiet = process.rank > 0
    chosen = None if options.images else EvaluatedPipeline(options, process)
    if chosen is not None and not quiet:
        say_recommended(chosen.pipeline, sampling(options))
    files = open_folder(options.images)[: options.count] if options.images else []
    need_captions = chosen is not None and not chosen.pipeline.is_unconditional
    dataset = open_shards(options.shards, need_captions, None if chosen is None else options.count)
    networks = [load_feature_network(name, process.device()) for name in options.network or ("inception", "clip")]
    scorer = Scorer(networks, process, options.batch_size or BATCH_SIZE)
    with several_processes(process):
        generated, count, sizes = None, options.count or DEFAULT_COUNT, () if chosen is None else chosen.sizes
        if chosen is None:
            with Progress("scoring the folder", len(files), quiet) as progress:
                generated = scorer.image_files(files, progress.update)
            count, sizes = len(generated), generated.different_sizes
        reference = real_reference(scorer, dataset, sizes, count, options.seed)
        if chosen is not None:
            with Progress("generating", len(reference.images), quiet) as progress:
                generated = chosen.generate(scorer, reference.images, progress.update)
        assert generated is not None
        results = reference.compare(generated)
    if quiet:
        return
    source, made_by = dataset.sources[0], {"images": options.images} if chosen is None else chosen.protocol()
    record = record_of(results, generated, reference, source, options.seed, made_by)
    if options.page is not None:
        title = options.model or options.images
        write_page(options.page, f"{title}, against {source.spec}", results, reference.images, generated, record["protocol"])
    if options.json == "-":
        say(json.dumps(record, indent=2))
        return
    if options.json is not None:
        write_json(options.json, record)
    rows = {
        label(metric.name) + "*" * bool(metric.note): [
            *("–" if value is None else f"{value:.4g}" for value in (metric.value, metric.real)),
            "lower" if metric.lower_is_better else "higher",
        ]
        for metric in results.metrics
    }
    print_table(rows, "generated", "real images", "better")
    for note in dict.fromkeys(metric.note for metric in results.metrics if metric.note):
        say(f"* {note}")
    if "agreement" in results.protocol:
        say(f"agreement with captions is {results.protocol['agreement']}")
    if options.page is not None:
        say(f"look at {options.page}")
