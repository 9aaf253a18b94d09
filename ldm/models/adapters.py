"""Networks with low-rank adapters (Hu et al. 2021, arXiv 2106.09685) by peft: which layers they can adapt, which weights are
the network's own, and which network an adapter was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from typing_extensions import TypedDict

from ldm.models.fingerprint import HALF_PRECISION, weights_hash

#: beginnings of the names of peft's own weights: LoRA's and DoRA's, LoKr's, LoHa's
ADAPTER_WEIGHTS = ("lora_", "lokr_", "hada_")
#: layers that can be adapted
LAYERS = (nn.Linear, nn.Conv2d)


class Base(TypedDict):
    """The network that an adapter was trained on: its name, its class, and sha256 of its weights in float32 and as they are
    when rounded to float16 and bfloat16."""

    name: str
    network: str
    hashes: list[str]


def adaptable(network: nn.Module) -> Any:
    """The network with diffusers' methods for adapters, such as ``set_adapters``, which its class may lack: PixArt's does."""
    kind = type(network)
    if not isinstance(network, PeftAdapterMixin):
        # a subclass of the same name, by which diffusers saves it as before
        network.__class__ = type(kind.__name__, (kind, PeftAdapterMixin), {"__module__": kind.__module__})
    return network


def adaptable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be adapted by their names, whether they are already or not."""
    found = {name: base_layer(module) for name, module in network.named_modules() if not name.endswith(".base_layer")}
    inner = tuple(f".{each}" for each in ADAPTER_WEIGHTS)
    return {name: layer for name, layer in found.items() if isinstance(layer, LAYERS) and not any(i in name for i in inner)}


def base_layer(module: nn.Module) -> nn.Module:
    """The layer of the base under an adapted one."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_adapter_weight(name: str) -> bool:
    """Whether a weight of an adapted network is an adapter's."""
    return any(part.startswith(ADAPTER_WEIGHTS) for part in name.split("."))


def base_hash(network: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Hex sha256 of the network's own weights, whatever adapters it has; ``dtype`` as in
    :func:`ldm.models.fingerprint.network_hash`."""
    return weights_hash(own_weights(network), {}, dtype)


def own_weights(network: nn.Module) -> dict[str, Tensor]:
    """The network's own weights by their names, whatever adapters it has."""
    named = network.named_parameters()
    return {name.replace(".base_layer.", "."): weight for name, weight in named if not is_adapter_weight(name)}


def base_of(network: nn.Module, name: str, source: Mapping[str, Tensor] | None = None) -> Base:
    """The record of a network, called ``name``, that an adapter is trained on; ``source``: the weights that the network's are
    from, which can have more channels."""
    hashes = [base_hash(network, dtype) for dtype in (None, *HALF_PRECISION)]
    own, source = own_weights(network), source or {}
    if any(source[name].shape != own[name].shape for name in own.keys() & source.keys()):
        hashes += [weights_hash(source, {}, dtype) for dtype in (None, *HALF_PRECISION)]
    return {"name": name, "network": type(network).__name__, "hashes": [*dict.fromkeys(hashes)]}


def layer_of(name: str) -> str:
    """The layer that a weight of an adapter belongs to."""
    parts = name.split(".")
    return ".".join(parts[: next(number for number, part in enumerate(parts) if part.startswith(ADAPTER_WEIGHTS))])


def adapted_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers of a network with their names."""
    return ((name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer))
