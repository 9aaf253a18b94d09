"""FSDP2 as a strategy of Lightning's trainer, with checkpoints that every process writes its shards of.

Checkpoints are folders of :mod:`torch.distributed.checkpoint`; a run resumes from them on any number of processes.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from ldm.errors import UsageError
from ldm.runs.checkpoints.files import load_checkpoint
from ldm.runs.checkpoints.sharded import sharded_checkpoint
from ldm.runs.lightning_private import load_sharded_checkpoint
from ldm.training.fsdp import like

# prefix of the averages' shards among the weights of a checkpoint
AVERAGES = "average."


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all processes: ``--trainer.strategy fsdp``."""

    def __init__(self, timeout_minutes: float = 30.0):
        """
        Args:
            timeout_minutes: after which a process that does not answer counts as gone.
        """
        super().__init__(tensor_parallel_size=1, timeout=timedelta(minutes=timeout_minutes))

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """A folder of every process's pieces, the averages' among the weights'."""
        checkpoint["state_dict"] |= self._averages()
        for average in _each(checkpoint["average"]):
            average["shadow_params"] = None
        with sharded_checkpoint(Path(self.broadcast(filepath))) as folder:
            super().save_checkpoint(checkpoint, folder, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights, optimiser and averages in their places; returns what else there was."""
        # verified: torch unpickles a part of what follows
        saved = [*load_checkpoint(Path(checkpoint_path), mmap=True)["average"].get("power_function", {})]
        ours = [repr(sigma_rel) for sigma_rel in self.lightning_module.average.power]
        if saved != ours:
            raise UsageError(
                f"{checkpoint_path} keeps averages of sigma_rel {', '.join(saved) or 'none'}, model.power_averages asks for "
                f"{', '.join(ours) or 'none'}; sharded, they must be the same"
            )
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=True)
        if Path(checkpoint_path).is_dir():
            # into the very tensors that the averages are kept in
            dcp.load({"state_dict": self._averages()}, checkpoint_id=checkpoint_path)
            for average, ema in zip(_each(checkpoint["average"]), self.lightning_module.average.all(), strict=True):
                average["shadow_params"] = ema.shadow_params
        return checkpoint

    def _averages(self) -> dict[str, Tensor]:
        average = self.lightning_module.average
        return {
            f"{AVERAGES}{number}.{index}": like(shadow, parameter)
            for number, ema in enumerate(average.all())
            for index, (shadow, parameter) in enumerate(zip(ema.shadow_params, average.network.parameters(), strict=True))
        }


def read_sharded(folder: Path) -> dict[str, Any]:
    """A checkpoint of :class:`FullySharded` as that of one process, its pieces put together on the CPU."""
    load_checkpoint(folder)  # verified
    checkpoint = load_sharded_checkpoint(folder)
    weights = checkpoint["state_dict"]
    for number, average in enumerate(_each(checkpoint["average"])):
        start = f"{AVERAGES}{number}."
        pieces = {int(name.removeprefix(start)): weights.pop(name) for name in [*weights] if name.startswith(start)}
        average["shadow_params"] = [pieces[index] for index in sorted(pieces)]
    return checkpoint


def _each(averages: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all averages in the order of :meth:`ldm.training.ema.Average.all`."""
    return [averages, *averages.get("power_function", {}).values()]
