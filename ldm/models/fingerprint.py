"""Who a network is: a hash of its weights and architecture, by which stages know what the other was made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def network_hash(network: nn.Module, config: Mapping[str, Any]) -> str:
    """Hex sha256 over ``config`` and all weights, in the order of their names, whatever file or device holds them."""
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
