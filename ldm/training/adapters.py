"""Training a low-rank adapter beside a frozen denoiser, by peft: LoRA and its relatives.

The weight W of an adapted layer becomes W + s·B·A with B (out, r) and A (r, in), which alone are trained: a file of a few
megabytes. The denoiser itself stays as it is; where a method begins with B·A ≠ 0, a second, frozen adapter takes that away.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any, Literal, cast

import peft
import torch
import torch.distributed as dist
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.models.adapter_file import NEAR_NAMES, RECORD_VERSION, Record
from ldm.models.adapters import Base, adaptable, adaptable_layers, adapted_layers, base_of, is_adapter_weight
from ldm.models.dit import transformer_blocks
from ldm.training.frozen_base import BasePrecision, store

# names of the trained adapter, and of the frozen one that takes away what it begins with
TRAINED, START = "default", "start"
# initialisations in which B·A is not zero at first
BEGIN_WITH = ("pissa", "lora_ga")
# methods of LyCORIS, which have other matrices than A and B
LYCORIS = ("lokr", "loha")
# settings that a resumed run may change: the weights mean the same
OF_TRAINING = ("dropout", "loraplus_lr_ratio")
# LoRA-GA: samples whose gradient it begins along, and γ of its size (Wang et al. 2024, section 3.3)
GRADIENT_SAMPLES, GAMMA = 64, 16


@dataclass
class AdapterConfig:
    """A low-rank adapter, the only weights that are trained: W + s·B·A (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        rank: r, of the matrices; more learns more, and makes the file larger.
        alpha: the scale s is alpha / rank (default: rank, for a scale of 1).
        rank_stabilised: the scale is alpha / √rank, which keeps the size of updates the same at every rank (rsLoRA,
            Kalajdzievski 2023, arXiv 2312.03732).
        method: ``lora``; ``dora`` also trains the length of every row of the weight (Liu et al. 2024, arXiv 2402.09353),
            which costs time in every step. In the place of B·A, ``loha`` has the elementwise product of two such products, of
            rank r² (Hyeon-Woo et al. 2022, arXiv 2108.06098), and ``lokr`` a Kronecker product of a small matrix and one of
            rank r, with the fewest weights (Yeh et al. 2024, arXiv 2309.14859).
        lokr_factor: rows and columns of LoKr's small matrix, where they divide the layer's; fewer make the file larger
            (default: as many as make both matrices about equally large).
        init: of A and B. ``default`` and ``gaussian``: A is random (uniform; normal of deviation 1 / rank) and B zero.
            ``orthogonal``: both are random, with orthogonal rows, so that B·A is zero; the rank is even. ``pissa``: B·A is
            the largest singular components of W, and the layer begins with W all the same (Meng et al. 2024, arXiv
            2404.02948); its file has twice the rank, because it says what to take from W, too. ``lora_ga``: the same, but
            A and B are singular vectors of the loss's gradient with respect to W over 64 training samples, spread over the
            data, so that the first step goes nearly where training all of W would (Wang et al. 2024, arXiv 2407.05000).
        loraplus_lr_ratio: learning rate of B over that of A, which is the optimiser's (LoRA+, Hayou et al. 2024, arXiv
            2402.12354): 4 to 16, with AdamW; None: the same for both.
        dropout: of the adapter's inputs.
        base_precision: of the base's matrices in the blocks, which are not trained: ``bf16`` halves their memory, and gives the
            same results under ``precision: bf16-mixed``, but for DoRA, which also takes their lengths; ``int8`` takes a
            quarter, by torchao, and rounds them to 1/127 of the largest of each row (default: fp32).
        target_modules: layers to adapt, by name; ``*`` stands for anything: ``blocks.*.attention.to_*``; the end of a name
            suffices: ``to_q`` (default: all linear layers of the transformer blocks).
        trigger_words: that call up what is trained; kept in the file, for its users (default: the data's default caption).
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilised: bool = False
    method: Literal["lora", "dora", "lokr", "loha"] = "lora"
    lokr_factor: int | None = None
    init: Literal["default", "gaussian", "orthogonal", "pissa", "lora_ga"] = "default"
    loraplus_lr_ratio: float | None = None
    dropout: float = 0.0
    base_precision: BasePrecision | None = None
    target_modules: list[str] | None = None
    trigger_words: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"the adapter's rank is {self.rank}; give 1 or more")
        if not math.isfinite(self.scaled_by) or self.scaled_by <= 0:
            raise UsageError(f"the adapter's alpha is {self.scaled_by:g}; give a number above 0")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"the adapter's dropout is {self.dropout:g}; give 0 or more and less than 1")
        if self.loraplus_lr_ratio is not None and not 0 < self.loraplus_lr_ratio < math.inf:
            raise UsageError(f"the adapter's loraplus_lr_ratio is {self.loraplus_lr_ratio:g}; give a number above 0")
        if self.init == "orthogonal" and self.rank % 2:
            raise UsageError(f"init orthogonal halves the rank, which is {self.rank}; give an even one")
        if self.init in BEGIN_WITH and self.method == "dora":
            raise UsageError(f"init {self.init} is of the method lora, and not of dora; give one or the other")
        if self.lokr_factor is not None and (self.method != "lokr" or self.lokr_factor < 1):
            raise UsageError(f"lokr_factor is {self.lokr_factor}, and the method {self.method}; give 1 or more, with lokr")
        if self.base_precision == "int8" and self.method == "dora":
            raise UsageError("base_precision int8 is not of dora, which scales the base's weights; give bf16, or lora")
        if self.method in LYCORIS:
            for name in ("rank_stabilised", "dropout", "loraplus_lr_ratio"):
                if getattr(self, name):
                    raise UsageError(f"{name} is of the methods lora and dora, and not of {self.method}; leave it out")
            if self.init != "default":
                raise UsageError(f"init {self.init} is of the methods lora and dora, and not of {self.method}; leave it out")

    @property
    def scaled_by(self) -> float:
        """alpha."""
        return self.rank if self.alpha is None else self.alpha

    def layers(self, network: nn.Module) -> list[str]:
        """Names of the layers to adapt. Raises :class:`UsageError` for a pattern that matches none, naming near ones, and for a
        layer that has no room for the rank."""
        layers = adaptable_layers(network)
        if self.target_modules is None:
            ours = {id(module) for block in transformer_blocks(network) for module in block.modules()}
            chosen = [name for name, layer in layers.items() if id(layer) in ours and isinstance(layer, nn.Linear)]
        else:
            chosen = [name for name in layers if any(_matches(name, pattern) for pattern in self.target_modules)]
        for pattern in self.target_modules or []:
            if not any(_matches(name, pattern) for name in layers):
                known = dict.fromkeys(given for name in layers for given in (name.rpartition(".")[2], name))
                near = [*dict.fromkeys([*difflib.get_close_matches(pattern, known, NEAR_NAMES), *layers])][:NEAR_NAMES]
                raise UsageError(f"target_modules {pattern} matches no layer; give names such as {', '.join(near)}, or with *")
        if not chosen:
            raise UsageError("target_modules is empty, so that nothing would be trained; leave it out, or name layers")
        convolutions = [name for name in chosen if not isinstance(layers[name], nn.Linear)]
        if convolutions and (self.init not in ("default", "gaussian") or self.method in LYCORIS):
            what = f"method {self.method}" if self.method in LYCORIS else f"init {self.init}"
            raise UsageError(
                f"{what} is for linear layers, and {convolutions[0]} is a convolution; give another, or leave the layer out of "
                "target_modules"
            )
        shapes = {name: tuple(cast(Tensor, layers[name].weight).flatten(1).shape) for name in chosen}
        narrowest = min(chosen, key=lambda name: min(shapes[name]))
        most = min(shapes[narrowest]) // (2 if self.init == "lora_ga" else 1)  # of whose directions A and B take half each
        if self.rank > most:
            raise UsageError(f"the adapter's rank is {self.rank}, and {narrowest} is {shapes[narrowest]}; give at most {most}")
        return chosen

    def peft_config(self, layers: Sequence[str], init: bool | str = True, **changed: Any) -> peft.PeftConfig:
        """peft's config of an adapter of these layers. ``init``: as peft calls it; ``changed``: other settings of LoRA's."""
        settings: dict[str, Any] = {"r": self.rank, "target_modules": sorted(layers)}
        if self.method == "lokr":
            return peft.LoKrConfig(**settings, alpha=self.scaled_by, decompose_factor=self.lokr_factor or -1)  # pyright: ignore
        if self.method == "loha":
            return peft.LoHaConfig(**settings, alpha=self.scaled_by)  # pyright: ignore
        settings |= {
            "lora_alpha": self.scaled_by,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilised,
            "use_dora": self.method == "dora",
            "init_lora_weights": init,
        }
        return peft.LoraConfig(**settings | changed)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _in_evaluation_mode(layer: nn.Module, mode: bool = True) -> nn.Module:
    """``train`` of peft's LoKr and LoHa layers, which else draw a number at every call, for a dropout of whole layers that is
    not offered here: it cuts compiled blocks into pieces."""
    return layer


