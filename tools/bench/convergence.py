"""Convergence of stage two: our recipe against DiT's and minRF's, on the same latents.

    python tools/bench/convergence.py --latents DIR --validation DIR --autoencoder DIR --out DIR
        [--recipes ours dit minrf] [--seeds 0 1 2] [--images N] [--evaluations K] [--prompts P]
    python tools/bench/convergence.py --quick

A recipe is a YAML of ``configs/convergence``, described in its comments. Each is trained by ``ldm denoiser fit`` once per seed;
only paths, steps and seeds are changed. The latents are of scenes with two objects (``ldm shards shapes --preset two``), those
of the validation set of held-out pairs (``--held-out``). A recipe with a constant learning rate is trained on N images and
evaluated K times in between: after N, N/2, N/4, … A falling learning rate is evaluated fairly only at its end, so such a recipe
is trained twice, on N images and on N/4, each with a schedule of that length.

The averaged weights are evaluated in two ways. On images generated from held-out prompts, with 20 steps of DPM-Solver++ 2M and
guidance 3 for all, from the same noise: prompt accuracy (images that show all that the prompt says) and attribute accuracy (the
share of background, colours, shapes, sizes and relations that they show). And by the error of x0, the mean squared difference
between the predicted and the true clean latent, in ten bins of the noise's share sigma / (alpha + sigma). Unlike the losses
(stored too), this error can be compared between predictions and paths, bin by bin. The bins are summarised by their geometric
mean, whose ratios do not depend on how the bins are weighted.

Seconds are processor seconds of a training step (one thread: OMP_NUM_THREADS=1), measured separately and in turns, so that
neither evaluations nor other work on the machine count.

OUT holds a folder per run; a finished run is not repeated. After each run ``results.jsonl`` and ``convergence.svg`` are written
anew. Ends with `ratio NAME MEDIAN MIN MAX` over the seeds, after a quarter of the other recipe's images, after as many images,
and after as many seconds: of attribute accuracy, ours over the other's (none counts as half an attribute), and of the error of
x0, the other's over ours. Larger is better.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

import common
import numpy as np
import torch
import yaml
from lightning import Callback, LightningModule, Trainer

from ldm.cli import dispatch
from ldm.diffusion.conditioning import denoise
from ldm.diffusion.path import expand
from ldm.diffusion.scheduler import make_scheduler
from ldm.evaluation.prompts import generate_from_captions, shape_accuracy
from ldm.files import atomic_file, read_json, write_json
from ldm.machine import machine_info
from ldm.shapes.scenes import held_out_prompts
from ldm.training.denoiser import NUM_BINS, DenoiserTraining, fixed_noise

CONFIGS = common.CONFIGS / "convergence"
FOLDERS = ("latents", "validation", "autoencoder", "out")
SCORES, STEP_SECONDS = "scores.jsonl", "step_seconds.json"
TINY = {"width": 32, "num_layers": 1, "num_attention_heads": 2}  # of --quick
SAMPLING_STEPS, GUIDANCE = 20, 3.0


# -- in a run ------------------------------------------------------------------------------------------------------------


class Score(Callback):
    """Evaluates the averaged weights at the validations after ``at`` steps; appends a line of JSON to ``file`` each time."""

    def __init__(self, file: str, at: list[int], prompts: int):
        self.file, self.at = Path(file), at
        self.prompts = held_out_prompts("two", prompts)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step not in self.at:
            return
        module = cast(DenoiserTraining, pl_module)
        pipeline = module.pipeline()
        pipeline.scheduler = make_scheduler("dpm++2m", *pipeline.diffusion)
        options: dict[str, Any] = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE}
        images = generate_from_captions(pipeline, self.prompts, seed=0, batch_size=64, **options)
        losses = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        record = {"images": module.num_images_seen, "x0_error": x0_errors(trainer, module)} | losses
        with self.file.open("a") as file:
            file.write(json.dumps(record | shape_accuracy(images, self.prompts)) + "\n")


@torch.no_grad()
def x0_errors(trainer: Trainer, module: DenoiserTraining) -> list[float]:
    """Mean squared errors of x0 on the validation set, in bins of the noise's share."""
    path, prediction = module.objective.path, module.objective.prediction
    shares, errors = [], []
    assert trainer.val_dataloaders is not None
    for batch in trainer.val_dataloaders:
        x0, condition = module.encode(batch)
        share, eps = fixed_noise(sum(map(len, shares)), x0)
        t = path.time(share.logit())
        x_t = path.sample(x0, eps, t)
        y = denoise(module.denoiser, expand(path.input_scale(t), x_t) * x_t, path.network_time(t), condition).float()
        errors.append((prediction.endpoints(path, x_t, y, t).x0 - x0).square().flatten(1).mean(1))
        shares.append(share)
    bins, error = (torch.cat(shares) * NUM_BINS).long(), torch.cat(errors)
    return [float(error[bins == number].mean()) for number in range(NUM_BINS)]


