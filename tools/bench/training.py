"""Throughput, MFU, the parts of a step, host waits, memory and sampling on a machine's devices, as one table.

    python tools/bench/training.py [--quick] [--only denoiser|autoencoder|sampling …] [--seconds S] [--processes N]

- Stage two: DiT-XL/2 and DiT-B/2 at 256 px (256 tokens) on cached latents, with and without compiled blocks, with and without
  gradient checkpointing.
- Stage one: configs/autoencoder/kl_f8_8gpu.yaml at 256 px with its discriminator, LPIPS of random weights, compiled and not.
- Sampling: DiT-XL/2 and the f8 autoencoder, from prompts to images with guidance, in 20 steps, one and eight at once.

Training is ``ldm STAGE fit`` of the recipe: Lightning's ``Trainer.fit`` with loader, optimisers, averages and logs, without
previews, checkpoints and validation; bf16, TF32, captions by MiniLM. The networks are untrained, since time does not depend on
their weights. MFU is that of :mod:`ldm.runs.dry_run.flops`: the FLOPs of the model over the peak of the GPU, without those
that gradient checkpointing repeats.

Parts and waits are those of :class:`timeline.StepParts`: medians on the GPU's clock, in ms; ``noise`` is what drawing a batch's
noise takes one of the loader's processes. ``communication`` needs ``--processes``, the GPUs to train on (default: one).

The most important rows come first. A row that would end after ``--seconds``, if it took as long as the longest of its kind so
far, is left out with those that follow: the default of 300 is to keep the whole program under six minutes.

Without a GPU networks, images and batches are tiny, in fp32 where bf16 is slower, and with --quick nothing is compiled: this
shows only that the script runs. Ends with ``ratio NAME MEDIAN MIN MAX``: throughput compiled over plain and with gradient
checkpointing over without, for each third of the timed steps; on a GPU also the MFU of DiT-XL/2, compiled, over 20% and 25%,
the range that follows from what fast-DiT and LightningDiT publish.
"""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import common
import torch
from common import CONFIGS
from diffusers.models.modeling_utils import ModelMixin
from dit import DIFFUSION, Setting, build
from lightning import LightningModule, Trainer
from sample import AUTOENCODERS, TimedPipeline
from scaling import Workers, free_port, launched
from timed_fit import TimedFit, data_options, make_data
from timeline import PARTS, WAITING_STEPS, StepParts

from ldm.data.datamodule import datamodule_of
from ldm.diffusion.scheduler import make_scheduler
from ldm.machine import bf16_is_faster, machine_info
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import LatentDiffusionPipeline
from ldm.runs.dry_run.flops import ImageFlops, peak_flops
from ldm.runs.dry_run.memory import PeakMemory
from ldm.training.base import TrainingModule

THIRDS = 3  # of the timed steps: their medians show the spread
PUBLISHED_MFU = (0.20, 0.25)  # of fast-DiT and LightningDiT: the least and the most, derived from images/s
SAMPLING_STEPS = 20


@dataclass(frozen=True)
class Network:
    """A DiT of a recipe in configs/denoiser: its width, blocks and heads."""

    recipe: str
    width: int
    layers: int
    heads: int


NETWORKS = {"DiT-B/2": Network("dit_b_8gb", 768, 12, 12), "DiT-XL/2": Network("dit_xl_8gpu", 1152, 28, 16)}
TINY = {"DiT-B/2": Network("dit_b_8gb", 32, 2, 2), "DiT-XL/2": Network("dit_xl_8gpu", 48, 2, 2)}


@dataclass
class Row:
    """A line of the table."""

    kind: str  # denoiser, autoencoder or sampling
    network: str
    compiled: bool
    batch: int  # of each process, or the images sampled at once
    checkpointing: bool = False
    steps: int = 0  # of sampling
    rates: list[float] = field(default_factory=list)  # images/s of all processes, of each third
    seconds: float = 0.0  # of a step, or of an image
    parts: dict[str, float] = field(default_factory=dict)  # of a step, seconds
    waits: Counter[str] = field(default_factory=Counter)
    mfu: float | None = None
    gigabytes: float = 0.0

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def name(self) -> str:
        """For ratios: of rows that differ in compilation alone, the same."""
        text = f"{'sampling' if self.kind == 'sampling' else 'training'}_{self.network}_batch{self.batch}"
        return "".join(letter if letter.isalnum() else "_" for letter in text.lower())

    def key(self) -> tuple[Any, ...]:
        return self.kind, self.network, self.batch, self.compiled, self.checkpointing