class Adapter:
    """The adapter that is trained in a network, whose own weights are frozen from here on.

    Attributes:
        base: the record of the network that it is trained on.
    """

    def __init__(self, config: AdapterConfig, network: nn.Module, base_name: str, source: Mapping[str, Tensor] | None = None):
        """``source``: see :func:`ldm.models.adapters.base_of`. Raises :class:`UsageError` for a config that does not fit the
        network."""
        self.config, self.network = config, network
        self.base: Base = base_of(network, base_name, source)
        self.layers = config.layers(network)
        network.requires_grad_(False)
        own = {name: cast(Tensor, layer.weight).data for name, layer in adaptable_layers(network).items()}
        empty = [name for name in self.layers if not own[name].flatten(1).any(1).all()]
        if config.method == "dora" and empty:
            raise UsageError(f"{empty[0]} has rows of zeros, which have no direction for dora to keep; give the method lora")
        init = True if config.init in ("default", "lora_ga") else config.init
        adaptable(network).add_adapter(config.peft_config(self.layers, init), TRAINED)
        if config.init in BEGIN_WITH:
            self._take_away_the_start(own)
        if config.method in LYCORIS:
            for _, layer in adapted_layers(network):
                layer.train = MethodType(_in_evaluation_mode, layer.eval())
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(is_adapter_weight(name) and f".{START}" not in name)

    def _take_away_the_start(self, own: dict[str, Tensor]) -> None:
        """Give the base its own weights back, from which peft has taken B·A, and have a frozen adapter take it away."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*multiple adapters.*")  # as it is meant
            adaptable(self.network).add_adapter(self.config.peft_config(self.layers, lora_dropout=0.0), START)
        for name, layer in adapted_layers(self.network):
            layer.get_base_layer().weight.data = own[name]
            for factors in (layer.lora_A, layer.lora_B):
                factors[START].load_state_dict(factors[TRAINED].state_dict())
            layer.scaling[START] = -layer.scaling[START]
        adaptable(self.network).set_adapter([TRAINED, START])

    @property
    def begins_along_gradients(self) -> bool:
        """Whether :meth:`begin_along` is to be called before the first step."""
        return self.config.init == "lora_ga"

    @contextmanager
    def gradients_of_base(self) -> Iterator[dict[str, Tensor]]:
        """Within this context backward passes add up gradients of the base's adapted weights, which are given by layer."""
        weights = {name: cast(Tensor, layer.get_base_layer().weight) for name, layer in adapted_layers(self.network)}
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            yield weights
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
                weight.grad = None

    @torch.no_grad()
    def begin_along(self, gradients: Mapping[str, Tensor]) -> None:
        """Begin with the singular vectors of these gradients (out, in) by layer: A with the first r on the right, B with the
        next r on the left, each times √√out / √γ. The frozen adapter takes s·B·A away again."""
        rank = self.config.rank
        for name, layer in adapted_layers(self.network):
            u, _, v = torch.linalg.svd(gradients[name].float(), full_matrices=False)
            size = len(u) ** 0.25 / GAMMA**0.5
            for adapter in (TRAINED, START):
                layer.lora_A[adapter].weight.copy_(size * v[:rank])
                layer.lora_B[adapter].weight.copy_(size * u[:, rank : 2 * rank])
                # GPUs may round differently, and a singular vector has either sign
                if dist.is_available() and dist.is_initialized():
                    dist.broadcast(layer.lora_A[adapter].weight, 0)
                    dist.broadcast(layer.lora_B[adapter].weight, 0)

    def store_base(self) -> None:
        """Store the base as ``base_precision`` says, once the adapter has begun with it; it is not given back."""
        if self.config.base_precision is not None:
            store(transformer_blocks(self.network), self.config.base_precision)

    def exported(self) -> tuple[dict[str, Tensor], peft.PeftConfig]:
        """The adapter's weights by name, and peft's config of them, which add to the base what the network has learned."""
        trained, settings = get_peft_model_state_dict(self.network, adapter_name=TRAINED), {}
        if self.config.init in BEGIN_WITH:
            # s·(B·A − B₀·A₀) = s·[B, −B₀]·[A; A₀], of twice the rank
            start = get_peft_model_state_dict(self.network, adapter_name=START)
            for name, tensor in trained.items():
                is_a = ".lora_A." in name
                trained[name] = torch.cat([tensor, start[name] if is_a else -start[name]], dim=0 if is_a else 1)
            double = math.sqrt(2) if self.config.rank_stabilised else 2
            settings = {"r": 2 * self.config.rank, "lora_alpha": double * self.config.scaled_by}
        return trained, self.config.peft_config(self.layers, **settings)

    def settings(self) -> dict[str, Any]:
        """What the weights mean, in plain values."""
        own = asdict(self.config) | {"alpha": self.config.scaled_by, "target_modules": self.layers}
        skipped = (*OF_TRAINING, "trigger_words")
        return {name: value for name, value in own.items() if value is not None and name not in skipped}

    def summary(self) -> str:
        """A line about what is trained."""
        trained = sum(parameter.numel() for parameter in self.network.parameters() if parameter.requires_grad)
        total = sum(weight.numel() for name, weight in self.network.named_parameters() if not is_adapter_weight(name))
        return f"adapter of rank {self.config.rank} of {len(self.layers)} layers: {trained:,} weights, {trained / total:.2%}"

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the network is the base."""
        network = adaptable(self.network)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        network.disable_adapters()
        try:
            yield
        finally:
            network.enable_adapters()
            network.requires_grad_(False)  # peft turns it on for the frozen adapter, too
            for parameter in trained:
                parameter.requires_grad_(True)

    def require_same_base(self, recorded: Base | None) -> None:
        """Raise :class:`UsageError` where a checkpoint's adapter, beside the ``recorded`` weights, is beside others here."""
        if recorded is not None and recorded["hashes"][0] not in self.base["hashes"]:
            raise UsageError(
                f"the checkpoint's adapter was trained beside the weights of {recorded['name']} {recorded['hashes'][0][:12]}, "
                f"and init_from {self.base['name']} is {self.base['hashes'][0][:12]}; give the former"
            )

    def record(self, training: Mapping[str, Any], trigger_words: Sequence[str] = ()) -> Record:
        """ldm's metadata of the file. ``training``: settings by name; ``trigger_words``: that call up what is trained."""
        return {
            "format_version": RECORD_VERSION,
            "base": self.base,
            "trigger_words": [*trigger_words],
            "training": {**training, "adapter": self.settings() | {name: getattr(self.config, name) for name in OF_TRAINING}},
        }
