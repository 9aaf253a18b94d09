"""A network's fingerprint: a hash of weights and architecture, by which artifacts name what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

HALF_PRECISION = (torch.float16, torch.bfloat16)


def network_hash(network: nn.Module, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> str:
    """Hex sha256 of ``config`` and all weights in the order of their names, independent of file format and device.

    ``dtype`` rounds the weights first: the hash of a network's half-precision copy, computed from either of the two.
    """
    return weights_hash(network.state_dict(), config, dtype)


def weights_hash(weights: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype | None = None) -> str:
    """:func:`network_hash` of weights by name."""
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.items()):
        tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_half_precision(network: nn.Module) -> bool:
    """Whether all weights are numbers of float16, or all of bfloat16, whatever type holds them."""
    weights = [weight for weight in network.state_dict().values() if weight.is_floating_point()]
    return any(all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights) for dtype in HALF_PRECISION)
