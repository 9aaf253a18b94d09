"""The frozen weights beside an adapter in fewer bytes: bfloat16, or 8-bit integers by torchao.

Weights that are not trained need no more precision than the products that they are in: under ``bf16-mixed`` a bfloat16 copy
gives the same results, bit for bit, in half of the memory. Integers with a scale for each row of a matrix take a quarter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ldm.errors import UsageError, first_line
from ldm.models.adapters import is_adapter_weight

BasePrecision = Literal["bf16", "int8"]


class _StoredLinear(nn.Linear):
    """A linear layer whose weight is stored with another type than it computes with."""

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        weight = self.weight.to(dtype) if self.weight.dtype is torch.bfloat16 else self.weight  # torchao converts its own
        return F.linear(input.to(dtype), weight, None if self.bias is None else self.bias.to(dtype))


def frozen_layers(blocks: Iterable[nn.Module]) -> Iterator[nn.Linear]:
    """The linear layers of transformer blocks that are the base's own."""
    for block in blocks:
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and not is_adapter_weight(name):
                yield layer


def store(blocks: Iterable[nn.Module], precision: BasePrecision) -> None:
    """Store the weights of the blocks' own linear layers with this precision. Biases, norms and tables stay in fp32.

    Raises :class:`UsageError` for int8 without torchao.
    """
    for layer in frozen_layers(blocks):
        if precision == "bf16":
            layer.weight = nn.Parameter(layer.weight.detach().bfloat16(), requires_grad=False)
        else:
            _to_int8(layer)
        layer.__class__ = _StoredLinear


def _to_int8(layer: nn.Linear) -> None:
    try:
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]  not in dev
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError as error:
        raise UsageError(f"base_precision int8 needs torchao ({first_line(error)}): pip install 'ldm[int8]'") from error
    quantize_(layer, Int8WeightOnlyConfig(), filter_fn=lambda module, _: module is layer)


def plain_tensors(weight: Tensor) -> list[Tensor]:
    """The tensors that a weight is made of: itself, or torchao's integers and scales."""
    if is_traceable_wrapper_subclass(weight):
        return [part for name in weight.__tensor_flatten__()[0] for part in plain_tensors(getattr(weight, name))]
    return [weight]


def stored_bytes(weight: Tensor) -> int:
    """Bytes that a weight takes."""
    return sum(part.numel() * part.element_size() for part in plain_tensors(weight))
