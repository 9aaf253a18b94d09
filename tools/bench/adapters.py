"""Adapters and full fine-tuning: a new colour, shape or style from 200 images, by each method, on the quickstart's model.

    ldm quickstart --out quickstart
    python tools/bench/adapters.py --quickstart quickstart --out adapters-bench [--concepts colour] [--seeds 0 1 2]
    python tools/bench/adapters.py --quick

The base has never seen brown objects, arrows, or outlines. Every method trains on the same 200 images of one of these and, half
of each batch, on 200 that the base has generated (prior preservation), in the same order, with the learning rate of `RATES`;
`--rates` tries others on the first concept with the first seed, and takes the one with the lowest validation loss. After each
run images of prompts are scored: new ones, whose captions are in no training image, and old ones of held-out pairs. The
validation loss is of 64 other images of the concept.

OUT holds a folder per run; a finished run is not repeated. Ends with `ratio NAME MEDIAN MIN MAX` over concepts and seeds: the
steps after which LoRA has its final loss over those after which a method has it (0 where it never does), the share of the old
prompts that are still right, the model's bytes over those of an adapter of rank 8, and seconds of a step: peft's LoRA on
diffusers' PixArt of the same size over ours.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common  # first
import numpy as np
import peft
import torch
import yaml
from diffusers import PixArtTransformer2DModel
from timed_fit import make_data

from ldm.cli import dispatch
from ldm.data.writer import write_images
from ldm.evaluation.prompts import generate_from_captions, shape_accuracy
from ldm.files import read_json, write_json
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.dit import DiT, transformer_blocks
from ldm.pipeline import LatentDiffusionPipeline, load_pipeline
from ldm.shapes import scenes, scorer
from ldm.training.adapters import Adapter, AdapterConfig

RECIPE = common.CONFIGS / "shapes" / "denoiser.yaml"
BROWN = (140, 80, 35)  # one that the scorer still reads from images which the autoencoder has reconstructed
ARROW = np.array([(0, -1), (0.85, -0.1), (0.35, -0.1), (0.35, 0.95), (-0.35, 0.95), (-0.35, -0.1), (-0.85, -0.1)])
INSIDE = 0.55  # of an outline, in radii
# of 1e-3, 3e-3 and 1e-2 (all weights: 3e-4, 1e-3, 3e-3) the lowest loss on brown objects with rank 2 of the attention layers,
# without prior preservation; LoRA of rank 1 did as well with 2e-2. Rank 4 has LoRA's, untried
RATES = {"lora": 1e-2, "lora_plus": 3e-3, "dora": 1e-2, "pissa": 1e-2, "lora_ga": 1e-2, "lora_4": 1e-2, "rslora_4": 1e-2}
RATES |= {"full": 3e-4}
METHODS: dict[str, dict[str, Any] | None] = {  # rank 1 of all linear layers is 0.7% of the quickstart's weights
    "lora": {"rank": 1},
    "lora_plus": {"rank": 1, "loraplus_lr_ratio": 8.0},
    "dora": {"rank": 1, "method": "dora"},
    "pissa": {"rank": 1, "init": "pissa"},
    "lora_ga": {"rank": 1, "init": "lora_ga"},
    "lora_4": {"rank": 4},
    "rslora_4": {"rank": 4, "rank_stabilised": True},  # at rank 1 it is LoRA
    "full": None,
}


@dataclass(frozen=True)
class Concept:
    """What the base has never seen, in the place of something that it has.

    Attributes:
        name: of the concept.
        old, new: what captions call it: ``old`` to the scorer.
    """

    name: str
    old: str
    new: str

    def caption(self, old: str) -> str:
        """The caption of an image whose scene the scorer calls ``old``."""
        return old.replace(self.old, self.new)

    def old_caption(self, caption: str) -> str:
        return caption.replace(self.new, self.old)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context scenes are rendered, and read, with the concept."""
        with ExitStack() as stack:
            if self.name == "colour":
                stack.enter_context(patch.dict(scenes.COLOURS, red=BROWN))
                stack.enter_context(patch.object(scorer, "_COLOUR_VALUES", np.array([*scenes.COLOURS.values()], np.float32)))
            elif self.name == "shape":
                stack.enter_context(patch.dict(scenes._OUTLINES, heart=ARROW))
            else:
                whole = scenes.coverage
                for module in (scenes, scorer):
                    stack.enter_context(patch.object(module, "coverage", partial(outline, whole)))
                # the outline of a ring is that of a circle
                stack.enter_context(patch.object(scorer, "SHAPES", tuple(each for each in scenes.SHAPES if each != "ring")))
            forget = (scorer._templates.cache_clear, scorer._unit_area.cache_clear)
            for clear in forget:
                clear()
                stack.callback(clear)
            yield

    def shows(self, caption: str) -> bool:
        return self.old in caption and not (self.name == "style" and "ring" in caption)

    def images(self, count: int, size: int, seed: int) -> list[Any]:
        """Samples (key, pixels, caption) of the concept."""
        with self.applied():
            found = (sample for sample in scenes.generate(64 * count, size, seed) if self.shows(sample.caption))
            return [sample._replace(caption=self.caption(sample.caption)) for sample in islice(found, count)]

    def accuracy(self, pipeline: LatentDiffusionPipeline, prompts: Sequence[str], **settings: Any) -> float:
        images = generate_from_captions(pipeline, prompts, 0, 64, **settings)
        with self.applied():
            return shape_accuracy(images, [self.old_caption(prompt) for prompt in prompts])["prompt_accuracy"]


