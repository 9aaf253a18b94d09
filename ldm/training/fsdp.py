"""FSDP2: weights, gradients, optimiser and averages sharded over the processes by torch's ``fully_shard``.

Every process holds a shard of each weight and gathers the full weights of a block when the block is called. On plain tensors,
that is without FSDP, all functions but :func:`shard` return their argument.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
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
