"""Adapters out of weights: the low-rank part of what two networks differ by, and an adapter of less rank.

Both cut a singular value decomposition off, which of all matrices of that rank leaves the least squared error (Eckart & Young
1936).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import peft
import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.models.adapter_file import AdapterFile
from ldm.models.adapters import adaptable_layers, layer_of


@dataclass(frozen=True)
class LowRank:
    """Matrices of a rank for every layer, whose product is what is added to its weight: their scale is 1.

    Attributes:
        tensors: by name, as in :class:`ldm.models.adapter_file.AdapterFile`.
        rank: the largest of all layers.
        kept: share of the squared change of the weights that is in the matrices, 0 to 1.
        left_out: weights that differ and cannot be in an adapter, with the norm of their change over their own.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    kept: float
    left_out: Mapping[str, float]

    @property
    def config(self) -> peft.LoraConfig:
        """peft's, of these tensors."""
        ranks = {layer_of(name): len(tensor) for name, tensor in self.tensors.items() if name.endswith(".lora_A.weight")}
        own = {f"^{name}$": rank for name, rank in ranks.items() if rank != self.rank}
        has_bias = any(name.endswith(".lora_B.bias") for name in self.tensors)
        settings: Any = {"rank_pattern": own, "alpha_pattern": dict(own), "lora_bias": has_bias}
        return peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=sorted(ranks), **settings)


class _Sums:
    """The matrices so far, and the squared change that is in them and that there is."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.rank, self.inside, self.total = 0, 0.0, 0.0
        self.left_out: dict[str, float] = {}

    def add(self, name: str, b: Tensor, sizes: Tensor, a: Tensor, rank: int) -> None:
        """The first ``rank`` singular vectors b (out, r), a (r, in, …) of a layer, and singular values (r,) in equal parts."""
        self.total += float(sizes.square().sum())
        sizes = sizes[: min(rank, max(1, int(sizes.count_nonzero())))]
        self.inside += float(sizes.square().sum())
        number, root = len(sizes), sizes.sqrt()
        tail = (1,) * (a.ndim - 2)  # of a convolution
        self.tensors[f"{name}.lora_A.weight"] = (root.view(-1, 1, *tail) * a[:number]).float().contiguous()
        self.tensors[f"{name}.lora_B.weight"] = (b[:, :number] * root).view(len(b), number, *tail).float().contiguous()
        self.rank = max(self.rank, number)

    def result(self) -> LowRank:
        return LowRank(self.tensors, self.rank, self.inside / self.total if self.total else 1.0, self.left_out)


@torch.no_grad()
def difference(tuned: nn.Module, base: nn.Module, rank: int, progress: Callable[[int], object] = lambda done: None) -> LowRank:
    """What ``tuned`` has more than ``base``, of one architecture, as an adapter of at most this rank for each layer.

    ``progress`` is called with the number of weights that are done.

    Raises UsageError for networks that differ in more than their weights, or do not differ in any layer that can be adapted.
    """
    ours, theirs = dict(base.named_parameters()), dict(tuned.named_parameters())
    for name in dict.fromkeys([*ours, *theirs]):
        shapes = [tuple(weights[name].shape) if name in weights else "none" for weights in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"the models are of different architectures ({name}: {shapes[0]} in the tuned one, {shapes[1]} in the base); "
                "give a model that was trained from the base"
            )
    layers, sums = adaptable_layers(base), _Sums()
    for number, (name, own) in enumerate(ours.items()):
        progress(number)
        change = theirs[name].double() - own.double()
        if not change.any():
            continue
        layer, _, which = name.rpartition(".")
        if layer not in layers or which != "weight":
            sums.total += float(change.square().sum())
            sums.left_out[name] = float(change.norm() / own.double().norm().clamp(min=1e-12))
            continue
        u, sizes, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
        sums.add(layer, u, sizes, v.view(-1, *change.shape[1:]), rank)
    if not sums.tensors:
        raise UsageError("the models have the same weights in every layer that an adapter can be of; give two that differ")
    return sums.result()


@torch.no_grad()
def resized(adapter: AdapterFile, rank: int) -> LowRank:
    """The same adapter with at most this rank for each layer.

    Raises UsageError where no layer has more, and for other methods than LoRA, which do not add a product of two matrices.
    """
    config = cast(peft.LoraConfig, adapter.config)
    if adapter.method != "LoRA":
        raise UsageError(f"{adapter.source} is of {adapter.method}; only LoRA can be resized")
    factors = {
        name: (adapter.tensors[f"{name}.lora_A.weight"], adapter.tensors[f"{name}.lora_B.weight"]) for name in adapter.layers
    }
    if rank >= (most := max(len(a) for a, _ in factors.values())):
        raise UsageError(f"{adapter.source} has rank {most}; give a rank below it, not {rank}")
    sums = _Sums()
    for name, (a, b) in factors.items():
        scale = scale_of(config, name, len(a))
        # of b·a without that product: (out, r) and (r, in) are thin
        q_b, r_b = torch.linalg.qr(scale * b.double().flatten(1))
        q_a, r_a = torch.linalg.qr(a.double().flatten(1).T)
        u, sizes, v = torch.linalg.svd(r_b @ r_a.T)
        sums.add(name, q_b @ u, sizes, (v @ q_a.T).view(-1, *a.shape[1:]), rank)
        if (bias := adapter.tensors.get(f"{name}.lora_B.bias")) is not None:
            sums.tensors[f"{name}.lora_B.bias"] = scale * bias.float()
    return sums.result()


def scale_of(config: peft.LoraConfig, layer: str, rank: int) -> float:
    """What the product of a layer's matrices is multiplied by."""
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key([*patterns], layer), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)
