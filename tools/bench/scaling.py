"""Training on several processes of this machine: throughput, the share of communication in a step, and a model of both.

    python tools/bench/scaling.py [--quick] [--rounds R] [--processes 1 2 …] [--threads T]
    python tools/bench/scaling.py --stage denoiser --config FILE --data.train latents --data.validation latents …

Each measurement is ``ldm STAGE fit`` of a recipe (default: those of configs/shapes, on its own shapes and latents): Lightning's
``Trainer.fit`` with loader, optimisers, averages and logs, without previews, checkpoints and validation. Options that are not
listed in --help go to ``fit``. Every process has the recipe's batch and ``--threads`` threads (default: 1 on a CPU), so that
one process alone has as much of the machine as each of many: throughput should be N-fold on N processes, as long as there are
cores or GPUs for all. A round takes every measurement once, in alternating order; processes start once.

Communication under DDP: every other step exchanges no gradients (DDP's ``no_sync``) and is otherwise the same; the share is
the additional time of the median step with them. FSDP cannot train without an exchange; its share is that over one process
alone, contention included. The bandwidth is that of a separate all-reduce of as many bytes as the gradients have, after
training: bytes sent by a process over seconds. Expected is :func:`expected_efficiency` from one process's step, bytes and
bandwidth, without overlap. Contention: a step without exchange over one process's step, less 1. It is what the processes take
from each other of memory bandwidth and caches, and what they wait for each other to reduce scalars such as the loss; the model
ignores both.

Ends with ``ratio NAME MEDIAN MIN MAX``: efficiency (throughput over N times that of one process), and efficiency over expected.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import common
import torch
from common import CONFIGS

WARM_UP = 4  # steps that are not timed, in which memory is allocated and DDP rebuilds its buckets
ALL_REDUCES = 5
SECONDS = 600  # for one measurement; after them a process that does not answer is taken to hang


@dataclass(frozen=True)
class Case:
    """One measurement: a stage on so many processes."""

    stage: str
    strategy: str  # one, ddp or fsdp
    processes: int

    @property
    def name(self) -> str:
        return f"{self.stage}_{self.strategy}_{self.processes}"


@dataclass
class Found:
    """Measurements of one process in one round: seconds of each step with and without exchange, and of an all-reduce."""

    images_per_step: int
    gradient_bytes: int
    with_exchange: list[float] = field(default_factory=list)
    without: list[float] = field(default_factory=list)
    all_reduce: list[float] = field(default_factory=list)

    @property
    def step(self) -> float:
        return statistics.median(self.with_exchange)


# -- in the processes ----------------------------------------------------------------------------------------------------


def worker(pipe: Connection, rank: int, threads: int) -> None:
    """One process: calls each ``(function, arguments)`` that comes through the pipe, until None comes."""
    torch.set_num_threads(threads)
    common.quieten()
    logging.disable(logging.WARNING)
    import timed_fit  # noqa: F401  imports all that a measurement needs

    pipe.send(None)
    with suppress(EOFError, ConnectionError):  # the first process has ended
        while (task := pipe.recv()) is not None:
            function, arguments = task
            try:
                pipe.send(function(rank, *arguments))
            except (Exception, SystemExit) as error:
                pipe.send(RuntimeError(f"process {rank}: {error!r}"))


def make_shapes(rank: int, folder: Path, samples: int) -> None:
    """Shapes of 40 px, an untrained autoencoder and its latents."""
    from timed_fit import make_data

    from ldm.models.autoencoder import AutoencoderConfig

    make_data(folder, samples, 40, AutoencoderConfig([16, 32, 64], 4, 1, 4, False, 40))


def shapes_options(rank: int, stage: str, folder: Path, quick: bool) -> list[str]:
    """Of ``fit``: the shipped recipe on the data in ``folder``."""
    from timed_fit import data_options

    recipe = ["--config", str(CONFIGS / "shapes" / f"{stage}.yaml"), *data_options(stage, folder)]
    return [*recipe, "--data.batch_size", "2" if stage == "autoencoder" else "8"] if quick else recipe


def describe_machine(rank: int) -> str:
    from ldm.machine import machine_info

    return str(machine_info())


def measure(rank: int, case: Case, options: list[str], steps: int, port: int) -> Found:
    """``fit`` as the process ``rank`` of this case, for so many timed steps of each kind."""
    from lightning import LightningModule, Trainer
    from timed_fit import Clock, TimedFit
    from torch.nn.parallel import DistributedDataParallel

    class Exchange(Clock):
        """Under DDP, every other step is without exchange."""

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            if isinstance(model := trainer.strategy.model, DistributedDataParallel):
                model.require_backward_grad_sync = trainer.global_step % 2 == 0

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
            self.found = Found(self.images_per_step, 4 * trained)
            for number, spent in enumerate(self.seconds[WARM_UP - 1 :], WARM_UP):  # of step `number`
                exchanges = case.strategy != "ddp" or number % 2 == 0
                (self.found.with_exchange if exchanges else self.found.without).append(spent)
            if case.processes > 1:
                self.found.all_reduce = time_all_reduce(self.found.gradient_bytes, trainer.strategy.root_device)

    clock = Exchange()
    strategy = "auto" if case.strategy == "one" else case.strategy
    how = ["--trainer.devices", str(case.processes), "--trainer.strategy", strategy]
    with launched(rank, case.processes, port):
        TimedFit(case.stage, [*options, *how], WARM_UP + (2 if case.strategy == "ddp" else 1) * steps, clock)
    return clock.found


def time_all_reduce(size: int, device: Any) -> list[float]:
    """Seconds of an all-reduce of one fp32 tensor of so many bytes."""
    import torch.distributed as dist

    numbers = torch.zeros(size // 4, device=device)
    dist.all_reduce(numbers)
    seconds = []
    for _ in range(ALL_REDUCES):
        dist.barrier()
        began = common.now(device)
        dist.all_reduce(numbers)
        seconds.append(common.now(device) - began)
    return seconds


def exchanged_bytes(parameter_bytes: float, processes: int, sharded: bool = False) -> float:
    """Bytes that each of N ``processes`` sends in a step; ``parameter_bytes`` are those of the gradients.

    DDP: a ring all-reduce of the gradients, 2·(N − 1)/N of their bytes (Patarasu & Yuan 2009, doi 10.1016/j.jpdc.2008.09.002).
    FSDP (``sharded``): the weights are gathered for the forward and again for the backward pass, and the gradients scattered:
    3·(N − 1)/N (Rajbhandari et al. 2020, arXiv 1910.02054, section 7; Zhao et al. 2023, arXiv 2304.11277).
    """
    return (3 if sharded else 2) * (processes - 1) / processes * parameter_bytes


def expected_efficiency(
    compute_seconds: float, gradient_bytes: float, processes: int, bytes_per_second: float, sharded: bool = False
) -> float:
    """Throughput on N processes over N times that of one, 0 to 1, if no exchange overlaps with compute.

    ``compute_seconds``: of a step on one process. ``bytes_per_second``: that a process sends, on the slowest link.
    """
    exchange = exchanged_bytes(gradient_bytes, processes, sharded) / bytes_per_second
    return compute_seconds / (compute_seconds + exchange)


def report(rank: int, found: dict[Case, list[Found]]) -> dict[str, list[float]]:
    """Print the table; returns the ratios, one per round each."""
    print("\n| stage | strategy | processes | images/s | efficiency | expected | communication | contention | all-reduce |")
    print("|---|---|---|---|---|---|---|---|---|")
    ratios: dict[str, list[float]] = {}
    for case, rounds in found.items():
        alone = found.get(Case(case.stage, "one", 1), [])
        rates = [one.images_per_step / one.step for one in rounds]
        cells = [case.stage, case.strategy, str(case.processes), spread(rates)]
        if case.processes == 1 or not alone:
            print("|", " | ".join([*cells, *"—————"]), "|")
            continue
        efficiency = [single.step / many.step for single, many in zip(alone, rounds, strict=True)]
        sent, sharded = exchanged_bytes(rounds[0].gradient_bytes, case.processes), case.strategy == "fsdp"
        bandwidths = [sent / statistics.median(one.all_reduce) for one in rounds]
        expected = [
            expected_efficiency(single.step, many.gradient_bytes, case.processes, bandwidth, sharded=sharded)
            for single, many, bandwidth in zip(alone, rounds, bandwidths, strict=True)
        ]
        # of a step without the exchange; where there is none, of one process alone
        without = [
            statistics.median(many.without) if many.without else single.step for single, many in zip(alone, rounds, strict=True)
        ]
        shares = [1 - own / many.step for own, many in zip(without, rounds, strict=True)]
        contention = [own / single.step - 1 for own, single in zip(without, alone, strict=True)]
        gigabytes = statistics.median(bandwidths) / 1e9
        bandwidth = f"{gigabytes:.2f} GB/s of {rounds[0].gradient_bytes / 1e6:.1f} MB"
        contended = "in communication" if sharded else spread(contention, "%")
        print(
            "|",
            " | ".join([*cells, *(spread(value, "%") for value in (efficiency, expected, shares)), contended, bandwidth]),
            "|",
        )
        ratios[f"scaling_{case.name}_efficiency"] = efficiency
        ratios[f"scaling_{case.name}_over_expected"] = [own / model for own, model in zip(efficiency, expected, strict=True)]
    print()
    return ratios


def spread(values: Sequence[float], unit: str = "") -> str:
    """Median, least and most."""
    median, least, most = statistics.median(values), min(values), max(values)
    if unit:
        return f"{median:.0%} ({least:.0%} to {most:.0%})"
    return f"{median:.1f} ({least:.1f} to {most:.1f})"


@contextmanager
def launched(rank: int, processes: int, port: int) -> Iterator[None]:
    """The environment variables of torchrun; the process group ends with them."""
    import torch.distributed as dist

    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "scaling"}
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    os.environ |= {name: str(value) for name, value in variables.items()}
    rank_zero_only.rank = rank  # pyright: ignore[reportFunctionMemberAccess]  Lightning's own way to set it
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in variables:
            del os.environ[name]


# -- in the first process ----------------------------------------------------------------------------------------------


class Workers:
    """Processes that have imported everything, and call the same function together."""

    def __init__(self, number: int, threads: int):
        context = get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self.pipes, self.processes = [], []
        for rank in range(number):
            mine, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, rank, threads), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        self._answers(number)

    def call(self, function: Any, *arguments: Any, number: int = 1) -> list[Any]:
        """The results of the first so many processes."""
        for pipe in self.pipes[:number]:
            pipe.send((function, arguments))
        return self._answers(number)

    def _answers(self, number: int) -> list[Any]:
        answers = []
        for pipe in self.pipes[:number]:
            if not pipe.poll(SECONDS):
                raise TimeoutError(f"a process has not answered for {SECONDS} s")
            answers.append(pipe.recv())
        failed = next((answer for answer in answers if isinstance(answer, Exception)), None)
        if failed is not None:
            raise failed
        return answers

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def measure_all(
    workers: Workers, cases: Sequence[Case], options: dict[str, list[str]], rounds: int, steps: int, folder: Path
) -> dict[Case, list[Found]]:
    """Measure every case in every round, and print it."""
    found: dict[Case, list[Found]] = {case: [] for case in cases}
    for turn in range(rounds):
        for case in common.in_turn(cases, turn):
            out = ["--out", str(folder / f"{case.name}-{turn}")]
            answers = workers.call(measure, case, [*options[case.stage], *out], steps, free_port(), number=case.processes)
            found[case].append(answers[0])
        print(
            f"round {turn + 1}, s/step:", {case.name: round(values[-1].step, 4) for case, values in found.items()}, flush=True
        )
    return found


def main() -> None:
    """Measure, and print the ratios."""
    parser = common.bench_parser(__doc__, "up to two processes, small batches, few steps: under 50 s", allow_abbrev=False)
    parser.add_argument("--stage", choices=["autoencoder", "denoiser"], help="of --config (default: both, of configs/shapes)")
    parser.add_argument("--config", metavar="FILE", help="a recipe; further options go to fit")
    parser.add_argument("--processes", type=int, nargs="+", help="default: 1, 2, 4 … as the machine has cores, or GPUs")
    parser.add_argument("--threads", type=int, default=1, help="of each process, on a CPU (default: 1)")
    parser.add_argument("--rounds", type=int, default=5)
    given, rest = parser.parse_known_args()
    if (given.config is None) != (given.stage is None) or (rest and given.config is None):
        parser.error(f"--stage, --config and options of fit ({' '.join(rest) or 'none'}) go together")
    there = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    numbers = given.processes or [2**power for power in range(there.bit_length()) if 2**power <= there]
    numbers = sorted({1, *numbers} if not given.quick else {1, 2})
    stages = [given.stage] if given.stage else ["autoencoder", "denoiser"]
    cases = [Case(stage, "one", 1) for stage in stages]
    for number in numbers[1:]:
        cases += [Case(stage, "ddp", number) for stage in stages]
        cases += [Case("denoiser", "fsdp", number)] if "denoiser" in stages else []
    rounds, steps = (2, 3) if given.quick else (given.rounds, 20)
    workers = Workers(numbers[-1], given.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(workers.call(describe_machine)[0])
        print(f"{there} {'GPUs' if torch.cuda.is_available() else 'cores'}, {given.threads} threads a process, "
              f"{rounds} rounds of {steps} steps", flush=True)  # fmt: skip
        if given.config is None:
            workers.call(make_shapes, folder, 96 if given.quick else 1024)
            options = {stage: workers.call(shapes_options, stage, folder, given.quick)[0] for stage in stages}
        else:
            options = {given.stage: ["--config", given.config, *rest]}
        found = measure_all(workers, cases, options, rounds, steps, folder)
        ratios = workers.call(report, found)[0]
        workers.end()
    common.print_ratios(ratios, digits=3)


if __name__ == "__main__":
    main()
