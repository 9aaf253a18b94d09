"""``ldm quickstart``: trains a model on the built-in shapes, with the same commands and recipes as real training.

Every stage is a command line, which the report shows so that it can be repeated. A stage whose output exists is skipped, so
that an interrupted quickstart resumes after its last finished stage.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

import yaml
from PIL import Image
from pydantic import Field
from typing_extensions import TypedDict

from ldm.data.image_dataset import ImageDataset
from ldm.errors import LdmError, UsageError
from ldm.evaluation.prompts import generate_from_captions, shape_accuracy
from ldm.evaluation.reconstruction import original_and_reconstruction, reconstruction_metrics
from ldm.files import atomic_file, check_type, read_json, require_new_folder, require_version, write_json
from ldm.locks import hold_folder
from ldm.losses.perceptual import PerceptualLoss
from ldm.machine import machine_info
from ldm.models.autoencoder import load_autoencoder
from ldm.pipeline import load_pipeline
from ldm.progress import Progress, duration
from ldm.reporting.grids import captioned_grid, paired_grid, read_grid
from ldm.reporting.metrics_csv import MAX_STEPS, read_metrics
from ldm.reporting.pages import Report
from ldm.runs.layout import RunFolder
from ldm.shapes.scenes import held_out_prompts, seen_prompts
from ldm.terminal import printable, say

RunCommand = Callable[[Sequence[str]], None]

FORMAT_VERSION = 1  # of state.json

SIZE = 40  # pixels: at 32 the arms of a small star are one pixel wide, at 64 everything takes three times as long
# in ten minutes 10,000 images, about five for each of the 2,240 captions
IMAGES_PER_MINUTE, MAX_IMAGES, MIN_IMAGES, VALIDATION_IMAGES = 1000, 20_000, 640, 256
SHOWN_PROMPTS = 32
MAX_MINUTES = 60 * 24 * 30
SAMPLING = {"num_inference_steps": 25, "guidance_scale": 3.0}

# fractions of the time budget; the rest goes to data, export, previews, sampling and start-up
TIME_SHARES = {"autoencoder": 0.24, "denoiser": 0.52}
# a ten-minute run takes at least these steps, however slow the machine: with fewer the captions are not learnt
MIN_STEPS = {"autoencoder": 800, "denoiser": 1050}
CALIBRATION_STEPS = 12


class Asked(TypedDict):
    """Settings of a quickstart."""

    minutes: float
    seed: int


class State(TypedDict):
    """The record of a quickstart's finished stages."""

    format_version: NotRequired[int]
    asked: Asked
    seconds: dict[str, float]
    commands: dict[str, str]
    steps: NotRequired[dict[str, Annotated[int, Field(ge=1, le=MAX_STEPS)]]]


class StepSeconds(TypedDict):
    """What :class:`ldm.runs.callbacks.StepTimes` measures."""

    seconds_per_step: Annotated[float, Field(gt=0)]


