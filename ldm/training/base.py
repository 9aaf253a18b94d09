"""What both stages share: the parts of a step, the average, the checkpoint, and the exported artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ldm.data.datamodule import ShardDataModule
from ldm.data.plan import PlannedSample
from ldm.errors import UsageError
from ldm.training.ema import Average, PowerAverages
from ldm.training.fsdp import is_sharded, shard
from ldm.training.nonfinite import SkippedSteps
from ldm.training.randomness import global_states, set_global_state

# differing weights that an error names
NAMED_WEIGHTS = 8

T = TypeVar("T")


def require_weights(network: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Raise :class:`UsageError`, listing the keys, unless ``what`` holds weights of the network's names and shapes."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    expected = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    parameters = [name for name, _ in network.named_parameters()]  # buffers need not be there
    differing = [
        f"{name}: {shapes.get(name, 'none')} there, {expected.get(name, 'none')} here"
        for name in dict.fromkeys([*parameters, *shapes])
        if shapes.get(name) != expected.get(name)
    ]
    if differing:
        listed = "; ".join(differing[:NAMED_WEIGHTS])
        more = f"; and {len(differing) - NAMED_WEIGHTS} more" if len(differing) > NAMED_WEIGHTS else ""
        raise UsageError(
            f"{what} is of another network than the config's, {len(differing)} weights differ ({listed}{more}); give the "
            "config that it was trained with"
        )


class TrainingModule(LightningModule):
    """What the modules of both stages share: steps over micro-batches, the average of one network, its export.

    Optimisation is manual, so that one batch of the loader is one step of the optimiser in both stages, however many
    micro-batches it is split into.
    """

    #: the command whose ``fit`` trains it, and the name of the directory that it exports
    command, artifact = "stage", "model"
    #: for DDP: whether some backward passes leave trained parameters without a gradient
    find_unused_parameters = False
    #: micro-batches that a batch is split into
    accumulate: int
    #: counts of steps whose loss or gradients were not finite
    skips: SkippedSteps
    #: of the noise of every step (:mod:`ldm.training.randomness`); a resumed run keeps its first one
    seed: int | None = None
    _random_states: list[dict[str, Any]] | None = None

    # -- a step, in parts ----------------------------------------------------------------------------------------------

    def micro_batches(self, parts: Sequence[T], sizes: Sequence[int]) -> Iterator[tuple[T, float]]:
        """Each part of a batch with its share of the samples. Processes exchange gradients at the last one alone."""
        strategy = self.trainer.strategy
        for number, (part, size) in enumerate(zip(parts, sizes, strict=True), 1):
            last = number == len(parts) or not isinstance(strategy, ParallelStrategy)
            with nullcontext() if last else strategy.block_backward_sync():
                yield part, size / sum(sizes)

    def step_or_skip(
        self, optimiser: Any, schedule: LRScheduler, finite: Tensor, network: str, samples: Sequence[PlannedSample]
    ) -> bool:
        """Step the optimiser and its schedule; returns whether the step was taken.

        Where ``finite`` is not, the step counts but no weight moves. It must be the same on all processes.
        """
        taken = bool(torch.isfinite(finite))
        if taken:
            self.skips.count_taken(network)
        else:
            optimiser.zero_grad()  # an optimiser leaves parameters without a gradient alone, and their moments
            self.skips.count_skipped(network, self.trainer, samples)
            self.log("train/skipped", float(self.skips.total))
        optimiser.step()
        schedule.step()
        return taken

    def log_step(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log a step's metrics, each the mean over all processes, and return these means."""
        together = torch.stack([value.detach().float().to(self.device) for value in metrics.values()])
        together = self.trainer.strategy.reduce(together, reduce_op="mean")
        means = dict(zip(metrics, together.unbind(), strict=True))
        self.log_dict(means)
        return means

    # -- what a stage defines ------------------------------------------------------------------------------------------

    def prepare(self, data: ShardDataModule) -> None:
        """Load what the data need, and refuse data that do not fit; before training and before an export."""
        raise NotImplementedError

    def averaged(self) -> nn.Module:
        """The network whose average is kept."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Parts of :meth:`averaged`, inner ones first, that FSDP gathers one after another."""
        raise NotImplementedError

    def preview(self) -> list[tuple[str, list[Image.Image]]]:
        """Rows of images with their labels, from fixed samples and seeds."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the artifact into the empty ``folder``; called while the average is applied."""
        raise NotImplementedError

    # -- setup ---------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if self.accumulate < 1:
            raise UsageError(f"model.accumulate is {self.accumulate}; give 1 or more")
        if self.accumulate > data.batch_size:
            raise UsageError(f"model.accumulate {self.accumulate} is more than data.batch_size {data.batch_size}; lower it")
        self.prepare(data)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of matrix products; weights are in fp32."""
        return torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32

    def configure_model(self) -> None:
        """Under FSDP, shard the trained network and its averages over the processes."""
        network = self.averaged()
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not is_sharded(network):
            shard(network, self.blocks(), self.device_mesh["data_parallel"], self.compute_dtype)
            self.start_average(*self._averaging)

    def start_average(self, decay: float, power: PowerAverages | None = None) -> None:
        """Begin the averages of :meth:`averaged`: an exponential one, and power-function ones if asked for."""
        self._averaging = decay, power
        self.average = Average(self.averaged(), decay, power)

    @contextmanager
    def average_applied(self) -> Iterator[None]:
        """The averaged weights in evaluation mode, for validation, previews and export."""
        network = self.averaged()
        was_training = network.training
        network.eval()
        try:
            with self.average.applied(), torch.no_grad():
                yield
        finally:
            network.train(was_training)

    def on_fit_start(self) -> None:
        self.average.to(self.device)
        if self.seed is None:
            self.seed = torch.initial_seed()
        # every process was seeded alike, so that weights begin alike; from here on dropout must differ
        if self.trainer.world_size > 1:
            torch.manual_seed(self.seed + self.global_rank)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # not before: starting the loaders and their processes takes random numbers too
        if self._random_states is not None:
            if len(self._random_states) == self.trainer.world_size:
                set_global_state(self._random_states[self.global_rank])
            self._random_states = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = self.average.state_dict()
        checkpoint["skipped"] = self.skips.state_dict()
        checkpoint["seed"], checkpoint["random"] = self.seed, global_states()
        # Lightning saves at the end of a validation while the average is applied: the checkpoint needs the trained weights
        trained = self.average.trained()
        if trained is not None:
            network = self.averaged()
            prefix = next(name for name, module in self.named_modules() if module is network)
            names = [f"{prefix}.{name}" for name, _ in network.named_parameters()]
            checkpoint["state_dict"] |= dict(zip(names, trained, strict=True))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.average.load_state_dict(checkpoint["average"])
        self.skips.load_state_dict(checkpoint["skipped"])
        self.seed, self._random_states = checkpoint["seed"], checkpoint["random"]

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self._validating = self.average_applied()
        self._validating.__enter__()

    def on_validation_model_train(self) -> None:
        self._validating.__exit__(None, None, None)
        super().on_validation_model_train()