class ProcessorTimes(Callback):
    """Writes the median processor seconds of a step, without the first ones."""

    def __init__(self, file: str):
        self.file, self.times = file, []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.times.append(time.process_time())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write_json(self.file, statistics.median(after - before for before, after in pairwise(self.times[1:])))


# -- the runs ------------------------------------------------------------------------------------------------------------


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
    quick: bool = False

    def fit(self, recipe: str, out: Path, steps: int, every: int, seed: int, callback: type[Callback], **settings: Any) -> None:
        """``ldm denoiser fit`` of a recipe; ``callback`` is a class of this file."""
        callbacks = [{"class_path": f"{callback.__module__}.{callback.__name__}", "init_args": settings}]
        options = {
            "config": CONFIGS / f"{recipe}.yaml", "out": out, "title": out.name, "seed_everything": seed,
            "data.seed": seed, "data.train": self.latents, "data.validation": self.validation,
            "model.autoencoder": self.autoencoder, "trainer.max_steps": steps, "trainer.val_check_interval": every,
            "trainer.callbacks": json.dumps(callbacks),
        }  # fmt: skip
        if self.quick:
            options |= {f"model.denoiser.init_args.{name}": value for name, value in TINY.items()}
        dispatch(["denoiser", "fit", *(text for name, value in options.items() for text in (f"--{name}", str(value)))])


@dataclass(frozen=True)
class Run:
    """One training."""

    recipe: str
    seed: int
    images: int

    def folder(self, bench: Bench) -> Path:
        return bench.out / f"{self.recipe}-{self.seed}-{self.images}"

    def finished(self, bench: Bench) -> bool:
        return (self.folder(bench) / "pipeline").is_dir()  # written last, and whole

    def train(self, bench: Bench) -> None:
        folder = self.folder(bench)
        shutil.rmtree(folder, ignore_errors=True)
        every = max(self.images // batch_size(self.recipe) // 2 ** (bench.evaluations - 1), 1)
        at = [every * 2**power for power in range(bench.evaluations)]
        scores = str(folder / SCORES)
        bench.fit(self.recipe, folder, at[-1], every, self.seed, Score, file=scores, at=at, prompts=bench.prompts)
        shutil.rmtree(folder / "checkpoints")

    def scores(self, bench: Bench) -> list[dict[str, Any]]:
        lines = (self.folder(bench) / SCORES).read_text().splitlines()
        return [{"recipe": self.recipe, "seed": self.seed, "run_images": self.images} | json.loads(line) for line in lines]


def config(recipe: str) -> dict[str, Any]:
    """The YAML of a recipe."""
    return yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())


def batch_size(recipe: str) -> int:
    """Images per step."""
    return config(recipe)["data"]["batch_size"]


