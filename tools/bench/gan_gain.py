"""What the discriminator gains on texture: the same autoencoder with and without it, in equal seconds.

    python tools/wallpapers.py windows --download debian
    python tools/bench/gan_gain.py --windows windows --out gan [--seeds 0 1 2] [--before N] [--steps N] [OPTION OF FIT ...]
    python tools/bench/gan_gain.py --quick

For every seed, `ldm autoencoder fit` trains the recipe `configs/autoencoder/kl_f4_cpu.yaml` without a discriminator. From its
weights two runs continue: one without a discriminator for `--steps` steps, and one with it for as many steps as take the same
seconds. The seconds of a step are measured before, in turns, so that other work on the machine does not count. Options of `fit`
that begin with `--model.adversary` or `--model.discriminator_optimiser` change the run with the discriminator, all others every
run.

The averaged weights reconstruct the validation windows. Beside PSNR and LPIPS (random trunk) it measures the sliced Wasserstein
distance of the patches at each level of the Laplacian pyramid, level 0 the finest (ldm/evaluation/sliced_wasserstein.py):
normalised as published, where contrast does not count (`swd`), and by the originals' statistics, where a lack of it counts
(`softness`).

OUT holds a folder per run, named by its seed and its options; a finished run is not repeated. After each seed `results.jsonl`
and `windows.png`, with originals and reconstructions, are written anew. Ends with `ratio NAME MEDIAN MIN MAX` over the seeds,
without the discriminator over with it; larger is better. The loss of PSNR in dB is printed before.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from timed_fit import Clock, TimedFit
from torchmetrics.functional.image import peak_signal_noise_ratio

from ldm.cli import dispatch
from ldm.data.image_dataset import ImageDataset
from ldm.data.writer import write_images
from ldm.evaluation.sliced_wasserstein import pyramid_distances
from ldm.files import atomic_file, read_json, write_json
from ldm.losses.perceptual import PerceptualLoss
from ldm.machine import machine_info
from ldm.models.autoencoder import images_to_pil, pixels_to_images, reconstruct
from ldm.reporting.grids import paired_grid

RECIPE = common.CONFIGS / "autoencoder" / "kl_f4_cpu.yaml"
OF_DISCRIMINATOR = ("--model.adversary", "--model.discriminator_optimiser")
NORMALISED_BY = {"swd": "each", "softness": "first"}
SHOWN = 8  # windows in the image
AT_ONCE = 32  # images
PATCHES = 32  # of a window at each level: 20,000 in all


def digest(arguments: Sequence[str]) -> str:
    """Eight digits of the recipe and these options."""
    return hashlib.sha256(json.dumps([RECIPE.read_text(), *arguments]).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Bench:
    """Folders, lengths, and options of ``fit``."""

    shards: Path  # holds train and validation
    out: Path
    before: int  # steps
    steps: int
    every: int  # steps between validations
    options: tuple[str, ...] = ()
    of_discriminator: tuple[str, ...] = field(default=())

    def arguments(self, seed: int, steps: int, start_from: Path | None, discriminator: bool) -> list[str]:
        """Options of ``fit`` for one run."""
        given: dict[str, Any] = {
            "config": RECIPE, "seed_everything": seed, "data.seed": seed, "trainer.max_steps": steps,
            "data.train": self.shards / "train", "data.validation": self.shards / "validation",
            "trainer.val_check_interval": min(self.every, steps), "checkpoints.best": "null",
        }  # fmt: skip
        if start_from is not None:
            given |= {"model.autoencoder.init_from": start_from, "data.seed": seed + 1000}  # other batches than before
        # a discriminator that trains at the last step alone, and never weighs in
        timetable = {"start": steps - 1, "discriminator_warmup": 10**9, "generator_ramp": 0}
        if discriminator:
            timetable = {"start": 0, "discriminator_warmup": steps // 5, "generator_ramp": steps // 6}
        given |= {f"model.adversary.{name}": value for name, value in timetable.items()}
        words = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        return [*words, *self.options, *(self.of_discriminator if discriminator else ())]

    def fit(self, name: str, seed: int, steps: int, start_from: Path | None = None, discriminator: bool = False) -> Path:
        """The autoencoder of a run, which is trained unless it is finished."""
        arguments = self.arguments(seed, steps, start_from, discriminator)
        folder = self.out / f"{name}-{seed}-{digest(arguments)}"
        if not (folder / "autoencoder").is_dir():  # written last, and whole
            shutil.rmtree(folder, ignore_errors=True)
            dispatch(["autoencoder", "fit", *arguments, "--out", str(folder)])
            shutil.rmtree(folder / "checkpoints")
        return folder / "autoencoder"

    def steps_with(self, rounds: int = 3, steps: int = 12) -> int:
        """As many steps with the discriminator as take the seconds of ``steps`` without it."""
        kept = (
            self.out
            / f"seconds-{hashlib.sha256(json.dumps([self.options, self.of_discriminator]).encode()).hexdigest()[:8]}.json"
        )
        if not kept.is_file():

            def median(side: str) -> float:
                clock = Clock()
                arguments = self.arguments(0, steps, None, discriminator=side == "with")
                with tempfile.TemporaryDirectory() as temporary:
                    TimedFit("autoencoder", [*arguments, "--out", f"{temporary}/run"], steps, clock)
                return statistics.median(clock.seconds)

            measured = common.time_in_turn({side: partial(median, side) for side in ("without", "with")}, rounds, "s/step")
            # both sides of a round share what else the machine did; a minimum of each could mix a quiet round with a busy one
            pairs = sorted(zip(measured["without"], measured["with"], strict=True), key=lambda pair: pair[0] / pair[1])
            write_json(kept, dict(zip(("without", "with"), pairs[len(pairs) // 2], strict=True)))
        seconds = read_json(kept)
        print(
            f"seconds per step: {seconds['without']:.3f} without the discriminator, {seconds['with']:.3f} with it", flush=True
        )
        return round(self.steps * seconds["without"] / seconds["with"])

    def seed(self, seed: int, steps_with: int) -> dict[str, Path]:
        """The autoencoders of one seed."""
        before = self.fit("before", seed, self.before)
        without = self.fit("without", seed, self.steps, before)
        return {"before": before, "without": without, "with": self.fit("with", seed, steps_with, before, discriminator=True)}


@torch.inference_mode()
def reconstructions(autoencoder: Path, images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) in [−1, 1] from the posterior's mode."""
    network = AutoencoderKL.from_pretrained(autoencoder).eval()
    return torch.cat([reconstruct(network, some).clamp(-1, 1) for some in images.split(AT_ONCE)])


