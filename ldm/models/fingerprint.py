"""A network's fingerprint: a hash of weights and architecture, by which artifacts name what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def network_hash(network: nn.Module, config: Mapping[str, Any]) -> str:
    """Hex sha256 of ``config`` and all weights in the order of their names, independent of file format and device."""
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
