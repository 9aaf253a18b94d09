"""FSDP2: weights, gradients, optimiser and averages sharded over the processes by torch's ``fully_shard``.

Every process holds a shard of each weight and gathers a block's whole weights when the block is called. Without FSDP these
functions change nothing: :func:`local` gives back the parameter, :func:`whole` the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

# methods beside forward that a module is called by: an AutoencoderKL's, a DiT's, and those of a DiT's blocks
CALLED_BESIDE_FORWARD = ("encode", "decode", "encode_text", "text_keys_values")


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