CONCEPTS = {
    "colour": Concept("colour", " red ", " brown "),
    "shape": Concept("shape", " heart ", " arrow "),
    "style": Concept("style", " at the ", " in outline at the "),
}


def outline(whole: Any, shape: str, size: Any, x: float, y: float, radius: float) -> np.ndarray:
    """The coverage of a shape's outline, as :func:`ldm.shapes.scenes.coverage`."""
    return np.clip(whole(shape, size, x, y, radius) - whole(shape, size, x, y, INSIDE * radius), 0, 1)


@dataclass
class Bench:
    """Folders and lengths."""

    base: Path  # holds autoencoder and pipeline
    out: Path
    steps: int
    batch_size: int = 16
    images: int = 200
    prompts: int = 256
    size: int = 40
    denoising_steps: int = 15

    def settings(self) -> dict[str, Any]:
        return {"num_inference_steps": self.denoising_steps, "guidance_scale": 3.0}

    def data(self, concept: Concept) -> tuple[Path, list[str]]:
        """The folder of the concept's latents, and prompts that are in none of the training images."""
        folder, trained = self.out / concept.name, concept.images(self.images, self.size, 100)
        self.export(folder / "train", trained)
        self.export(folder / "validation", concept.images(64, self.size, 101))
        if not (self.out / "prior").is_dir():  # what the base makes of captions that it knows
            captions = [sample.caption for sample in islice(scenes.generate(self.images, self.size, 102), self.images)]
            images = generate_from_captions(load_pipeline(self.base / "pipeline"), captions, 0, 64, **self.settings())
            named = zip(captions, images, strict=True)
            self.export(self.out / "prior", [(f"{i:06}", image, caption) for i, (caption, image) in enumerate(named)])
        seen = {sample.caption for sample in trained}
        captions = (concept.caption(scene.caption) for scene in scenes.all_scenes("one") if concept.shows(scene.caption))
        unseen = sorted({*captions} - seen)
        order = [unseen[i] for i in np.random.default_rng(0).permutation(len(unseen))]
        return folder, [*islice(cycle(order), self.prompts)]  # few: each several times, from other noise

    def export(self, folder: Path, samples: Sequence[Any]) -> None:
        """Latents of images with captions, unless they are there."""
        if not folder.is_dir():
            shards = folder.with_name(f"{folder.name}-shards")
            write_images(shards, "images", samples, extra={"captioned": len(samples)})
            export = ["latents", "export", "--autoencoder", str(self.base / "autoencoder"), "--out", str(folder)]
            dispatch([*export, "--shards", str(shards)])

    def fit(self, concept: Concept, method: str, rate: float, seed: int) -> Path:
        """The run of a method, which is trained unless it is finished."""
        folder, adapter = self.out / f"{concept.name}-{method}-{rate:g}-{seed}", METHODS[method]
        if (folder / "finished.json").is_file():
            return folder
        every = max(self.steps // 10, 1)
        timing = {"class_path": "ldm.runs.callbacks.StepTimes", "init_args": {"file": str(folder / "seconds.json")}}
        config = {
            "seed_everything": seed,
            "trainer": {"max_steps": self.steps, "val_check_interval": every, "callbacks": [timing]},
            "data": {
                "train": str(self.out / concept.name / "train"),
                "validation": str(self.out / concept.name / "validation"),
                "regularisation": str(self.out / "prior"),
                "batch_size": self.batch_size,
            },
            "model": {
                "autoencoder": str(self.base / "autoencoder"),
                "init_from": str(self.base / "pipeline"),
                "denoiser": None,
                "adapter": adapter,
                "preview_prompts": [],
                "ema_decay": 0.95,
                "optimiser": {"learning_rate": rate, "muon_learning_rate": None, "warmup_steps": every // 2},
            },
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.yaml").write_text(yaml.safe_dump(config))
        configs = [text for file in (RECIPE, folder / "bench.yaml") for text in ("--config", str(file))]
        dispatch(["denoiser", "fit", *configs, "--out", str(folder / "run")])
        write_json(folder / "finished.json", {})
        return folder

    def losses(self, run: Path) -> dict[int, float]:
        """The validation loss by step."""
        with (run / "run" / "logs" / "metrics.csv").open() as lines:
            rows = [row for row in csv.DictReader(lines) if row.get("val/loss")]
        return {int(row["step"]) + 1: float(row["val/loss"]) for row in rows}

    def pipeline(self, run: Path) -> LatentDiffusionPipeline:
        full = run / "run" / "pipeline"
        pipeline = load_pipeline(full if full.is_dir() else self.base / "pipeline")
        if not full.is_dir():
            pipeline.load_lora_weights(run / "run" / "adapter")
            pipeline.fuse_lora()
        return pipeline

    def measure(self, concept: Concept, run: Path, prompts: Sequence[str]) -> dict[str, float]:
        """Accuracies after a run, once."""
        kept = run / "accuracy.json"
        if not kept.is_file():
            pipeline, old = self.pipeline(run), scenes.held_out_prompts("one", self.prompts)
            images = generate_from_captions(pipeline, old, 0, 64, **self.settings())
            found = {
                "new": concept.accuracy(pipeline, prompts, **self.settings()),
                "old": shape_accuracy(images, old)["prompt_accuracy"],
                "seconds_per_step": read_json(run / "seconds.json")["seconds_per_step"],
            }
            write_json(kept, found)
        return read_json(kept)


def steps_to(losses: dict[int, float], goal: float) -> int | None:
    """The first validated step with at most this loss."""
    return next((step for step, loss in losses.items() if loss <= goal), None)


def compare(
    bench: Bench, concepts: Sequence[str], methods: Sequence[str], seeds: Sequence[int], rates: Sequence[float] = ()
) -> None:
    """Train, print a table, then the ratios. ``rates``: tried first; none: those of :data:`RATES`."""
    ratios: dict[str, list[float]] = {}
    base = load_pipeline(bench.base / "pipeline")
    old = scenes.held_out_prompts("one", bench.prompts)
    before = shape_accuracy(generate_from_captions(base, old, 0, 64, **bench.settings()), old)["prompt_accuracy"]
    print(f"base: {before:.1%} of the old prompts right")
    best = {} if rates else dict(RATES)
    for concept in map(CONCEPTS.__getitem__, concepts):
        _, prompts = bench.data(concept)
        print(f"base: {concept.accuracy(base, prompts, **bench.settings()):.1%} of the new prompts right ({concept.name})")
        for method in (each for each in methods if each not in best):
            tried = {rate: [*bench.losses(bench.fit(concept, method, rate, seeds[0])).values()][-1] for rate in rates}
            best[method] = min(tried, key=lambda rate: tried[rate])
            print(f"{method}: loss by rate: {', '.join(f'{rate:g} {loss:.4f}' for rate, loss in tried.items())}", flush=True)
        for seed in seeds:
            runs = {method: bench.fit(concept, method, best[method], seed) for method in methods}
            losses = {method: bench.losses(run) for method, run in runs.items()}
            goal, steps = [*losses["lora"].values()][-1], [*losses["lora"]][-1]
            for method, run in runs.items():
                found, reached = bench.measure(concept, run, prompts), steps_to(losses[method], goal)
                print(
                    f"{concept.name}, seed {seed}, {method:9} rate {best[method]:g}: new {found['new']:.1%}, "
                    f"old {found['old']:.1%}, loss {[*losses[method].values()][-1]:.4f}, LoRA's final loss after {reached} of "
                    f"{steps} steps, {found['seconds_per_step']:.3f} s a step",
                    flush=True,
                )
                ratios.setdefault(f"adapters_{method}_old", []).append(found["old"] / max(before, 1e-9))
                if method != "lora":
                    ratios.setdefault(f"adapters_{method}_steps", []).append(steps / reached if reached else 0.0)
    common.print_ratios(ratios | {"adapters_bytes": [bytes_ratio(bench)], "adapters_peft_step": step_ratios()})


def bytes_ratio(bench: Bench) -> float:
    """The model's bytes over those of an adapter of rank 8 of all linear layers of its blocks."""
    weights = [*(bench.base / "pipeline" / "transformer").glob("*.safetensors")]
    network = load_pipeline(bench.base / "pipeline").transformer
    rank = min(
        8,
        *(
            min(layer.weight.shape)
            for block in transformer_blocks(network)
            for layer in block.modules()
            if isinstance(layer, torch.nn.Linear)
        ),
    )
    tensors, _ = Adapter(AdapterConfig(rank=rank), network, "base").exported()
    print(f"an adapter of rank {rank}: {sum(each.nbytes for each in tensors.values()):,} bytes")
    return sum(path.stat().st_size for path in weights) / sum(each.nbytes for each in tensors.values())


def step_ratios(rounds: int = 5, steps: int = 4) -> list[float]:
    """Seconds of a step of LoRA by peft on diffusers' PixArt over ours, at the quickstart's size; in turns."""
    width, layers, heads, batch = 192, 6, 6, 16
    ours: Any = DiT(4, 10, 2, width, layers, heads, caption_channels=384)
    Adapter(AdapterConfig(rank=8), ours, "ours")
    theirs: Any = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=4, num_layers=layers,
        cross_attention_dim=width, caption_channels=384, sample_size=10, patch_size=2,
    )  # fmt: skip
    names = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    theirs.requires_grad_(False)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, lora_alpha=8, target_modules=names))
    x, text, t = torch.randn(batch, 4, 10, 10), torch.randn(batch, 16, 384), torch.rand(batch) * 1000

    def trainer(network: Any) -> Any:
        optimiser = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad], fused=True)

        def step() -> None:
            optimiser.zero_grad()
            network(hidden_states=x, encoder_hidden_states=text, timestep=t).sample.square().mean().backward()
            optimiser.step()

        step()
        return partial(common.seconds_of, step, "cpu", steps)

    seconds = common.time_in_turn({"theirs": trainer(theirs), "ours": trainer(ours)}, rounds, "s/step")
    return [slow / fast for slow, fast in zip(seconds["theirs"], seconds["ours"], strict=True)]


