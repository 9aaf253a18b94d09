"""FSDP2: weights, gradients, optimiser and averages sharded over the processes by torch's ``fully_shard``.

Every process holds a shard of each weight and gathers the full weights of a block when the block is called. On plain tensors,
that is without FSDP, all functions but :func:`shard` return their argument.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

# methods other than forward that need gathered weights: of an AutoencoderKL, of a DiT, and of a DiT's blocks
FORWARD_METHODS = ("encode", "decode", "encode_text", "text_keys_values")


def shard(network: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard a network over the processes of ``mesh``; each of ``blocks``, inner ones first, is gathered by itself.

    Weights are gathered in ``dtype``, so that the network is called under autocast to it; gradients are reduced in fp32.
    """
    # inputs stay as they are, or times would be rounded and the residual stream be in bf16: autocast casts for products alone
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks, network):
        # reshard the outermost too: full weights kept after a validation would be those of the average
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        for method in FORWARD_METHODS:
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)


def is_sharded(network: nn.Module) -> bool:
    """Whether calling the network needs all processes."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; it shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered; a collective operation."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def from_local(local: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard as a tensor sharded like ``parameter``; it shares memory."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor, the same on all processes, sharded like ``parameter``."""
    if not isinstance(parameter, DTensor):
        return tensor
    # src_data_rank=None: every process takes its own shard, and nothing is sent
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def rows_to_matrices(shards: Tensor, rows: int) -> Tensor:
    """This process's rows of n matrices of ``rows`` rows -> n / processes whole ones, the same number on each process.

    (n, r, C) -> (n / processes, rows, C), in one exchange in which each process sends no more than it has.
    """
    world = dist.get_world_size()
    padded = nn.functional.pad(shards, (0, 0, 0, -(-rows // world) - shards.shape[1]))  # all have as many as the first
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded)
    return received.unflatten(0, (world, -1)).transpose(0, 1).flatten(1, 2)[:, :rows].contiguous()


def matrices_to_rows(matrices: Tensor) -> Tensor:
    """The inverse of :func:`rows_to_matrices`, up to padding: (n / processes, rows, C) -> (n, ceil(rows / processes), C)."""
    world, rows = dist.get_world_size(), matrices.shape[1]
    padded = nn.functional.pad(matrices, (0, 0, 0, -rows % world))
    shards = padded.unflatten(1, (world, -1)).transpose(0, 1).flatten(0, 1).contiguous()  # (n, rows / processes, C)
    received = torch.empty_like(shards)
    dist.all_to_all_single(received, shards)
    return received