def lengths(recipe: str, images: int) -> list[int]:
    """Images of the trainings of a recipe."""
    falls = config(recipe)["model"]["optimiser"]["schedule"] != "constant_with_warmup"
    return [images // 4, images] if falls else [images]


def step_seconds(bench: Bench, recipes: Sequence[str], rounds: int = 5, steps: int = 12) -> dict[str, float]:
    """Seconds per step of each recipe; the minimum of the rounds, since other work only slows a step down."""
    kept = bench.out / STEP_SECONDS
    known = read_json(kept) if kept.is_file() else {}
    wanted = [recipe for recipe in recipes if recipe not in known]
    measured: dict[str, list[float]] = {recipe: [] for recipe in (recipes if wanted else ())}
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(rounds):
            for recipe in common.in_turn([*measured], turn):
                out = Path(temporary) / f"{recipe}-{turn}"
                bench.fit(recipe, out, steps, steps, 0, ProcessorTimes, file=f"{out}.json")
                measured[recipe].append(read_json(f"{out}.json"))
    known |= {recipe: min(values) for recipe, values in measured.items()}
    write_json(kept, known)
    return known


# -- results ------------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Of every seed, (S,)."""

    attributes: np.ndarray
    error: np.ndarray


@dataclass
class Line:
    """Metrics during a training, of K evaluations and S seeds."""

    recipe: str
    run_images: int
    images: np.ndarray  # (K,)
    seconds: np.ndarray  # (K,)
    attributes: np.ndarray  # (S, K)
    accuracy: np.ndarray  # (S, K)
    error: np.ndarray  # (S, K, 10)

    @property
    def name(self) -> str:
        return f"{self.recipe}, {self.run_images:,} images"

    def at(self, seconds: float) -> Measured:
        """After so many seconds, interpolated linearly."""
        metrics = (self.attributes, geometric_mean(self.error))
        return Measured(*(np.array([np.interp(seconds, self.seconds, seed) for seed in metric]) for metric in metrics))


def collect(bench: Bench, runs: Iterable[Run], seconds: dict[str, float]) -> list[Line]:
    """The finished runs, which are also written to ``results.jsonl``."""
    groups: dict[tuple[str, int], list[list[dict[str, Any]]]] = {}
    with atomic_file(bench.out / "results.jsonl", "w") as file:
        for run in runs:
            if run.finished(bench):
                groups.setdefault((run.recipe, run.images), []).append(scores := run.scores(bench))
                file.writelines(json.dumps(score) + "\n" for score in scores)
    lines = []
    for (recipe, images), seeds in groups.items():
        seen = np.array([score["images"] for score in seeds[0]])
        attributes, accuracy, error = (
            np.array([[value(score) for score in scores] for scores in seeds])
            for value in (attribute_accuracy, itemgetter("prompt_accuracy"), itemgetter("x0_error"))
        )
        lines.append(Line(recipe, images, seen, seen / batch_size(recipe) * seconds[recipe], attributes, accuracy, error))
    return lines


def attribute_accuracy(score: dict[str, Any]) -> float:
    """Share of the attributes in the prompts that the images show."""
    return statistics.mean(score[name] for name in ("background", "colour", "shape", "size", "relation"))


def geometric_mean(error: np.ndarray) -> np.ndarray:
    """(…, 10) -> (…)."""
    return np.exp(np.log(error).mean(-1))


def print_summary(lines: Iterable[Line]) -> None:
    """A table of all points, means over the seeds."""
    print(f"{'recipe':>8} {'of run':>9} {'images':>9} {'seconds':>8} {'accuracy':>9} "
          f"{'attributes':>10} {'(least, most)':>15} {'x0 error':>9} bins")  # fmt: skip
    for line in lines:
        for point, images in enumerate(line.images):
            attributes, error = line.attributes[:, point], line.error[:, point].mean(0)
            spread = f"({attributes.min():.3f}, {attributes.max():.3f})"
            bins = " ".join(f"{value:.3f}" for value in error)
            print(f"{line.recipe:>8} {line.run_images:>9,} {images:>9,} {line.seconds[point]:>8.0f} "
                  f"{line.accuracy[:, point].mean():>9.3f} {attributes.mean():>10.3f} "
                  f"{spread:>15} {geometric_mean(error):>9.4f} {bins}")  # fmt: skip
    print(flush=True)


def ratios(bench: Bench, lines: Iterable[Line]) -> dict[str, np.ndarray]:
    """Ours against each other recipe, per seed that both have."""
    by_run = {(line.recipe, line.run_images): line for line in lines}
    ours, quarter = by_run.get(("ours", bench.images)), by_run.get(("ours", bench.images // 4))
    found = {}
    for (recipe, _), line in by_run.items():
        if recipe == "ours" or ours is None or quarter is None:
            continue
        together = min(ours.seconds[-1], line.seconds[-1])
        pairs = {
            "quarter_images": (quarter.at(quarter.seconds[-1]), line.at(line.seconds[-1])),
            "equal_images": (ours.at(ours.seconds[-1]), line.at(line.seconds[-1])),
            "equal_seconds": (ours.at(together), line.at(together)),
        }
        for name, (mine, theirs) in pairs.items():
            least, seeds = 0.5 / bench.prompts, min(len(mine.error), len(theirs.error))
            accuracies = [np.maximum(side.attributes, least)[:seeds] for side in (mine, theirs)]
            found[f"convergence_{name}_{recipe}_attributes"] = accuracies[0] / accuracies[1]
            found[f"convergence_{name}_{recipe}_x0_error"] = theirs.error[:seeds] / mine.error[:seeds]
    return found


# -- the image ---------------------------------------------------------------------------------------------------------

COLOURS = ("#2563c9", "#16875a", "#d9691c", "#a13bb3", "#b58900", "#c92a4b")
WIDTH, HEIGHT, LEFT, TOP, GAP = 360, 230, 56, 34, 96  # of a plot and around it


def write_image(file: Path, lines: Sequence[Line], seeds: int) -> None:
    """Four plots in an SVG: means over the seeds in front of their range; a dot marks the end of a training."""
    images, seconds = [line.images for line in lines], [line.seconds for line in lines]
    attributes, error = [line.attributes for line in lines], [geometric_mean(line.error) for line in lines]
    bins = [(np.arange(NUM_BINS) + 0.5) / NUM_BINS for _ in lines]
    by_bin = [line.error[:, -1] for line in lines]
    plots = [
        _plot("attribute accuracy, held-out pairs", "images seen", images, attributes, log_x=True),
        _plot("attribute accuracy, held-out pairs", "seconds of training, one thread", seconds, attributes, log_x=True),
        _plot("error of x0", "images seen", images, error, log_x=True, log_y=True),
        _plot("error of x0 at the end", "share of noise", bins, by_bin, log_x=False, log_y=True),
    ]
    columns, rows = LEFT + 2 * WIDTH + GAP + 24, TOP + 2 * (HEIGHT + GAP) + 10 * len(lines)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns} {rows}" width="{columns}" height="{rows}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#1d222b">',
        f'<rect width="{columns}" height="{rows}" fill="#fff"/>',
    ]
    for number, plot in enumerate(plots):
        across, down = LEFT + number % 2 * (WIDTH + GAP), TOP + number // 2 * (HEIGHT + GAP)
        parts.append(f'<g transform="translate({across} {down})">{plot}</g>')
    for number, line in enumerate(lines):
        at, down = LEFT + number % 2 * (WIDTH + GAP), rows - 20 * ((len(lines) + 1) // 2 - number // 2)
        label = f"{line.name}" + (f" ({len(line.attributes)} of {seeds} seeds)" if len(line.attributes) < seeds else "")
        parts.append(f'<rect x="{at}" y="{down - 6}" width="18" height="4" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(f'<text x="{at}" dx="24" y="{down}">{label}</text>')
    with atomic_file(file, "w") as written:
        written.write("\n".join([*parts, "</svg>\n"]))


def _plot(title: str, x_label: str, xs: list[np.ndarray], ys: list[np.ndarray], log_x: bool, log_y: bool = False) -> str:
    """One plot with (0, 0) at its upper left corner; each of ``ys`` is (S, K)."""
    across, x_ticks = _axis(np.concatenate(xs), log_x)
    values = np.concatenate([y.ravel() for y in ys])
    down, y_ticks = _axis(values if log_y else np.append(values, 0), log_y)
    marks = [f'<text x="0" y="-14" font-weight="600">{title}</text>']
    for value, label in y_ticks:
        y = HEIGHT * (1 - down(value))
        marks.append(
            f'<path d="M0 {y:.1f}H{WIDTH}" stroke="#dfe3e9"/><text x="-8" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for value, label in x_ticks:
        marks.append(f'<text x="{WIDTH * across(value):.1f}" y="{HEIGHT + 18}" text-anchor="middle">{label}</text>')
    marks.append(f'<text x="{WIDTH}" y="{HEIGHT + 36}" text-anchor="end" fill="#5c6675">{x_label}</text>')
    for number, (x, y) in enumerate(zip(xs, ys, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        at = [f"{WIDTH * across(value):.1f}" for value in x]

        def points(heights: np.ndarray, at: list[str] = at) -> list[str]:
            return [f"{a},{HEIGHT * (1 - down(value)):.1f}" for a, value in zip(at, heights, strict=True)]

        band = " ".join(points(y.min(0)) + points(y.max(0))[::-1])
        mean = points(y.mean(0))
        marks.append(f'<polygon points="{band}" fill="{colour}" opacity="0.15"/>')
        marks.append(f'<polyline points="{" ".join(mean)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        end_x, end_y = mean[-1].split(",")
        marks.append(f'<circle cx="{end_x}" cy="{end_y}" r="4" fill="{colour}"/>')
    return "".join(marks) + f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="#5c6675"/>'


def _axis(values: np.ndarray, log: bool) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """A function from values to 0 … 1, and round values with their labels."""
    if log:
        low, high = math.log10(values[values > 0].min()), math.log10(values.max())
        factors = (1, 2, 5) if high - low < 2.5 else (1,)
        ticks = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    else:
        low, high = float(values.min()), max(float(values.max()), 1e-3)
        step = min(
            (factor * 10.0**power for power in range(-4, 3) for factor in (1, 2, 5)), key=lambda s: abs((high - low) / s - 5)
        )
        ticks = [step * number for number in range(math.floor(low / step), math.ceil(high / step) + 1)]
    room = 0.04 * (high - low) or 0.5
    low, high = (low if not log and low == 0 else low - room), high + room

    def place(value: float) -> float:
        return ((math.log10(max(value, 1e-12)) if log else value) - low) / (high - low)

    labels = [(tick, f"{tick / 1000:g}k" if tick >= 1000 else f"{tick:g}") for tick in (float(f"{t:.6g}") for t in ticks)]
    return place, [(tick, label) for tick, label in labels if 0 <= place(tick) <= 1]


# -- the comparison -----------------------------------------------------------------------------------------------------------


def compare(bench: Bench, recipes: Sequence[str], seeds: Sequence[int]) -> None:
    """Train what is not trained yet; print and plot the results after each training."""
    bench.out.mkdir(parents=True, exist_ok=True)
    seconds = step_seconds(bench, recipes, *((1, 4) if bench.quick else ()))
    print("seconds per step: " + ", ".join(f"{recipe} {seconds[recipe]:.4f}" for recipe in recipes), flush=True)
    runs = [Run(recipe, seed, images) for seed in seeds for recipe in recipes for images in lengths(recipe, bench.images)]
    show = partial(collect, bench, runs, seconds)
    for run in runs:
        if not run.finished(bench):
            run.train(bench)
            print_summary(lines := show())
            write_image(bench.out / "convergence.svg", lines, len(seeds))
    print_summary(lines := show())
    write_image(bench.out / "convergence.svg", lines, len(seeds))
    common.print_ratios({name: values.tolist() for name, values in ratios(bench, lines).items()})


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
    return Bench(folder / "latents", folder / "validation", folder / "autoencoder", folder / "out", 768, 3, 8, quick=True)


def main() -> None:
    """Measure, and print the ratios."""
    parser = common.bench_parser(__doc__, "one seed, tiny networks, own latents: under 50 s, shows only that it runs")
    for name in FOLDERS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR")
    parser.add_argument("--recipes", nargs="+", default=["ours", "dit", "minrf"], help="names in configs/convergence")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=65_536, help="seen by the longest trainings (default: 65,536)")
    parser.add_argument("--evaluations", type=int, default=5, help="per training (default: 5)")
    parser.add_argument("--prompts", type=int, default=128, help="per evaluation (default: 128)")
    options = parser.parse_args()
    common.quieten()
    print(machine_info())
    if options.quick:
        with tempfile.TemporaryDirectory() as temporary:
            compare(tiny_bench(Path(temporary)), options.recipes, [0])
        return
    folders = {name: vars(options)[name] for name in FOLDERS}
    if None in folders.values():
        parser.error("give --latents, --validation, --autoencoder and --out, or --quick")
    bench = Bench(**folders, images=options.images, evaluations=options.evaluations, prompts=options.prompts)
    compare(bench, options.recipes, options.seeds)


if __name__ == "__main__":
    main()