def tiny_base(folder: Path) -> Path:
    """A model of the quickstart's form, hardly trained."""
    make_data(folder, 64, 32, AutoencoderConfig([8, 16, 16], 4, 1, 4, False, 32))
    data, network = str(folder / "latents"), "--model.denoiser.init_args"
    sizes = {"sample_size": 8, "width": 32, "num_layers": 2, "num_attention_heads": 2}
    options = [text for name, value in sizes.items() for text in (f"{network}.{name}", str(value))]
    options += ["--data.train", data, "--data.validation", data, "--data.batch_size", "8", "--trainer.max_steps", "4"]
    options += ["--model.autoencoder", str(folder / "autoencoder"), "--model.preview_prompts", "[]"]
    options += ["--trainer.val_check_interval", "4", "--export", str(folder / "pipeline")]
    dispatch(["denoiser", "fit", "--config", str(RECIPE), "--out", str(folder / "run"), *options])
    return folder


def main() -> None:
    """Measure, and print the ratios."""
    parser = common.bench_parser(__doc__, "a tiny model, few steps, two methods: shows that it runs")
    parser.add_argument("--quickstart", type=Path, default=Path("quickstart"), help="folder of ldm quickstart, the base")
    parser.add_argument("--out", type=Path, default=Path("adapters-bench"), help="a new folder, or that of an interrupted run")
    parser.add_argument("--concepts", nargs="+", choices=[*CONCEPTS], default=[*CONCEPTS])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="with lora among them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[], help="tried with the first seed (default: none)")
    parser.add_argument("--steps", type=int, default=300, help="of each run (default: 300)")
    options = parser.parse_args()
    common.quieten()
    if options.quick:
        with tempfile.TemporaryDirectory() as temporary:
            bench = Bench(tiny_base(Path(temporary) / "base"), Path(temporary) / "out", 4, 4, 16, 4, 32, 2)
            compare(bench, ["colour"], ["lora", "lora_ga"], [0], [1e-3])
        return
    bench = Bench(options.quickstart, options.out, options.steps)
    compare(bench, options.concepts, options.methods, options.seeds, options.rates)


if __name__ == "__main__":
    main()
