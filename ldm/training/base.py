"""What both stages share: the average, the checkpoint, and the plain directory at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from torch import Tensor, nn

from ldm.data.datamodule import ShardDataModule
from ldm.errors import UsageError
from ldm.training.ema import Average, PowerAverages
from ldm.training.fsdp import is_sharded, shard
from ldm.training.nonfinite import SkippedSteps
from ldm.training.randomness import global_states, set_global_state

# differing weights that an error names
NAMED_WEIGHTS = 8


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
    """A LightningModule that averages one network and can draw a preview and export itself."""

    #: `ldm COMMAND fit` trains it; what that leaves behind, as the name of its folder
    command, artifact = "stage", "model"
    #: whether a backward pass leaves some of the trained parameters alone
    takes_turns = False
    #: steps left out because something in them was not finite; made with the stage's own limit
    skips: SkippedSteps
    #: of the noise of every step (:mod:`ldm.training.randomness`); a resumed run keeps its first one
    seed: int | None = None
    _random_states: list[dict[str, Any]] | None = None

    def prepare(self, data: ShardDataModule) -> None:
        """Take from the data what is needed, and refuse those that do not serve; before training and before an export."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        self.prepare(self.trainer.datamodule)

    def averaged(self) -> nn.Module:
        """The network whose average is kept."""
        raise NotImplementedError

    def preview(self) -> list[tuple[str, list[Image.Image]]]:
        """Rows of images with their labels, from fixed samples and seeds."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the plain directory into the empty ``folder``; called under the average."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Parts of :meth:`averaged`, each inside those after it or beside them, that FSDP gathers one after another."""
        raise NotImplementedError

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the matrix products; weights are in fp32."""
        return torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32

    def configure_model(self) -> None:
        """Under FSDP, spread the trained network and its averages over the processes."""
        network = self.averaged()
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not is_sharded(network):
            shard(network, self.blocks(), self.device_mesh["data_parallel"], self.compute_dtype)
            self.start_average(*self._averaging)

    def start_average(self, decay: float, power: PowerAverages | None = None) -> None:
        """Begin to keep the average of :meth:`averaged`: an exponential one, and power-function ones beside it."""
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
        # not before: what makes loaders and their processes ready draws, too
        if self._random_states is not None:
            if len(self._random_states) == self.trainer.world_size:
                set_global_state(self._random_states[self.global_rank])
            self._random_states = None

    def log_step(self, figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log a step's figures, each the mean over all processes, and return them so."""
        together = torch.stack([value.detach().float().to(self.device) for value in figures.values()])
        together = self.trainer.strategy.reduce(together, reduce_op="mean")
        figures = dict(zip(figures, together.unbind(), strict=True))
        self.log_dict(figures)
        return figures

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = self.average.state_dict()
        checkpoint["skipped"] = self.skips.state_dict()
        checkpoint["seed"], checkpoint["random"] = self.seed, global_states()
        # Lightning saves at the end of a validation, while the average still stands in: the checkpoint wants what is trained
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
