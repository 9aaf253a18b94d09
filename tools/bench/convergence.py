"""Convergence of stage two: our recipe against DiT's and minRF's, on the same latents.

    python tools/bench/convergence.py --latents DIR --validation DIR --autoencoder DIR --out DIR
        [--recipes ours dit minrf] [--seeds 3] [--images N] [--evaluations K] [--prompts P]
    python tools/bench/convergence.py --quick

An ablation (``ldm ablate``) of the recipes of ``configs/convergence``, described in their comments. The latents are of scenes
with two objects (``ldm shards shapes --preset two``), those of the validation set of held-out pairs (``--held-out``). All
recipes are trained on N images and evaluated K times in between: after N, N/2, N/4, … A falling learning rate is evaluated
fairly only at its end, so ours is also trained on N/4 images with a schedule of that length.

Beside the error of x0, images from held-out prompts are scored, with 20 steps of DPM-Solver++ 2M and guidance 3 for all, from
the same noise: prompt accuracy (images that show all that the prompt says) and attribute accuracy (the share of background,
colours, shapes, sizes and relations that they show).

OUT/whole and OUT/quarter are the folders of two ablations, with a page in each; what is finished there is not repeated. Ends
with `ratio NAME MEDIAN MIN MAX` over the seeds, after a quarter of the other recipe's images, after as many images, and after
as many seconds: of attribute accuracy, ours over the other's (none counts as half an attribute), and of the error of x0, the
other's over ours. Larger is better.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from ldm.ablation.ablation import Ablation, Series
from ldm.ablation.comparison import at_seconds
from ldm.ablation.look import Evaluated, Evaluator
from ldm.ablation.page import write_page
from ldm.ablation.variants import find_variants
from ldm.cli import dispatch
from ldm.diffusion.scheduler import make_scheduler
from ldm.evaluation.prompts import generate_from_captions, shape_accuracy
from ldm.machine import machine_info
from ldm.pipeline import LatentDiffusionPipeline
from ldm.shapes.scenes import held_out_prompts

CONFIGS = common.CONFIGS / "convergence"
FOLDERS = ("latents", "validation", "autoencoder", "out")
TINY = {"width": 32, "num_layers": 1, "num_attention_heads": 2}  # of --quick
SAMPLING: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 3.0}
ATTRIBUTES = ("background", "colour", "shape", "size", "relation")


class Scenes(Evaluator):
    """What a scorer reads from images of held-out prompts."""

    def __init__(self, count: int):
        self.prompts = held_out_prompts("two", count)
        self.settings = {"prompts": count, "scheduler": "dpm++2m"} | SAMPLING

    def __call__(self, pipeline: LatentDiffusionPipeline) -> Evaluated:
        pipeline.scheduler = make_scheduler("dpm++2m", *pipeline.diffusion)
        found = shape_accuracy(generate_from_captions(pipeline, self.prompts, seed=0, batch_size=64, **SAMPLING), self.prompts)
        return Evaluated(found | {"attributes": statistics.mean(found[name] for name in ATTRIBUTES)})


@dataclass(frozen=True)
class Bench:
    """Folders, and the sizes of the comparison."""

    latents: Path
    validation: Path
    autoencoder: Path
    out: Path
    images: int
    evaluations: int
    prompts: int
    seeds: int
    quick: bool = False

    def train(self, name: str, recipes: Sequence[str], images: int, looks: Sequence[float]) -> Ablation:
        """Train recipes on so many images."""
        options: dict[str, Any] = {
            "data.train": self.latents, "data.validation": self.validation, "model.autoencoder": self.autoencoder,
            "trainer.devices": 1,
        }  # fmt: skip
        if self.quick:
            options |= {f"model.denoiser.init_args.{key}": value for key, value in TINY.items()}
        words = [f"--{key}={value}" for key, value in options.items()]
        given = {recipe: [f"--config={CONFIGS / f'{recipe}.yaml'}", *words] for recipe in recipes}
        out = self.out / name
        ablation = Ablation(
            out, find_variants(given, out, images), looks, self.seeds, stops=False, evaluator=Scenes(self.prompts)
        )
        ablation.run(write_page)
        return ablation


# -- results -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Of every seed, (S,): attribute accuracy, and the error of x0, a geometric mean over the samples."""

    attributes: np.ndarray
    error: np.ndarray


def at_look(series: Series, number: int) -> Measured:
    """After so many looks; −1 is the last one."""
    errors = np.exp(np.log(series.errors(number)).mean(1))
    return Measured(np.array([record["metrics"]["attributes"] for record in series.records[number]]), errors)