@torch.inference_mode()
def metrics(images: torch.Tensor, others: torch.Tensor, perceptual: PerceptualLoss) -> dict[str, float]:
    """Of reconstructions: PSNR in dB, LPIPS, and the distances of each level."""
    pairs = [*zip(images.split(AT_ONCE), others.split(AT_ONCE), strict=True)]
    lpips = sum(float(perceptual(second, first)) * len(first) for first, second in pairs) / len(images)
    psnr = peak_signal_noise_ratio(others, images, data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean")
    return {"psnr": float(psnr), "lpips": lpips} | distances(images, others)


def distances(images: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """Of the patches at each level, normalised in both ways."""
    return {
        f"{name}_{level}": distance
        for name, by in NORMALISED_BY.items()
        for level, distance in enumerate(pyramid_distances(images, others, PATCHES, normalised_by=by))  # pyright: ignore[reportArgumentType]
    }


def compare(bench: Bench, seeds: Sequence[int]) -> None:
    """Train what is not trained yet; print the metrics of each seed, then the ratios."""
    dataset = ImageDataset(bench.shards / "validation", read_captions=False)
    images = pixels_to_images(dataset.collate([dataset[index] for index in range(len(dataset))])["image"])
    perceptual = PerceptualLoss("alex", "random")
    print(f"{len(images)} validation windows of {images.shape[-1]} px; {perceptual.description}")
    # a reconstruction shares the content of its original, and can be nearer to it than other real windows are
    order, half = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)), len(images) // 2
    halves = distances(images[order[:half]], images[order[half : 2 * half]])
    print("real windows, one half against the other: " + " ".join(f"{key} {value:.4g}" for key, value in halves.items()))
    bench.out.mkdir(parents=True, exist_ok=True)
    steps_with = bench.steps_with()
    found: dict[int, dict[str, dict[str, float]]] = {}
    for seed in seeds:
        autoencoders = bench.seed(seed, steps_with)
        made = {name: reconstructions(folder, images) for name, folder in autoencoders.items()}
        found[seed] = {name: metrics(images, others, perceptual) for name, others in made.items()}
        for name, values in found[seed].items():
            print(f"seed {seed} {name:8} " + " ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)
        records = ({"seed": seed, "run": run} | values for seed, runs in found.items() for run, values in runs.items())
        with atomic_file(bench.out / "results.jsonl", "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        places = np.linspace(0, len(images) - 1, SHOWN).astype(int)
        rows = [(name, images_to_pil(some[places])) for name, some in ({"original": images} | made).items()]
        with atomic_file(bench.out / "windows.png") as file:
            paired_grid(rows, cell=2 * images.shape[-1]).save(file, "PNG")
    costs = [runs["without"]["psnr"] - runs["with"]["psnr"] for runs in found.values()]
    print(f"loss of PSNR, dB: {statistics.median(costs):.2f} ({min(costs):.2f} to {max(costs):.2f})")
    names = [name for name in found[seeds[0]]["with"] if name != "psnr"]
    common.print_ratios({
        f"gan_gain_{name}": [runs["without"][name] / max(runs["with"][name], 1e-9) for runs in found.values()] for name in names
    })  # fmt: skip


def pack(windows: Path, shards: Path) -> Path:
    """Shards of the folders train and validation, unless they are there."""
    for name in ("train", "validation"):
        if not (shards / name / "manifest.json").is_file():
            dispatch(["shards", "pack", str(windows / name), str(shards / name), "--no-captions"])
    return shards


def made_texture(seed: int, count: int, side: int = 64) -> Iterator[tuple[str, Image.Image, str]]:
    """Coloured noise whose power falls with the square of the frequency, as in photographs (Field 1987)."""
    random = np.random.default_rng(seed)
    y, x = np.meshgrid(*[np.fft.fftfreq(side)] * 2, indexing="ij")
    amplitude = 1 / np.maximum(np.hypot(y, x), 1 / side)
    for number in range(count):
        noise = np.fft.ifft2(np.fft.fft2(random.standard_normal((3, side, side))) * amplitude).real
        colours = np.moveaxis(noise / noise.std() * 48 + random.uniform(80, 176), 0, -1)
        yield f"{number:05d}", Image.fromarray(colours.clip(0, 255).astype(np.uint8)), "texture"


def main() -> None:
    """Measure, and print the ratios."""
    parser = common.bench_parser(__doc__, "one seed of generated texture, few steps: under a minute, says little", False)
    parser.add_argument("--windows", type=Path, metavar="DIR", help="what tools/wallpapers.py wrote: train and validation")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--before", type=int, default=1000, help="steps before the two runs part (default: 1000)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the run without a discriminator (default: 1000)")
    parser.add_argument("--every", type=int, default=250, help="steps between validations (default: 250)")
    options, rest = parser.parse_known_args()
    common.quieten()
    print(machine_info())
    groups: tuple[list[str], list[str]] = [], []  # of all runs, of the discriminator
    for word in rest:
        if word.startswith("--"):
            group = groups[word.startswith(OF_DISCRIMINATOR)]
        elif not any(groups):
            parser.error(f"{word} follows no option")
        group.append(word)  # pyright: ignore[reportPossiblyUnboundVariable]
    if options.quick:
        with tempfile.TemporaryDirectory() as temporary:
            shards, few = Path(temporary) / "shards", ["--data.batch_size", "2", "--data.validation_samples", "4"]
            for seed, (name, count) in enumerate({"train": 32, "validation": 8}.items()):
                write_images(shards / name, "texture", made_texture(seed, count), count)
            bench = Bench(shards, Path(temporary) / "out", 4, 8, 4, (*few, *groups[0]), tuple(groups[1]))
            compare(bench, [0])
        return
    if options.windows is None or options.out is None:
        parser.error("give --windows and --out, or --quick")
    shards = pack(options.windows, options.out / "shards")
    bench = Bench(shards, options.out, options.before, options.steps, options.every, *map(tuple, groups))
    compare(bench, options.seeds)


if __name__ == "__main__":
    main()
