"""The whole path on the built-in shapes: the same commands and recipes that real training uses, one after another.

Every stage is a command line. Its arguments go into the report, so that each step can be repeated by hand; a stage whose
product stands is not run again, so that an interrupted quickstart goes on from its last finished stage.
"""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ldm.data.image_dataset import ImageDataset
from ldm.errors import LdmError, UsageError
from ldm.evaluation.evaluate import generate_from_captions, original_and_reconstruction, reconstruction_figures, shape_accuracy
from ldm.files import atomic_file, read_json, require_new_folder, write_json
from ldm.losses import PerceptualLoss
from ldm.machine import machine_info
from ldm.models.autoencoder import load_autoencoder
from ldm.pipeline import load_pipeline
from ldm.progress import Progress, duration
from ldm.reporting.grids import captioned_grid, paired_grid
from ldm.reporting.metrics_csv import read_metrics
from ldm.reporting.pages import Report
from ldm.runs.layout import RunFolder
from ldm.shapes.scenes import held_out_prompts, seen_prompts

RunCommand = Callable[[Sequence[str]], None]

SIZE = 40  # pixels: at 32 a small star has arms of one pixel, at 64 everything costs three times as much
# 10,000 images in ten minutes: the 2,240 captions come about five times each
IMAGES_PER_MINUTE, MOST_IMAGES, LEAST_IMAGES, VALIDATION_IMAGES = 1000, 20_000, 640, 256
SHOWN_PROMPTS = 32
SAMPLING = {"num_inference_steps": 25, "guidance_scale": 3.0}

# Where the minutes go; the rest is drawing, export, previews, sampling and start-up.
SHARES = {"autoencoder": 0.24, "denoiser": 0.52}
# A ten-minute run takes at least these steps, however slow the machine: with fewer the words are not learnt.
LEAST_STEPS = {"autoencoder": 800, "denoiser": 1050}
CALIBRATION_STEPS = 12


