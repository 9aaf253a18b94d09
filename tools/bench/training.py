"""What training and sampling come to on this machine's GPU: one table, for the README.

    python tools/bench/training.py [--quick] [--rounds R] [--only denoiser|autoencoder|sampling …]

- Stage two: DiT-B/2 and DiT-XL/2 at 256 px (256 tokens) on cached latents, with and without compiled blocks, with and without
  gradient checkpointing.
- Stage one: configs/autoencoder/kl_f8_8gpu.yaml at 256 px, both players, LPIPS of random weights, compiled and not.
- Sampling: both DiTs and the f8 autoencoder, from words to images with guidance, in 20 and 50 steps, one and eight at once.

Training is ``ldm STAGE fit`` of the recipe through Lightning's ``Trainer.fit`` with loader, optimisers, averages and logs, but
for previews, checkpoints and validation; bf16, TF32, one device, captions by MiniLM. The networks are untrained: time does not
depend on what they hold. MFU is :mod:`ldm.runs.dry_run.flops`'s: FLOPs of the mathematics over the peak of the GPU, without
what gradient checkpointing computes again.

Without a GPU networks, images and batches are tiny, in fp32 where bf16 does not pay, and with --quick nothing is compiled:
that it runs is all that is shown. Ends with ``ratio NAME MEDIAN MIN MAX``: throughput compiled over plain and with gradient
checkpointing over without, per round, and on a GPU the MFU of DiT-XL/2, compiled, over 20% and 25%, between which fast-DiT and
LightningDiT are by what they publish.
"""

from __future__ import annotations

# isort: off
import ldm  # noqa: F401 - first: it settles how OpenMP waits

# isort: on
import argparse
import itertools
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path

import torch
from dit import DIFFUSION, Setting, build, quieten
from lightning import LightningModule, Trainer
from sample import AUTOENCODERS, Contestant
from timed_fit import Clock, TimedFit, data_options, make_data

from ldm.diffusion.scheduler import make_scheduler
from ldm.machine import bf16_is_faster, machine_info
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import LatentDiffusionPipeline
from ldm.runs.dry_run.flops import ImageFlops, peak_flops
from ldm.runs.dry_run.memory import PeakMemory

CONFIGS = Path(__file__).parents[2] / "configs"
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

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.memory = PeakMemory(trainer.strategy.root_device)
        self.memory.reset()

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.counter = ImageFlops(module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.flops, self.peak = self.counter.count(trainer.datamodule), self.memory.peak()


# -- what is measured ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Where the data lie, and how much is done."""

    folder: Path
    tiny: bool
    steps: int

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def bf16(self) -> bool:
        return not self.tiny or bf16_is_faster()

    def train(self, row: Row, stage: str, options: Sequence[object]) -> None:
        """One fit more for the row."""
        costs = Costs()
        switches = {"compile": row.compiled, "gradient_checkpointing": row.checkpointing}
        told = [text for name, value in switches.items() for text in (f"--model.{name}", str(value).lower())]
        trainer = ["--trainer.devices", 1, "--model.accumulate", 1, "--data.batch_size", row.batch]
        trainer += ["--trainer.accelerator", "cpu" if self.tiny else "gpu", "--trainer.log_every_n_steps", 50]
        trainer += ["--trainer.precision", "bf16-mixed" if self.bf16 else "32-true", "--data.workers", 0 if self.tiny else 4]
        torch.compiler.reset()  # so that every round compiles the same
        with tempfile.TemporaryDirectory() as out:
            place = ["--out", f"{out}/run"]
            TimedFit(stage, [*options, *data_options(stage, self.folder), *trainer, *told, *place], WARM_UP + self.steps, costs)
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
        vae = AutoencoderConfig(list(widths), 4, layers, sample_size=8 * side).build().eval().to(self.device)
        chosen = TINY_DENOISERS if self.tiny else DENOISERS
        for (name, (_, width, blocks, heads, _)), compiled in itertools.product(chosen.items(), (False, True)):
            network = build("ours", Setting(width, blocks, heads, side, 1, 1, compiled, self.device), text_encoder.width).eval()
            pipeline = LatentDiffusionPipeline(
                vae=vae,
                text_encoder=text_encoder.model,
                tokenizer=text_encoder.tokenizer,
                transformer=network,
                scheduler=make_scheduler("dpm++2m", *DIFFUSION),
            )
            pipeline.set_progress_bar_config(disable=True)
            for steps, batch in numbers:
                setting = Setting(width, blocks, heads, side, batch, steps, compiled, self.device)
                row = Row(f"sampling {name}", compiled, batch=batch, steps=steps)
                yield row, partial(self.sample, row, Contestant(pipeline, setting, None))

    def sample(self, row: Row, contestant: Contestant) -> None:
        """One run more for the row, after one that is not timed."""
        precision = "bf16" if self.bf16 else "fp32"
        torch.compiler.reset()
        noise = torch.randn(row.batch, 4, contestant.setting.side, contestant.setting.side).to(self.device)
        contestant.seconds(noise, precision)
        memory = PeakMemory(torch.device(self.device))
        memory.reset()
        row.seconds.append(contestant.seconds(noise, precision))
        row.rates.append(row.batch / row.seconds[-1])
        row.gigabytes = memory.peak() / 1e9


# -- what came of it -----------------------------------------------------------------------------------------------------


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
    """Compiled over plain, with checkpointing over without, and MFU over what is published."""
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
                print_ratio(name, [mine / theirs for mine, theirs in zip(row.rates, known[other], strict=True)])
    for row in rows:
        if row.mfu and row.compiled and not row.checkpointing and "XL" in row.what:
            each = [row.mfu * rate / statistics.median(row.rates) for rate in row.rates]
            for published in PUBLISHED_MFU:
                print_ratio(f"mfu_xl_over_{published:.0%}".replace("%", "_percent"), [mfu / published for mfu in each])


def print_ratio(name: str, values: Sequence[float]) -> None:
    print(f"ratio {name} {statistics.median(values):.2f} {min(values):.2f} {max(values):.2f}")


def main() -> None:
    """Measure, and print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("denoiser", "autoencoder", "sampling")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="default: all three")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny, one round, nothing compiled: under 50 s on a CPU")
    given = parser.parse_args()
    quieten()
    logging.disable(logging.WARNING)
    tiny = given.quick or not torch.cuda.is_available()
    print(machine_info())
    rounds, steps = (1, 3) if given.quick else (given.rounds, 3 if tiny else 30)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), tiny, steps)
        # what the data come from is no part of what is timed
        exporter = AutoencoderConfig([8, 8, 8, 8], 4, 1, 4, False, 64 if tiny else 256)
        make_data(bench.folder, 16 if tiny else 512, 64 if tiny else 256, exporter)
        found = {"denoiser": bench.denoisers, "autoencoder": bench.autoencoders, "sampling": bench.samplings}
        todo = [pair for kind in given.only for pair in found[kind]() if not (given.quick and pair[0].compiled)]
        for turn in range(rounds):
            for row, run in todo if turn % 2 == 0 else reversed(todo):
                run()
                print(f"round {turn + 1}, {row.name}, {'compiled' if row.compiled else 'plain'}: {row.rates[-1]:.3g} images/s",
                      flush=True)  # fmt: skip
    rows = [row for row, _ in todo]
    print_table(rows)
    print_ratios(rows)


if __name__ == "__main__":
    main()
