"""``ldm evaluate``: metrics of a trained model."""

from __future__ import annotations

import argparse

from ldm.cli.parser import Commands, add_command, add_group, print_table
from ldm.errors import UsageError
from ldm.progress import Progress
from ldm.terminal import say

MAX_COUNT = 10**7


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
        help="also a FID, by inception, alex-random, vgg-random or torchvision's checkpoint of alexnet or vgg16",
    )
    autoencoder.add_argument("--json", metavar="FILE", help="write all metrics there, too; -: to stdout, without the table")
    pipeline = add_command(
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
    pipeline.add_argument("--size", metavar="WxH", help="in pixels, or one number (default: what the model was trained on)")
    pipeline.add_argument("--steps", type=int, default=30)
    pipeline.add_argument("--guidance", type=float, default=3.0)
    pipeline.add_argument("--seed", type=int, default=0)


def require_count(name: str, number: int) -> None:
    if not 1 <= number <= MAX_COUNT:
        raise UsageError(f"--{name} is {number}; give 1 to {MAX_COUNT:,}")


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
    from ldm.evaluation.prompts import generate_from_captions, shape_accuracy
    from ldm.inference.prompts import parse_size
    from ldm.pipeline import load_pipeline
    from ldm.shapes.scenes import held_out_prompts, seen_prompts

    require_count("prompts", options.prompts)
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed is {options.seed}; give 0 to {2**32 - 1}")
    width, height = (None, None) if options.size is None else parse_size(options.size)
    pipeline = load_pipeline(options.model)
    prompts = (seen_prompts if options.seen else held_out_prompts)(options.preset, options.prompts, options.seed)
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
