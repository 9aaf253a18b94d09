"""FSDP2: weights, gradients, optimiser and averages spread over the processes, by Lightning and torch's ``fully_shard``.

Every process holds a piece of each weight and gathers a block's whole weights when the block is called. Checkpoints are
folders of pieces (:mod:`torch.distributed.checkpoint`), which any number of processes can go on from. Without such a strategy
nothing here does anything: :func:`local` gives back the parameter, :func:`whole` the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.errors import UsageError
from ldm.runs.checkpoints.files import load_checkpoint
from ldm.runs.checkpoints.sharded import sharded_checkpoint

# of the averages' pieces among the weights of a checkpoint
AVERAGES = "average."
# an AutoencoderKL's, and of the blocks of our DiT
CALLED_BESIDE_FORWARD = ("encode", "decode", "look_up")


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
    checkpoint = _load_distributed_checkpoint(folder)
    weights = checkpoint["state_dict"]
    for number, average in enumerate(_each(checkpoint["average"])):
        start = f"{AVERAGES}{number}."
        pieces = {int(name.removeprefix(start)): weights.pop(name) for name in [*weights] if name.startswith(start)}
        average["shadow_params"] = [pieces[index] for index in sorted(pieces)]
    return checkpoint


def _each(averages: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all averages in the order of :meth:`ldm.training.ema.Average.all`."""
    return [averages, *averages.get("power_function", {}).values()]


def shard(network: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Spread a network over the processes, so that ``blocks`` are gathered one after another when they are called.

    ``dtype``: to gather weights in; gradients are reduced in fp32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks:
        _shard(block, mesh, policy)
    _shard(network, mesh, policy)


def _shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    # the outermost too: whole weights that stayed after a validation would be those of the average
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for method in CALLED_BESIDE_FORWARD:
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)


def is_sharded(network: nn.Module) -> bool:
    """Whether calling the network needs all processes."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(piece: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a tensor that is spread as ``parameter`` is; the same memory."""
    if not isinstance(parameter, DTensor):
        return piece
    return DTensor.from_local(
        piece,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def piece_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What this process would hold of a whole tensor, the same on all processes, if it were spread as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return tensor
    # src_data_rank: every process cuts its own piece, none is sent
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