# for a GPU of 80 GB or more; the most important ones first, and those that compile after those that do not
ROWS = (
    Row("denoiser", "DiT-XL/2", True, 32),
    Row("denoiser", "DiT-XL/2", False, 32),
    Row("denoiser", "DiT-XL/2", True, 128),
    Row("autoencoder", "kl-f8", False, 16),
    Row("sampling", "DiT-XL/2", False, 1),
    Row("sampling", "DiT-XL/2", False, 8),
    Row("autoencoder", "kl-f8", True, 16),
    Row("sampling", "DiT-XL/2", True, 1),
    Row("sampling", "DiT-XL/2", True, 8),
    Row("denoiser", "DiT-B/2", True, 256),
    Row("denoiser", "DiT-XL/2", True, 128, checkpointing=True),
)
QUICK = (
    Row("denoiser", "DiT-XL/2", False, 4),
    Row("denoiser", "DiT-XL/2", False, 4, checkpointing=True),
    Row("autoencoder", "kl-f8", False, 2),
    Row("sampling", "DiT-XL/2", False, 1),
)


class Costs(StepParts):
    """The parts of a step, its FLOPs and peak memory."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._counter = ImageFlops(cast(TrainingModule, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._memory = PeakMemory(trainer.strategy.root_device)
        self._memory.reset()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.flops, self.peak = self._counter.count(datamodule_of(trainer)), self._memory.peak()


# -- what is measured ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """The folder of the data, the number of timed steps, and the processes."""

    folder: Path
    tiny: bool
    steps: int
    processes: int

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def bf16(self) -> bool:
        return bf16_is_faster(self.device)

    def make_data(self) -> None:
        exporter = AutoencoderConfig([8, 8, 8, 8], 4, 1, 4, False, 64 if self.tiny else 256)
        make_data(self.folder, 16 if self.tiny else 512, 64 if self.tiny else 256, exporter)

    def network(self, name: str) -> Network:
        return (TINY if self.tiny else NETWORKS)[name]

    def train(self, row: Row) -> Row:
        """The row, measured by one fit."""
        options: list[object] = [*(self.denoiser(row) if row.kind == "denoiser" else self.autoencoder())]
        options += data_options(row.kind, self.folder)
        switches = {"compile": row.compiled, "gradient_checkpointing": row.checkpointing}
        options += [text for name, value in switches.items() for text in (f"--model.{name}", str(value).lower())]
        options += ["--trainer.devices", self.processes, "--trainer.strategy", "ddp" if self.processes > 1 else "auto"]
        options += ["--trainer.accelerator", "gpu" if self.device == "cuda" else "cpu", "--trainer.log_every_n_steps", 50]
        options += ["--trainer.precision", "bf16-mixed" if self.bf16 else "32-true", "--data.workers", 0 if self.tiny else 4]
        options += ["--model.accumulate", 1, "--data.batch_size", row.batch]
        torch.compiler.reset()  # every row compiles for its own sizes
        costs = Costs(self.steps)
        out = self.folder / "-".join(map(str, row.key())).replace("/", "")
        TimedFit(row.kind, [*options, "--out", out], costs.total, costs)
        thirds = [costs.steps[number::THIRDS] for number in range(THIRDS)]
        rates = [costs.images_per_step / statistics.median(third) for third in thirds]
        seconds = statistics.median(costs.steps)
        peak = peak_flops(torch.device(self.device), "bf16-mixed")
        mfu = costs.images_per_step / seconds * costs.flops / (peak * self.processes) if peak and costs.flops else None
        return replace(
            row, rates=rates, seconds=seconds, parts=costs.parts(), waits=costs.waits, mfu=mfu, gigabytes=costs.peak / 1e9
        )

    def denoiser(self, row: Row) -> Iterator[object]:
        """Options of ``fit``."""
        network = self.network(row.network)
        yield from ("--config", CONFIGS / "denoiser" / f"{network.recipe}.yaml")
        sizes = {"width": network.width, "num_layers": network.layers, "num_attention_heads": network.heads}
        sizes |= {"caption_channels": 384, "sample_size": 8 if self.tiny else 32}
        for name, value in sizes.items():
            yield from (f"--model.denoiser.init_args.{name}", value)

    def autoencoder(self) -> Iterator[object]:
        """Options of ``fit``."""
        yield from ("--config", CONFIGS / "autoencoder" / "kl_f8_8gpu.yaml")
        yield from ("--model.perceptual.init_args.weights", "random")
        if self.tiny:
            yield from ("--model.autoencoder.block_out_channels", "[8, 8, 8, 8]", "--model.autoencoder.norm_num_groups", 4)
            yield from ("--model.autoencoder.sample_size", 64, "--model.adversary.discriminator.init_args.width", 8)
            yield from ("--model.perceptual.init_args.trunk", "alex")

    def sample(self, row: Row) -> Row:
        """The row, measured after one run that is not timed."""
        steps = 2 if self.tiny else SAMPLING_STEPS
        pipeline, setting = pipeline_of(self, row.network, row.compiled)
        setting = replace(setting, batch=row.batch, sampling_steps=steps)
        noise = torch.randn(row.batch, 4, setting.side, setting.side).to(self.device)
        torch.compiler.reset()
        timed = TimedPipeline(pipeline, setting, None)
        timed.seconds(noise)
        memory = PeakMemory(torch.device(self.device))
        memory.reset()
        seconds = [timed.seconds(noise) for _ in range(THIRDS)]
        return replace(
            row,
            steps=steps,
            rates=[row.batch / each for each in seconds],
            seconds=statistics.median(seconds) / row.batch,
            gigabytes=memory.peak() / 1e9,
        )


@lru_cache(maxsize=1)
def pipeline_of(bench: Bench, name: str, compiled: bool) -> tuple[LatentDiffusionPipeline, Setting]:
    """A pipeline of untrained networks on the device, and its sizes."""
    network, side = bench.network(name), 8 if bench.tiny else 32
    setting = Setting(network.width, network.layers, network.heads, side, 1, 1, compiled, bench.device)
    text_encoder = TextEncoder.load("minilm", bench.device)
    widths, layers = AUTOENCODERS["quick" if bench.tiny else "gpu"]
    pipeline = LatentDiffusionPipeline(
        vae=AutoencoderConfig(list(widths), 4, layers, sample_size=8 * side).build().eval(),
        text_encoder=text_encoder.model,
        tokenizer=text_encoder.tokenizer,
        transformer=cast(ModelMixin, build("ours", setting, text_encoder.width).eval()),
        scheduler=make_scheduler("dpm++2m", *DIFFUSION),
    ).to(bench.device, torch.bfloat16 if bench.bf16 else torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, setting


def measure(rank: int, bench: Bench, row: Row, port: int) -> Row:
    """The row as one process measures it."""
    if row.kind == "sampling":
        return bench.sample(row)
    pipeline_of.cache_clear()
    gc.collect()  # of Lightning's objects, which refer to one another
    if bench.device == "cuda":
        torch.cuda.empty_cache()
    with launched(rank, bench.processes, port) if bench.processes > 1 else nullcontext():
        return bench.train(row)


def make(rank: int, bench: Bench) -> None:
    """The data of all rows; not timed."""
    bench.make_data()


def measure_all(bench: Bench, rows: Sequence[Row], began: float, limit: float) -> list[Row]:
    """Measure the rows that there is time for, and print each when it is done."""
    workers = Workers(bench.processes, 1) if bench.processes > 1 else None
    found: list[Row] = []
    longest = {False: 0.0, True: 0.0}  # seconds of a row, plain and compiled
    if workers is None:
        make(0, bench)
    else:
        workers.call(make, bench)
    for number, row in enumerate(rows):
        start = time.monotonic()
        if start - began + longest[row.compiled] > limit:
            print(f"{len(rows) - number} rows are left out: {limit:.0f} s are over; --seconds gives more", flush=True)
            break
        if workers is None:
            made = measure(0, bench, row, 0)
        else:
            made = workers.call(measure, bench, row, free_port(), number=1 if row.kind == "sampling" else bench.processes)[0]
        found.append(made)
        longest[row.compiled] = max(longest[row.compiled], time.monotonic() - start)
        print(f"{time.monotonic() - began:.0f} s:", " | ".join(cells(made)), flush=True)
    if workers is not None:
        workers.end()
    return found


# -- results ------------------------------------------------------------------------------------------------------------

OTHERS = ("communication", "noise")  # of the parts: not of a step alone
COLUMNS = ("what", "blocks", "batch", "images/s", "ms a step or image", *PARTS, *OTHERS, "MFU", "waits", "memory")


def cells(row: Row) -> list[str]:
    """The row as text, in the order of :data:`COLUMNS`."""
    what = f"sampling {row.network}, {row.steps} steps" if row.kind == "sampling" else f"training {row.network}"
    how = f"{'compiled' if row.compiled else 'plain'}{', checkpointing' * row.checkpointing}"
    rate = f"{row.rate:.3g} ({min(row.rates):.3g} to {max(row.rates):.3g})"
    parts = [f"{1000 * row.parts[part]:.1f}" if part in row.parts else "—" for part in (*PARTS, *OTHERS)]
    mfu = f"{row.mfu:.1%}" if row.mfu else "—"
    waits = f"{row.waits.total() / WAITING_STEPS:g}" if row.parts and torch.cuda.is_available() else "—"
    return [what, how, str(row.batch), rate, f"{1000 * row.seconds:.1f}", *parts, mfu, waits, f"{row.gigabytes:.1f} GB"]


def print_table(rows: Sequence[Row]) -> None:
    """In Markdown; then where the host waits."""
    machine = machine_info()
    print(f"\n{date.today()}, {machine['GPU'] if torch.cuda.is_available() else machine['CPU']}, torch {machine['torch']}\n")
    print("|", " | ".join(COLUMNS), "|")
    print("|---" * len(COLUMNS) + "|")
    for row in rows:
        print("|", " | ".join(cells(row)), "|")
    print()
    for row in rows:
        for place, times in row.waits.most_common():
            print(f"wait: {row.name()}, {times / WAITING_STEPS:g} a step at {place}")


def print_ratios(rows: Sequence[Row]) -> None:
    """Compiled over plain, with checkpointing over without, and MFU over the published one."""
    known = {row.key(): row.rates for row in rows}
    ratios: dict[str, list[float]] = {}
    for row in rows:
        others = [("compiled", replace(row, compiled=False))] if row.compiled else []
        others += [("checkpointing", replace(row, checkpointing=False))] if row.checkpointing else []
        for what, other in others:
            if theirs := known.get(other.key()):
                ratios[f"{row.name()}_{what}"] = [mine / his for mine, his in zip(row.rates, theirs, strict=True)]
        if row.mfu and row.compiled and not row.checkpointing and "XL" in row.network:
            for published in PUBLISHED_MFU:
                name = f"{row.name()}_mfu_over_{published:.0%}".replace("%", "_percent")
                ratios[name] = [row.mfu * rate / row.rate / published for rate in row.rates]
    common.print_ratios(ratios)


def main() -> None:
    """Measure, and print the table and the ratios."""
    began = time.monotonic()
    parser = common.bench_parser(__doc__, "tiny, few rows, nothing compiled: under 50 s on a CPU")
    kinds = ("denoiser", "autoencoder", "sampling")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="default: all three")
    parser.add_argument("--seconds", type=float, default=300, help="begin no row that would end later (default: 300)")
    parser.add_argument("--processes", type=int, default=1, help="to train on, each with a GPU (default: 1)")
    given = parser.parse_args()
    common.quieten()
    logging.disable(logging.WARNING)
    tiny = given.quick or not torch.cuda.is_available()
    print(machine_info())
    rows = [row for row in (QUICK if given.quick else ROWS) if row.kind in given.only]
    if tiny:
        print("tiny networks and batches: this shows that the script runs, not how fast training is")
        smaller = [replace(row, batch=min(row.batch, 4)) for row in rows]
        rows = [*{row.key(): row for row in smaller}.values()]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), tiny, THIRDS * (2 if tiny else 8), given.processes)
        found = measure_all(bench, rows, began, given.seconds)
    print_table(found)
    print_ratios(found)


if __name__ == "__main__":
    main()