def after(series: Series, seconds: float) -> Measured:
    """After so many seconds of training, interpolated linearly between looks."""
    looks = [at_look(series, number) for number in range(len(series.records))]
    attributes, error = (
        at_seconds(series.seconds, [getattr(look, name) for look in looks], seconds) for name in ("attributes", "error")
    )
    return looks[0] if attributes is None or error is None else Measured(attributes, error)


def print_summary(ablation: Ablation) -> None:
    """A table of all looks, means over the seeds."""
    print(f"{'recipe':>8} {'images':>9} {'seconds':>8} {'accuracy':>9} {'attributes':>10} {'x0 error':>9}")
    for name, series in ablation.series.items():
        for number, images in enumerate(series.images):
            metrics, seconds = series.metrics(number), series.seconds[number] if series.seconds else float("nan")
            print(f"{name:>8} {images:>9,} {seconds:>8.0f} {metrics['prompt_accuracy']:>9.3f} "
                  f"{metrics['attributes']:>10.3f} {ablation.error(series, number):>9.4f}")  # fmt: skip
    for comparison in ablation.comparisons():
        print(f"{comparison.variant.name}: {ablation.answer(comparison)}")
    print(flush=True)


def ratios(bench: Bench, whole: Ablation, quarter: Ablation) -> dict[str, np.ndarray]:
    """Ours against each other recipe, of each seed."""
    ours, found = whole.series["ours"], {}
    for name, series in whole.series.items():
        if name == "ours":
            continue
        pairs = {
            "quarter_images": (at_look(quarter.series["ours"], -1), at_look(series, -1)),
            "equal_images": (at_look(ours, -1), at_look(series, -1)),
        }
        if ours.seconds and series.seconds:
            together = min(ours.seconds[-1], series.seconds[-1])
            pairs["equal_seconds"] = after(ours, together), after(series, together)
        for kind, (mine, theirs) in pairs.items():
            least = 0.5 / bench.prompts
            accuracies = [np.maximum(side.attributes, least) for side in (mine, theirs)]
            found[f"convergence_{kind}_{name}_attributes"] = accuracies[0] / accuracies[1]
            found[f"convergence_{kind}_{name}_x0_error"] = theirs.error / mine.error
    return found


def compare(bench: Bench, recipes: Sequence[str]) -> None:
    """Train what is not trained yet, and print the results."""
    looks = [0.5**power for power in reversed(range(bench.evaluations))]
    whole = bench.train("whole", recipes, bench.images, looks)
    print_summary(whole)
    if "ours" in recipes:
        quarter = bench.train("quarter", ["ours"], bench.images // 4, [1.0])
        print_summary(quarter)
        common.print_ratios({name: values.tolist() for name, values in ratios(bench, whole, quarter).items()})


def tiny_bench(folder: Path) -> Bench:
    """With its own shapes, untrained autoencoder and latents."""
    from ldm.models.autoencoder import AutoencoderConfig

    torch.manual_seed(0)
    AutoencoderConfig([8, 8, 8], 4, 1, 4, False, 40).build().save_pretrained(folder / "autoencoder")
    for name, count in (("latents", 96), ("validation", 48)):
        shards = str(folder / f"{name}-shards")
        dispatch(["shards", "shapes", shards, "--count", str(count), "--size", "40", "--preset", "two"])
        dispatch(
            ["latents", "export", "--autoencoder", str(folder / "autoencoder"), "--shards", shards, "--out", str(folder / name)]
        )
    return Bench(folder / "latents", folder / "validation", folder / "autoencoder", folder / "out", 512, 2, 8, 1, quick=True)


def main() -> None:
    """Measure, and print the ratios."""
    parser = common.bench_parser(__doc__, "one seed, tiny networks, own latents: under 50 s, shows only that it runs")
    for name in FOLDERS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR")
    parser.add_argument("--recipes", nargs="+", default=["ours", "dit", "minrf"], help="names in configs/convergence")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each recipe (default: 3)")
    parser.add_argument("--images", type=int, default=65_536, help="seen by the longest trainings (default: 65,536)")
    parser.add_argument("--evaluations", type=int, default=5, help="per training (default: 5)")
    parser.add_argument("--prompts", type=int, default=128, help="per evaluation (default: 128)")
    options = parser.parse_args()
    common.quieten()
    print(machine_info())
    if options.quick:
        with tempfile.TemporaryDirectory() as temporary:
            compare(tiny_bench(Path(temporary)), options.recipes)
        return
    folders = {name: vars(options)[name] for name in FOLDERS}
    if None in folders.values():
        parser.error("give --latents, --validation, --autoencoder and --out, or --quick")
    sizes = {name: vars(options)[name] for name in ("images", "evaluations", "prompts", "seeds")}
    compare(Bench(**folders, **sizes), options.recipes)


if __name__ == "__main__":
    main()
