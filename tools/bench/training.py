"""Throughput, MFU, memory and sampling on one device, as one table.

    python tools/bench/training.py [--quick] [--rounds R] [--only denoiser|autoencoder|sampling …]

- Stage two: DiT-B/2 and DiT-XL/2 at 256 px (256 tokens) on cached latents, with and without compiled blocks, with and without
  gradient checkpointing.
- Stage one: configs/autoencoder/kl_f8_8gpu.yaml at 256 px with its discriminator, LPIPS of random weights, compiled and not.
- Sampling: both DiTs and the f8 autoencoder, from prompts to images with guidance, in 20 and 50 steps, one and eight at once.

Training is ``ldm STAGE fit`` of the recipe: Lightning's ``Trainer.fit`` with loader, optimisers, averages and logs, without
previews, checkpoints and validation; bf16, TF32, one device, captions by MiniLM. The networks are untrained, since time does
not depend on their weights. MFU is that of :mod:`ldm.runs.dry_run.flops`: the FLOPs of the model over the peak of the GPU,
without those that gradient checkpointing repeats.

Without a GPU networks, images and batches are tiny, in fp32 where bf16 is slower, and with --quick nothing is compiled: this
shows only that the script runs. Ends with ``ratio NAME MEDIAN MIN MAX``: throughput compiled over plain and with gradient
checkpointing over without, per round; on a GPU also the MFU of DiT-XL/2, compiled, over 20% and 25%, the range that follows
from what fast-DiT and LightningDiT publish.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import cast

import common
import torch
from common import CONFIGS
from diffusers.models.modeling_utils import ModelMixin
from dit import DIFFUSION, Setting, build
from lightning import LightningModule, Trainer
from sample import AUTOENCODERS, TimedPipeline
from timed_fit import Clock, TimedFit, data_options, make_data

from ldm.data.datamodule import datamodule_of
from ldm.diffusion.scheduler import make_scheduler
from ldm.machine import bf16_is_faster, machine_info
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import LatentDiffusionPipeline
from ldm.runs.dry_run.flops import ImageFlops, peak_flops
from ldm.runs.dry_run.memory import PeakMemory
from ldm.training.base import TrainingModule

WARM_UP = 5  # steps: compilation, the allocator, the start of the loader
PUBLISHED_MFU = (0.20, 0.25)  # of fast-DiT and LightningDiT: the least and the most, derived from images/s
# of a GPU of 80 GB or more: (recipe, width, blocks, heads, batch)
DENOISERS = {"DiT-B/2": ("dit_b_8gb", 768, 12, 12, 128), "DiT-XL/2": ("dit_xl_8gpu", 1152, 28, 16, 64)}
TINY_DENOISERS = {"DiT-B/2, tiny": ("dit_b_8gb", 32, 2, 2, 4), "DiT-XL/2, tiny": ("dit_xl_8gpu", 48, 2, 2, 4)}


@dataclass
class Row:
    """A line of the table, with a value of every round."""

    what: str
    compiled: bool
    checkpointing: bool = False
    batch: int = 1
    steps: int = 0  # of sampling
    rates: list[float] = field(default_factory=list)  # images/s
    seconds: list[float] = field(default_factory=list)  # of a step, or of a sampling of the batch
    mfu: float | None = None  # of the median
    gigabytes: float = 0.0

    @property
    def name(self) -> str:
        """For ratios."""
        text = f"{self.what}{'_checkpointing' * self.checkpointing}{f'_{self.steps}_batch{self.batch}' if self.steps else ''}"
        return "".join(letter if letter.isalnum() or letter == "_" else "_" for letter in text.lower()).replace("__", "_")


class Costs(Clock):
    """A step's time, FLOPs and peak memory."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.memory = PeakMemory(trainer.strategy.root_device)
        self.memory.reset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.counter = ImageFlops(cast(TrainingModule, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.flops, self.peak = self.counter.count(datamodule_of(trainer)), self.memory.peak()


# -- what is measured ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """The folder of the data, and the number of timed steps."""

    folder: Path
    tiny: bool
    steps: int

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def bf16(self) -> bool:
        return not self.tiny or bf16_is_faster()

    def train(self, row: Row, stage: str, options: Iterable[object]) -> None:
        """Add one fit to the row."""
        costs = Costs()
        switches = {"compile": row.compiled, "gradient_checkpointing": row.checkpointing}
        options = [*options, *data_options(stage, self.folder)]
        options += [text for name, value in switches.items() for text in (f"--model.{name}", str(value).lower())]
        trainer = ["--trainer.devices", 1, "--model.accumulate", 1, "--data.batch_size", row.batch]
        trainer += ["--trainer.accelerator", "cpu" if self.tiny else "gpu", "--trainer.log_every_n_steps", 50]
        trainer += ["--trainer.precision", "bf16-mixed" if self.bf16 else "32-true", "--data.workers", 0 if self.tiny else 4]
        torch.compiler.reset()  # so that every round compiles the same
        with tempfile.TemporaryDirectory() as out:
            place = ["--out", f"{out}/run"]
            TimedFit(stage, [*options, *trainer, *place], WARM_UP + self.steps, costs)
        step = statistics.median(costs.seconds[WARM_UP - 1 :])
        row.seconds.append(step)
        row.rates.append(costs.images_per_step / step)
        row.gigabytes = costs.peak / 1e9
        peak = peak_flops(torch.device(self.device), "bf16-mixed")
        if peak and costs.flops:
            row.mfu = statistics.median(row.rates) * costs.flops / peak
        if not self.tiny:
            torch.cuda.empty_cache()

    def denoisers(self) -> Iterator[tuple[Row, Callable[[], None]]]:
        for name, (recipe, width, layers, heads, batch) in (TINY_DENOISERS if self.tiny else DENOISERS).items():
            sizes = {"width": width, "num_layers": layers, "num_attention_heads": heads, "caption_channels": 384}
            sizes["sample_size"] = 8 if self.tiny else 32
            network = [text for key, value in sizes.items() for text in (f"--model.denoiser.init_args.{key}", value)]
            for checkpointing, compiled in itertools.product((False, True), repeat=2):
                row = Row(f"training {name}", compiled, checkpointing, batch)
                options = ["--config", CONFIGS / "denoiser" / f"{recipe}.yaml", *network]
                yield row, partial(self.train, row, "denoiser", options)

    def autoencoders(self) -> Iterator[tuple[Row, Callable[[], None]]]:
        options = ["--config", CONFIGS / "autoencoder" / "kl_f8_8gpu.yaml", "--model.perceptual.init_args.weights", "random"]
        if self.tiny:
            options += ["--model.autoencoder.block_out_channels", "[8, 8, 8, 8]", "--model.autoencoder.norm_num_groups", 4]
            options += ["--model.autoencoder.sample_size", 64, "--model.adversary.discriminator.init_args.width", 8]
            options += ["--model.perceptual.init_args.trunk", "alex"]
        for compiled in (False, True):
            row = Row(f"training kl-f8{', tiny' * self.tiny}", compiled, batch=2 if self.tiny else 16)
            yield row, partial(self.train, row, "autoencoder", options)

    def samplings(self) -> Iterator[tuple[Row, Callable[[], None]]]:
        text_encoder = TextEncoder.load("minilm", self.device)
        widths, layers = AUTOENCODERS["quick" if self.tiny else "gpu"]
        side, numbers = (8, ((2, 1), (2, 2))) if self.tiny else (32, tuple(itertools.product((20, 50), (1, 8))))
        vae = AutoencoderConfig(list(widths), 4, layers, sample_size=8 * side).build().eval()
        chosen = TINY_DENOISERS if self.tiny else DENOISERS
        for (name, (_, width, blocks, heads, _)), compiled in itertools.product(chosen.items(), (False, True)):
            network = build("ours", Setting(width, blocks, heads, side, 1, 1, compiled, self.device), text_encoder.width).eval()
            pipeline = LatentDiffusionPipeline(
                vae=vae,
                text_encoder=text_encoder.model,
                tokenizer=text_encoder.tokenizer,
                transformer=cast(ModelMixin, network),
                scheduler=make_scheduler("dpm++2m", *DIFFUSION),
            ).to(self.device, torch.bfloat16 if self.bf16 else torch.float32)
            pipeline.set_progress_bar_config(disable=True)
            for steps, batch in numbers:
                setting = Setting(width, blocks, heads, side, batch, steps, compiled, self.device)
                row = Row(f"sampling {name}", compiled, batch=batch, steps=steps)
                yield row, partial(self.sample, row, TimedPipeline(pipeline, setting, None))

    def sample(self, row: Row, timed: TimedPipeline) -> None:
        """Add one run to the row, after one that is not timed."""
        torch.compiler.reset()
        noise = torch.randn(row.batch, 4, timed.setting.side, timed.setting.side).to(self.device)
        timed.seconds(noise)
        memory = PeakMemory(torch.device(self.device))
        memory.reset()
        row.seconds.append(timed.seconds(noise))
        row.rates.append(row.batch / row.seconds[-1])
        row.gigabytes = memory.peak() / 1e9


# -- results ------------------------------------------------------------------------------------------------------------


def print_table(rows: Sequence[Row]) -> None:
    """In Markdown: medians, and the least and the most of the rounds."""
    machine = machine_info()
    print(f"\n{date.today()}, {machine['GPU'] if torch.cuda.is_available() else machine['CPU']}, torch {machine['torch']}\n")
    print("| what | blocks | checkpointing | batch | images/s | ms a step or image | MFU | peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        rate = f"{statistics.median(row.rates):.3g} ({min(row.rates):.3g} to {max(row.rates):.3g})"
        what = f"{row.what}, {row.steps} steps" if row.steps else row.what
        milliseconds = 1000 * statistics.median(row.seconds) / (row.batch if row.steps else 1)
        mfu = f"{row.mfu:.1%}" if row.mfu else "—"
        cells = [what, "compiled" if row.compiled else "plain", "yes" if row.checkpointing else "no", str(row.batch), rate]
        print("|", " | ".join([*cells, f"{milliseconds:.1f}", mfu, f"{row.gigabytes:.1f} GB"]), "|")
    print()


def print_ratios(rows: Sequence[Row]) -> None:
    """Compiled over plain, with checkpointing over without, and MFU over the published one."""
    ratios: dict[str, list[float]] = {}
    known = {(row.name, row.compiled): row.rates for row in rows}
    for row in rows:
        pairs = []
        if row.compiled:
            pairs.append((f"{row.name}_compiled", (row.name, False)))
        if row.checkpointing:
            name = f"{row.name}{'_when_compiled' * row.compiled}"
            pairs.append((name, (row.name.removesuffix("_checkpointing"), row.compiled)))
        for name, other in pairs:
            if other in known:
                ratios[name] = [mine / theirs for mine, theirs in zip(row.rates, known[other], strict=True)]
    for row in rows:
        if row.mfu and row.compiled and not row.checkpointing and "XL" in row.what:
            each = [row.mfu * rate / statistics.median(row.rates) for rate in row.rates]
            for published in PUBLISHED_MFU:
                ratios[f"mfu_xl_over_{published:.0%}".replace("%", "_percent")] = [mfu / published for mfu in each]
    common.print_ratios(ratios)


def main() -> None:
    """Measure, and print the table and the ratios."""
    parser = common.bench_parser(__doc__, "tiny, one round, nothing compiled: under 50 s on a CPU")
    kinds = ("denoiser", "autoencoder", "sampling")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="default: all three")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    common.quieten()
    logging.disable(logging.WARNING)
    tiny = given.quick or not torch.cuda.is_available()
    print(machine_info())
    rounds, steps = (1, 3) if given.quick else (given.rounds, 3 if tiny else 30)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), tiny, steps)
        # makes the data; not timed
        exporter = AutoencoderConfig([8, 8, 8, 8], 4, 1, 4, False, 64 if tiny else 256)
        make_data(bench.folder, 16 if tiny else 512, 64 if tiny else 256, exporter)
        found = {"denoiser": bench.denoisers, "autoencoder": bench.autoencoders, "sampling": bench.samplings}
        todo = [pair for kind in given.only for pair in found[kind]() if not (given.quick and pair[0].compiled)]
        for turn in range(rounds):
            for row, run in common.in_turn(todo, turn):
                run()
                print(f"round {turn + 1}, {row.name}, {'compiled' if row.compiled else 'plain'}: {row.rates[-1]:.3g} images/s",
                      flush=True)  # fmt: skip
    rows = [row for row, _ in todo]
    print_table(rows)
    print_ratios(rows)


if __name__ == "__main__":
    main()