@dataclass
class Quickstart:
    """A quickstart in ``out``: its settings, and the record of its finished stages in ``state.json``."""

    out: Path
    minutes: float
    seed: int
    run: RunCommand
    state: State = field(init=False)

    def claim(self) -> None:
        """Begin in the empty folder ``out``, or resume the quickstart with these settings; UsageError for any other content."""
        asked = Asked(minutes=self.minutes, seed=self.seed)
        record = self.out / "state.json"
        if record.is_file():
            content = read_json(record, dict[str, Any])
            require_version(content.get("format_version"), FORMAT_VERSION, f"{record}: the quickstart")
            self.state = check_type(content, str(record), State)
            if self.state["asked"] != asked:
                raise UsageError(f"{self.out} holds a quickstart of {self.state['asked']}; give a new --out for {asked}")
            return
        require_new_folder(self.out, "the quickstart", in_place=True)
        self.state = State(format_version=FORMAT_VERSION, asked=asked, seconds={}, commands={})
        self.save_state()

    def save_state(self) -> None:
        write_json(self.out / "state.json", self.state)

    def stage(self, comment: str, arguments: list[str], output: Path, leftover: Path | None = None) -> None:
        """Run a command unless its ``output`` exists; ``leftover`` is a folder that an interrupted run of it may have left."""
        if not output.exists():
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)
            self.state["commands"][comment] = shlex.join(["ldm", *arguments])
            self.save_state()
            start = time.monotonic()
            try:
                self.run(arguments)
            finally:
                spent = self.state["seconds"].get(comment, 0) + time.monotonic() - start
                self.state["seconds"][comment] = round(spent, 1)
                self.save_state()

    def recipe(self, stage: str, changes: dict[str, Any]) -> Path:
        """Write the recipe of a stage with the paths, steps and seed of this run; ``changes`` has dotted keys."""
        path = self.out / "configs" / f"{stage}.yaml"
        config = yaml.safe_load(recipe_path(f"shapes/{stage}.yaml").read_text())
        for name, value in changes.items():
            *parents, last = name.split(".")
            section = config
            for parent in parents:
                section = section[parent]
            section[last] = value
        with atomic_file(path, "w") as file:
            file.write(f"# configs/shapes/{stage}.yaml of ldm, with the paths and steps of this run\n")
            yaml.safe_dump(config, file, sort_keys=False)
        return path

    def fit(self, stage: str, artifact: str, changes: Callable[[int], dict[str, Any]]) -> None:
        """Train a stage for as many steps as its time allows; ``changes`` gives those of the recipe for a number of steps."""
        if (self.out / artifact).exists():
            return
        if stage not in (counts := self.state.setdefault("steps", {})):
            start = time.monotonic()
            counts[stage] = self.steps_in_budget(stage, changes(0))
            self.state["seconds"][f"time the {stage} on this machine"] = round(time.monotonic() - start, 1)
            self.save_state()
        steps = counts[stage]
        settings = {
            "seed_everything": self.seed,
            "trainer.max_steps": steps,
            "trainer.val_check_interval": max(steps // 4, 1),
        }
        title = {"autoencoder": "stage 1 of 2, autoencoder", "denoiser": "stage 2 of 2, denoiser"}[stage]
        arguments = ["--config", str(self.recipe(stage, settings | changes(steps))), "--out", str(self.out / "runs" / stage)]
        arguments += ["--export", str(self.out / artifact), "--title", title]
        self.stage(f"train the {stage}", [stage, "fit", *arguments], self.out / artifact, self.out / "runs" / stage)

    def steps_in_budget(self, stage: str, changes: dict[str, Any]) -> int:
        """The number of steps that fit into the stage's share of the time budget, from a short trial of the same ``fit``."""
        trial = self.out / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        timing = {"class_path": "ldm.runs.callbacks.StepTimes", "init_args": {"file": str(trial / "seconds.json")}}
        changes |= {
            "trainer.max_steps": CALIBRATION_STEPS,
            "trainer.val_check_interval": CALIBRATION_STEPS,
            "trainer.callbacks": [timing],
            "data.validation_samples": 1,
        }
        if stage == "denoiser":
            changes["model.preview_prompts"] = []
        title = f"timing the {stage} on this machine"
        self.run([stage, "fit", "--config", str(self.recipe(stage, changes)), "--out", str(trial), "--title", title])
        seconds = read_json(trial / "seconds.json", StepSeconds)["seconds_per_step"]
        shutil.rmtree(trial)
        least = round(MIN_STEPS[stage] * min(self.minutes / 10, 1))
        return max(round(self.minutes * 60 * TIME_SHARES[stage] / seconds), least, 20)


def quickstart(out: Path, minutes: float, seed: int, run: RunCommand) -> None:
    """Train a text-to-image model on generated images, and write a report, under ``out``.

    Args:
        minutes: time budget; a slow machine takes longer, so that the model still learns something.
        seed: of images, weights and noise.
        run: runs one ``ldm`` command line.

    Raises:
        UsageError: when ``out`` holds other work.
    """
    if not 0 < minutes <= MAX_MINUTES:
        raise UsageError(f"--minutes is {minutes:g}; give a number above 0 and up to {MAX_MINUTES:,}")
    if not 0 <= seed < 2**32 - 1:
        raise UsageError(f"--seed is {seed}; give 0 to {2**32 - 2}")
    quick = Quickstart(out, minutes, seed, run)
    with hold_folder(out, f"running the quickstart in {out}"):
        quick.claim()
        try:
            run_stages(quick)
        except KeyboardInterrupt:
            again = f"run the same quickstart again to resume in {out} after its last finished stage"
            raise LdmError(f"interrupted; {again}") from None
        score_and_report(quick)


def run_stages(quick: Quickstart) -> None:
    """Generate the data, train both stages, export."""
    out = quick.out
    images = round(min(max(quick.minutes * IMAGES_PER_MINUTE, MIN_IMAGES), MAX_IMAGES))
    for name, count, seed, options in (
        ("shards", images, quick.seed, []),
        ("shards-validation", VALIDATION_IMAGES, quick.seed + 1, ["--held-out"]),
    ):
        arguments = ["shards", "shapes", str(out / name), "--count", str(count), "--size", str(SIZE)]
        quick.stage(f"generate the {name}", [*arguments, "--seed", str(seed), *options], out / name)

    def data(name: str) -> dict[str, Any]:
        return {"data.train": str(out / name), "data.validation": str(out / f"{name}-validation")}

    def autoencoder_changes(steps: int) -> dict[str, Any]:
        return data("shards") | {
            "model.adversary.start": steps * 2 // 3,
            "model.adversary.discriminator_warmup": steps // 15,
            "model.adversary.generator_ramp": max(steps // 6, 1),
        }

    quick.fit("autoencoder", "autoencoder", autoencoder_changes)
    for name, shards in (("latents", "shards"), ("latents-validation", "shards-validation")):
        arguments = ["latents", "export", "--autoencoder", str(out / "autoencoder"), "--shards", str(out / shards)]
        # an unfinished export has no manifest; running the command again resumes it
        quick.stage(f"export the {name}", [*arguments, "--out", str(out / name)], out / name / "manifest.json")
    quick.fit("denoiser", "pipeline", lambda _: data("latents") | {"model.autoencoder": str(out / "autoencoder")})


def score_and_report(quick: Quickstart) -> None:
    """Generate images of held-out prompts, score them, and write samples.png, report.json and report.html."""
    out, seed = quick.out, quick.seed
    began = time.monotonic()
    dataset, autoencoder = ImageDataset(out / "shards-validation"), load_autoencoder(out / "autoencoder")
    perceptual = PerceptualLoss("alex", "random")
    metrics = reconstruction_metrics(autoencoder, dataset, perceptual)
    pipeline = load_pipeline(out / "pipeline")
    count = 256 if quick.minutes >= 5 else 64
    prompts = {"held-out": held_out_prompts("one", count, seed), "seen": seen_prompts("one", count // 4, seed)}
    images, accuracy = {}, {}
    for kind, asked in prompts.items():
        with Progress(f"generating {kind} prompts", len(asked)) as progress:
            images[kind] = generate_from_captions(pipeline, asked, seed, 64, on_progress=progress.update, **SAMPLING)
        accuracy[kind] = shape_accuracy(images[kind], asked)
    shown, captions = images["held-out"][:SHOWN_PROMPTS], prompts["held-out"][:SHOWN_PROMPTS]
    one_each = zip(shown, captions, strict=True)
    correct = [shape_accuracy([image], [prompt])["prompt_accuracy"] == 1.0 for image, prompt in one_each]
    samples = captioned_grid(shown, captions, columns=8, marks=correct)
    with atomic_file(out / "samples.png") as file:
        samples.save(file, "PNG")
    quick.state["seconds"]["sample and score"] = round(time.monotonic() - began, 1)
    evaluate = ["ldm", "evaluate", "autoencoder", f"{out / 'autoencoder'}", "--shards", f"{out / 'shards-validation'}"]
    score = ["ldm", "evaluate", "pipeline", f"{out / 'pipeline'}", "--seed", f"{seed}"]
    score += ["--steps", f"{SAMPLING['num_inference_steps']}", "--guidance", f"{SAMPLING['guidance_scale']}"]
    commands = [
        *map(list, quick.state["commands"].items()),
        ["measure the reconstructions", shlex.join(evaluate)],
        ["score held-out prompts", shlex.join([*score, "--prompts", f"{count}"])],
        ["score seen prompts", shlex.join([*score, "--prompts", f"{count // 4}", "--seen"])],
    ]
    quick.save_state()
    originals, reconstructions = original_and_reconstruction(autoencoder, dataset, 8)
    total = sum(quick.state["seconds"].values())
    record = {
        "prompt_accuracy": accuracy["held-out"]["prompt_accuracy"],
        "held_out": accuracy["held-out"],
        "seen": accuracy["seen"],
        "reconstruction": metrics,
        "lpips": perceptual.description,
        "steps": quick.state.get("steps", {}),
        "seconds": quick.state["seconds"],
        "seconds_total": round(total, 1),
        "asked": quick.state["asked"],
        "machine": machine_info(),
        "prompts": count,
        "commands": commands,
    }
    write_json(out / "report.json", record)
    write_report(quick, record, samples, paired_grid([("original", originals), ("reconstruction", reconstructions)]))
    say(
        f"prompt accuracy {record['prompt_accuracy']:.3f} on {count} held-out prompts, "
        f"reconstruction PSNR {metrics['psnr']:.1f} dB, time {duration(total)}\n"
        f"report: {printable(out / 'report.html')}, samples: {printable(out / 'samples.png')}; generate more: ldm sample "
        f'{printable(shlex.quote(str(out / "pipeline")))} "a large pink ring at the top on a gray background" --out images'
    )


def write_report(quick: Quickstart, record: dict[str, Any], samples: Image.Image, pairs: Image.Image) -> None:
    """Write report.html."""
    out = quick.out
    page = Report("ldm quickstart", "A text-to-image model, trained from scratch on generated shapes")
    held_out, psnr = record["held_out"], record["reconstruction"]["psnr"]
    page.metrics(
        {
            "prompt accuracy, held-out prompts": f"{held_out['prompt_accuracy']:.3f}",
            "prompt accuracy, seen prompts": f"{record['seen']['prompt_accuracy']:.3f}",
            "reconstruction PSNR (dB)": f"{psnr:.2f}",
            "time": duration(record["seconds_total"]),
        }
    )
    note = "Colour and shape of each prompt never occur together in training. A tick marks an image that matches its prompt."
    page.image("Held-out prompts", samples, note)
    page.table(
        "Attribute accuracy",
        ["attribute", "held-out prompts", "seen prompts"],
        [[name, held_out[name], record["seen"][name]] for name in held_out],
    )
    page.image("Reconstructions of the autoencoder", pairs, f"LPIPS in training: {record['lpips']}.")
    page.table("Reconstruction metrics", ["metric", "value"], [*record["reconstruction"].items()])
    logs = {stage: read_metrics(RunFolder(out / "runs" / stage).metrics) for stage in ("autoencoder", "denoiser")}
    for title, stage, names, log_y in (
        ("Stage one: reconstruction loss", "autoencoder", ["train/rec", "train/lpips"], True),
        ("Stage one: adversarial losses", "autoencoder", ["train/g", "train/d", "train/d_accuracy", "train/g_weight"], False),
        ("Stage one: validation PSNR (dB)", "autoencoder", ["val/psnr"], False),
        ("Stage two: loss", "denoiser", ["train/loss", "val/loss"], True),
    ):
        series = {name: logs[stage].get(name, ([], [])) for name in names}
        page.curve(title, series, "step", "", log_y=log_y, smooth=5)
    for step, path in RunFolder(out / "runs" / "denoiser").previews():
        page.image(f"Stage two, step {step}", read_grid(path)[0])
    page.table("Time", ["stage", "m:ss"], [[name, duration(seconds)] for name, seconds in record["seconds"].items()])
    page.table("Machine and versions", ["", ""], [*record["machine"].items()])
    page.text(
        "Repeat a stage",
        f"Run its command in {Path.cwd()}. Commands do not overwrite existing folders: move this run away first, or give "
        "another --out (and --export, for fit).",
    )
    page.commands("Commands", record["commands"])
    page.save(out / "report.html")


def recipe_path(name: str) -> Path:
    """A recipe in the installed package, or in the checkout."""
    here = Path(__file__).parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"configs/{name} does not exist; reinstall ldm")
