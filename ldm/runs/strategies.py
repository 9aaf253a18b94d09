"""FSDP2 as a strategy of Lightning's trainer, with sharded checkpoints.

A run resumes from a sharded checkpoint on any number of processes, with FSDP or DDP, and with FSDP from one in one file.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from ldm.errors import UsageError
from ldm.runs.checkpoints.files import read_checkpoint, require_whole_together
from ldm.runs.checkpoints.sharded import AVERAGES, OPTIMISER, each_average, shard_optimiser_state, sharded_checkpoint
from ldm.training.base import TrainingModule
from ldm.training.fsdp import from_local, local_tensor, shard_like


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all processes: ``--trainer.strategy fsdp``."""

    def __init__(self, timeout_minutes: float = 30.0):
        """
        Args:
            timeout_minutes: limit for a collective operation.
        """
        super().__init__(tensor_parallel_size=1, timeout=timedelta(minutes=timeout_minutes))

    @property
    def training_module(self) -> TrainingModule:
        """What is trained, once the strategy is connected to it."""
        assert isinstance(self.lightning_module, TrainingModule)
        return self.lightning_module

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Every process writes its shards, those of the averages among the weights."""
        checkpoint["state_dict"] |= self._averages()
        for average in each_average(checkpoint["average"]):
            average["shadow_params"] = None
        with sharded_checkpoint(Path(self.broadcast(filepath))) as folder:
            super().save_checkpoint(checkpoint, folder, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights, optimiser state and averages; returns the rest of the checkpoint."""
        path = require_whole_together(Path(checkpoint_path))  # before torch unpickles a part of it
        return self._load_sharded(path) if path.is_dir() else self._load_file(path)

    def _load_file(self, path: Path) -> dict[str, Any]:
        """A checkpoint of one process or DDP: each process takes its shards."""
        checkpoint = read_checkpoint(path, mmap=True)
        shapes = {name: weight.shape for name, weight in checkpoint["state_dict"].items()}
        self.training_module.require_same_network(checkpoint, shapes)
        own = self.training_module.state_dict()
        weights = {
            name: shard_like(weight, own[name]) if name in own else weight for name, weight in checkpoint["state_dict"].items()
        }
        self.training_module.load_state_dict(own | weights if own.keys() - weights.keys() <= self._absent() else weights)
        for optimiser, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimiser.load_state_dict(shard_optimiser_state(state, optimiser))
        parameters = self.training_module.average.averaged
        for average in each_average(checkpoint["average"]):
            shadows = zip(average["shadow_params"], parameters, strict=True)
            average["shadow_params"] = [local_tensor(shard_like(*pair)).clone() for pair in shadows]
        return checkpoint

    def _load_sharded(self, path: Path) -> dict[str, Any]:
        checkpoint = read_checkpoint(path)
        saved = [*checkpoint["average"].get("power_function", {})]
        ours = [repr(sigma_rel) for sigma_rel in self.training_module.average.power]
        if saved != ours:
            raise UsageError(
                f"{path} keeps averages of sigma_rel {', '.join(saved) or 'none'}, model.power_averages asks for "
                f"{', '.join(ours) or 'none'}; give the same ones to resume from a sharded checkpoint"
            )
        saved_tensors = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        shapes = {
            name.removeprefix("state_dict."): each.size
            for name, each in saved_tensors.items()
            if name.startswith("state_dict.") and isinstance(each, TensorStorageMetadata)
        }
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(AVERAGES)}
        self.training_module.require_same_network(checkpoint, shapes)
        assert self.model is not None
        # in place: into the tensors of the network and the averages
        absent = self._absent()
        weights = {name: weight for name, weight in self.training_module.state_dict().items() if name not in absent}
        dcp.load({"state_dict": weights | self._averages()}, checkpoint_id=path)
        for number, optimiser in enumerate(self.optimizers):
            states = {f"{OPTIMISER}{number}": get_optimizer_state_dict(self.model, optimiser)}
            dcp.load(states, checkpoint_id=path)
            set_optimizer_state_dict(self.model, optimiser, states[f"{OPTIMISER}{number}"])
        for average, ema in zip(each_average(checkpoint["average"]), self.training_module.average.all(), strict=True):
            average["shadow_params"] = ema.shadow_params
        return checkpoint

    def _absent(self) -> set[str]:
        """Names of weights that are not in checkpoints."""
        module = self.training_module
        frozen = {
            f"{part}.{name}"
            for part, network in module.named_children()
            if not any(parameter.requires_grad for parameter in network.parameters())
            for name in network.state_dict()
        }
        return frozen | {name for name in module.state_dict() if module.is_absent(name)}

    def _averages(self) -> dict[str, Tensor]:
        average = self.training_module.average
        return {
            f"{AVERAGES}{number}.{index}": from_local(shadow, parameter)
            for number, ema in enumerate(average.all())
            for index, (shadow, parameter) in enumerate(zip(ema.shadow_params, average.averaged, strict=True))
        }