@dataclass
class Quickstart:
    """One quickstart in ``out``: its settings, and the record of what it did (``state.json``)."""

    out: Path
    minutes: float
    seed: int
    run: RunCommand
    state: dict[str, Any] = field(default_factory=dict)

    def claim(self) -> None:
        """Take ``out`` for this quickstart, or go on with the one that stands there.

        Raises:
            UsageError: when ``out`` holds anything else.
        """
        asked = {"minutes": self.minutes, "seed": self.seed}
        record = self.out / "state.json"
        if record.is_file():
            self.state = read_json(record)
            if self.state.get("asked") != asked:
                raise UsageError(f"{self.out} holds a quickstart of {self.state.get('asked')}; give a new --out for {asked}")
            return
        require_new_folder(self.out, "the quickstart")
        self.state = {"asked": asked, "seconds": {}, "commands": {}}
        self.out.mkdir(parents=True, exist_ok=True)
        self.remember()

    def remember(self) -> None:
        write_json(self.out / "state.json", self.state)

    def stage(self, comment: str, arguments: list[str], product: Path, leftover: Path | None = None) -> None:
        """Run one command unless its ``product`` stands; ``leftover`` is what an interrupted try of it left."""
        if not product.exists():
            if leftover is not None and leftover.exists():
                shutil.rmtree(leftover)
            self.state["commands"][comment] = shlex.join(["ldm", *arguments])
            self.remember()
            start = time.monotonic()
            try:
                self.run(arguments)
            finally:
                spent = self.state["seconds"].get(comment, 0) + time.monotonic() - start
                self.state["seconds"][comment] = round(spent, 1)
                self.remember()

    def recipe(self, stage: str, changes: dict[str, Any]) -> Path:
        """The shipped recipe of a stage with this run's paths, steps and seed, as a YAML file of its own."""
        path = self.out / "configs" / f"{stage}.yaml"
        config = yaml.safe_load(recipe_path(f"shapes/{stage}.yaml").read_text())
        for name, value in changes.items():
            *parents, last = name.split(".")
            place = config
            for parent in parents:
                place = place[parent]
            place[last] = value
        with atomic_file(path, "w") as file:
            file.write(f"# {recipe_path(f'shapes/{stage}.yaml').name} of ldm, with the paths and steps of this run\n")
            yaml.safe_dump(config, file, sort_keys=False)
        return path

    def fit(self, stage: str, product: str, data: dict[str, str], extra: Callable[[int], dict[str, Any]]) -> None:
        """Train one stage: find the number of steps for this machine, write its YAML, run ``fit``."""
        if (self.out / product).exists():
            return
        if stage not in self.state.setdefault("steps", {}):
            start = time.monotonic()
            self.state["steps"][stage] = self.steps_in_budget(stage, data)
            self.state["seconds"][f"time the {stage} on this machine"] = round(time.monotonic() - start, 1)
            self.remember()
        steps = self.state["steps"][stage]
        changes = {
            "seed_everything": self.seed,
            "trainer.max_steps": steps,
            "trainer.val_check_interval": max(steps // 4, 1),
            **{f"data.{split}": folder for split, folder in data.items()},
            **extra(steps),
        }
        title = {"autoencoder": "stage 1 of 2, autoencoder", "denoiser": "stage 2 of 2, denoiser"}[stage]
        arguments = ["--config", str(self.recipe(stage, changes)), "--out", str(self.out / "runs" / stage)]
        arguments += ["--export", str(self.out / product), "--title", title]
        self.stage(f"train the {stage}", [stage, "fit", *arguments], self.out / product, self.out / "runs" / stage)

    def steps_in_budget(self, stage: str, data: dict[str, str]) -> int:
        """How many steps fit into this stage's share of the minutes, timed by a few steps of the very same fit."""
        trial = self.out / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        changes = {f"data.{split}": folder for split, folder in data.items()}
        if stage == "autoencoder":
            # the whole game, so that a step with the discriminator is what is timed
            changes |= {
                "model.adversary.start": 0,
                "model.adversary.discriminator_warmup": 0,
                "model.adversary.generator_ramp": 1,
            }
        else:
            changes |= {"model.autoencoder": str(self.out / "autoencoder"), "model.preview_prompts": []}
        changes |= {"trainer.max_steps": CALIBRATION_STEPS, "trainer.val_check_interval": CALIBRATION_STEPS}
        timing = {"class_path": "ldm.runs.callbacks.StepTimes", "init_args": {"file": str(trial / "seconds.json")}}
        config = self.recipe(stage, changes | {"trainer.callbacks": [timing], "data.validation_samples": 1})
        title = f"timing the {stage} on this machine"
        self.run([stage, "fit", "--config", str(config), "--out", str(trial), "--title", title])
        seconds = read_json(trial / "seconds.json")["seconds_per_step"]
        shutil.rmtree(trial)
        least = round(LEAST_STEPS[stage] * min(self.minutes / 10, 1))
        return max(round(self.minutes * 60 * SHARES[stage] / seconds), least, 20)


def quickstart(out: Path, minutes: float, seed: int, run: RunCommand) -> None:
    """Everything from nothing to images from words, under ``out``.

    Args:
        minutes: what to aim at; a slow machine takes longer rather than train too little.
        seed: of the images, the weights and the noise.
        run: runs one ``ldm`` command line.

    Raises:
        UsageError: when ``out`` holds other work.
    """
    if not (math.isfinite(minutes) and minutes > 0):
        raise UsageError(f"--minutes is {minutes:g}; give a number above 0")
    if not 0 <= seed < 2**32 - 1:
        raise UsageError(f"--seed is {seed}; give 0 to {2**32 - 2}")
    quick = Quickstart(out, minutes, seed, run)
    quick.claim()
    try:
        run_stages(quick)
    except KeyboardInterrupt:
        raise LdmError(f"interrupted; run the same quickstart again to go on in {out} from its last finished stage") from None
    score_and_report(quick)


def run_stages(quick: Quickstart) -> None:
    """All that is trained or written before anything is scored."""
    out, minutes, seed = quick.out, quick.minutes, quick.seed
    places = {name: out / name for name in ("shards", "shards-validation", "autoencoder", "latents", "latents-validation")}
    images = round(min(max(minutes * IMAGES_PER_MINUTE, LEAST_IMAGES), MOST_IMAGES))
    for name, count, its_seed, few in (
        ("shards", images, seed, []),
        ("shards-validation", VALIDATION_IMAGES, seed + 1, ["--held-out"]),
    ):
        arguments = ["shards", "shapes", str(places[name]), "--count", str(count), "--size", str(SIZE)]
        quick.stage(f"draw the {name}", [*arguments, "--seed", str(its_seed), *few], places[name])
    quick.fit(
        "autoencoder",
        "autoencoder",
        {"train": str(places["shards"]), "validation": str(places["shards-validation"])},
        lambda steps: {
            "model.adversary.start": steps * 2 // 3,
            "model.adversary.discriminator_warmup": steps // 15,
            "model.adversary.generator_ramp": max(steps // 6, 1),
        },
    )
    for name, shards in (("latents", "shards"), ("latents-validation", "shards-validation")):
        arguments = ["latents", "export", "--autoencoder", str(places["autoencoder"]), "--shards", str(places[shards])]
        # an unfinished export stands without its statistics; running it again is how it goes on
        finished = places[name] / "manifest.json"
        quick.stage(f"export the {name}", [*arguments, "--out", str(places[name])], finished)
    quick.fit(
        "denoiser",
        "pipeline",
        {"train": str(places["latents"]), "validation": str(places["latents-validation"])},
        lambda steps: {"model.autoencoder": str(places["autoencoder"])},
    )


def score_and_report(quick: Quickstart) -> None:
    """Draw the held-out prompts, read them back, and write samples.png, report.json and report.html."""
    out, seed = quick.out, quick.seed
    began = time.monotonic()
    dataset, autoencoder = ImageDataset(out / "shards-validation"), load_autoencoder(out / "autoencoder")
    perceptual = PerceptualLoss("alex", "random")
    figures = reconstruction_figures(autoencoder, dataset, perceptual)
    pipeline = load_pipeline(out / "pipeline")
    drawn, accuracy = {}, {}
    count = 256 if quick.minutes >= 5 else 64
    for kind, prompts in (("held-out", held_out_prompts("one", count, seed)), ("seen", seen_prompts("one", count // 4, seed))):
        with Progress(f"drawing {kind} prompts", len(prompts)) as progress:
            drawn[kind] = generate_from_captions(pipeline, prompts, seed, 64, on_progress=progress.update, **SAMPLING), prompts
        accuracy[kind] = shape_accuracy(*drawn[kind])
    images, prompts = (few[:SHOWN_PROMPTS] for few in drawn["held-out"])
    right = [read_scene_is(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    samples = captioned_grid(images, prompts, columns=8, marks=right)
    with atomic_file(out / "samples.png") as file:
        samples.save(file, "PNG")
    quick.state["seconds"]["sample and score"] = round(time.monotonic() - began, 1)
    measure = ["ldm", "evaluate", "autoencoder", f"{out / 'autoencoder'}", "--shards", f"{out / 'shards-validation'}"]
    ask = ["ldm", "evaluate", "pipeline", f"{out / 'pipeline'}", "--seed", f"{seed}"]
    ask += ["--steps", f"{SAMPLING['num_inference_steps']}", "--guidance", f"{SAMPLING['guidance_scale']}"]
    commands = [
        *map(list, quick.state["commands"].items()),
        ["measure the reconstructions", shlex.join(measure)],
        ["score held-out prompts", shlex.join([*ask, "--prompts", f"{count}"])],
        ["score prompts of pairs seen", shlex.join([*ask, "--prompts", f"{count // 4}", "--seen"])],
    ]
    quick.remember()
    originals, again = original_and_reconstruction(autoencoder, dataset, 8)
    total = sum(quick.state["seconds"].values())
    record = {
        "prompt_accuracy": accuracy["held-out"]["prompt_accuracy"],
        "held_out": accuracy["held-out"],
        "seen": accuracy["seen"],
        "reconstruction": figures,
        "lpips": perceptual.description,
        "steps": quick.state["steps"],
        "seconds": quick.state["seconds"],
        "seconds_total": round(total, 1),
        "asked": quick.state["asked"],
        "machine": machine_info(),
        "prompts": count,
        "commands": commands,
    }
    write_json(out / "report.json", record)
    write_report(quick, record, samples, paired_grid([("original", originals), ("reconstruction", again)]))
    print(
        f"prompt accuracy {record['prompt_accuracy']:.3f} on {count} prompts of pairs never seen, "
        f"PSNR {figures['psnr']:.1f} dB, {duration(total)} in all\n"
        f"look at {out / 'report.html'} and {out / 'samples.png'}; draw more: "
        f'ldm sample {shlex.quote(str(out / "pipeline"))} "a large pink ring at the top on a gray background" --out images'
    )


def write_report(quick: Quickstart, record: dict[str, Any], samples: Image.Image, pairs: Image.Image) -> None:
    """One self-contained page."""
    out = quick.out
    page = Report("ldm quickstart", "From drawn shapes to images from words, trained here from nothing")
    held_out, psnr = record["held_out"], record["reconstruction"]["psnr"]
    page.metrics(
        {
            "prompt accuracy, held-out pairs": f"{held_out['prompt_accuracy']:.3f}",
            "prompt accuracy, pairs seen": f"{record['seen']['prompt_accuracy']:.3f}",
            "reconstruction PSNR (dB)": f"{psnr:.2f}",
            "time": duration(record["seconds_total"]),
        }
    )
    note = "Colour and shape of every prompt were never seen together in training. A tick: all that the caption names is there."
    page.image("Images from words", samples, note)
    page.table(
        "What the scorer read back from the pixels",
        ["attribute", "held-out pairs", "pairs seen"],
        [[name, held_out[name], record["seen"][name]] for name in held_out],
    )
    page.image("What the autoencoder keeps", pairs, f"LPIPS in training: {record['lpips']}.")
    page.table("Reconstruction", ["figure", "value"], [[name, value] for name, value in record["reconstruction"].items()])
    logs = {stage: read_metrics(RunFolder(out / "runs" / stage).metrics) for stage in ("autoencoder", "denoiser")}
    for title, stage, names, log_y in (
        ("Stage one: reconstruction loss", "autoencoder", ["train/rec", "train/lpips"], True),
        ("Stage one: the game", "autoencoder", ["train/g", "train/d", "train/d_accuracy", "train/g_weight"], False),
        ("Stage one: validation PSNR (dB)", "autoencoder", ["val/psnr"], False),
        ("Stage two: loss", "denoiser", ["train/loss", "val/loss"], True),
    ):
        series = {name: logs[stage].get(name, ([], [])) for name in names}
        page.curve(title, series, "batches trained", "", log_y=log_y, smooth=5)
    for step, path in RunFolder(out / "runs" / "denoiser").previews():
        page.image(f"Stage two at batch {step}", Image.open(path))
    rows = [[name, duration(seconds)] for name, seconds in record["seconds"].items()]
    page.table("Time, without the seconds of starting up", ["step", "m:ss"], rows)
    page.table("Machine and versions", ["", ""], [[name, value] for name, value in record["machine"].items()])
    page.text(
        "Do each step again",
        f"In {Path.cwd()}, with .venv activated. A command makes no folder anew that stands already: move this run away first, "
        "or give another --out (to fit also --export).",
    )
    page.commands("The commands", [(comment, command) for comment, command in record["commands"]])
    page.save(out / "report.html")


def read_scene_is(image: Image.Image, prompt: str) -> bool:
    """Whether the image shows all that the prompt names."""
    return shape_accuracy([image], [prompt])["prompt_accuracy"] == 1.0


def recipe_path(name: str) -> Path:
    """A shipped recipe: in the installed package, or in the checkout beside it."""
    here = Path(__file__).parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"configs/{name} is not there; install ldm again")
