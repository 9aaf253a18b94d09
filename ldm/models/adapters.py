"""Low-rank adapters of a denoiser (Hu et al. 2021, arXiv 2106.09685) by peft, and their files in diffusers' format.

A file ``pytorch_lora_weights.safetensors`` holds the matrices of every adapted layer by the layer's name. Its metadata say how
they are scaled, which base they belong to, and how they were trained.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, cast

import peft
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.peft import PeftAdapterMixin
from huggingface_hub import hf_hub_download
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from pydantic import FiniteFloat
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from typing_extensions import TypedDict

from ldm.errors import LdmError, UsageError
from ldm.files import atomic_file, check_type, parse_json, require_version, write_json
from ldm.models.directories import is_hub_name, loading
from ldm.models.fingerprint import HALF_PRECISION, weights_hash

#: of the file in an adapter's directory
ADAPTER_NAME = LORA_WEIGHT_NAME_SAFE
#: of the denoiser's layers among the names in a file, as diffusers has it
PREFIX = "transformer."
RECORD, RECORD_VERSION = "ldm", 1
#: beginnings of the names of peft's own weights
ADAPTER_WEIGHTS = ("lora_",)
#: layers that can be adapted
LAYERS = (nn.Linear, nn.Conv2d)
NEAR_NAMES = 3
# what the names in a file tell: how it was trained, and which program wrote it; the first that is found counts
METHODS = {"magnitude": "DoRA", "dora_scale": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "lora_": "LoRA"}
FORMATS = {PREFIX: "diffusers", "unet.": "diffusers, of a U-Net", ("lora_", "lycoris_"): "kohya", "base_model.": "peft"}
# metadata of other programs that say what a file is
SAID = ("ss_base", "ss_network", "ss_sd_model", "ss_steps", "ss_output", "modelspec.")
MAX_METADATA = 2**22  # characters


class Base(TypedDict):
    """The network that an adapter was trained on: its name, its class, and sha256 of its weights in float32 and as they are
    when rounded to float16 and bfloat16."""

    name: str
    network: str
    hashes: list[str]


class Record(TypedDict):
    """What ldm writes about an adapter into the metadata of its file."""

    format_version: int
    base: Base
    trigger_words: list[str]
    training: dict[str, Any]


class _Config(TypedDict):
    """What is read of peft's config; ranks are those of the matrices."""

    peft_type: NotRequired[str]
    lora_alpha: NotRequired[FiniteFloat | int]
    alpha_pattern: NotRequired[dict[str, FiniteFloat | int] | None]
    use_rslora: NotRequired[bool]


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


def plain(config: peft.PeftConfig) -> dict[str, Any]:
    """peft's config as JSON has it, the same for the same adapter: peft keeps names in sets, which have no order."""
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return {name: value.value if isinstance(value, peft.PeftType) else value for name, value in values.items()}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as its file holds it.

    Attributes:
        source: where it is from, for messages.
        path: of the file.
        tensors: by name, without :data:`PREFIX`.
        config: peft's, of these tensors.
        record: ldm's own; None for the file of another program.
        metadata: all of the file's.
    """

    source: str
    path: Path
    tensors: Mapping[str, Tensor]
    config: peft.PeftConfig
    record: Record | None
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, where: str | os.PathLike, file_name: str | None = None) -> AdapterFile:
        """The adapter that ``where`` names, as :func:`adapter_path` says. Raises :class:`LdmError` for anything else."""
        path = adapter_path(where, file_name)
        with (
            loading(f"{where} cannot be read as an adapter", "give a whole .safetensors file"),
            safe_open(path, "pt", backend="pread") as file,
        ):
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        foreign = [name for name in tensors if not name.startswith(PREFIX) or not is_adapter_weight(name)]
        if foreign or not tensors:
            raise UsageError(
                f"{where} holds {foreign[0] if foreign else 'nothing'}, which is no weight of a denoiser's adapter; give a "
                f"file in diffusers' format, whose names begin with {PREFIX}"
            )
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        record = _read_record(metadata, str(where))
        return cls(str(where), path, tensors, _config(tensors, metadata, str(where)), record, metadata)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that it adapts."""
        return sorted({layer_of(name) for name in self.tensors})

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(len(tensor) for name, tensor in self.tensors.items() if name.endswith(".lora_A.weight"))

    @property
    def trigger_words(self) -> list[str]:
        return self.record["trigger_words"] if self.record else []

    def require_fits(self, network: nn.Module, force: bool = False) -> None:
        """Raise :class:`UsageError` for an adapter of another architecture and, unless ``force``, of another base."""
        layers = adaptable_layers(network)
        for name in self.layers:
            if name not in layers:
                near = ", ".join(difflib.get_close_matches(name, layers, NEAR_NAMES)) or "none like it"
                raise UsageError(
                    f"{self.source} adapts the layer {name}, which this {type(network).__name__} does not have (it has {near});"
                    " give an adapter of this model"
                )
            self._require_shapes(name, layers[name])
        if self.record is None or force:
            return
        base, found = self.record["base"], base_hash(network)
        if found not in base["hashes"] and not any(base_hash(network, dtype) in base["hashes"] for dtype in HALF_PRECISION):
            raise UsageError(
                f"{self.source} was trained on {base['name']} {base['hashes'][0][:12]}, and this model's denoiser is "
                f"{found[:12]}; give it to the model that it was trained on, or force it"
            )

    def _require_shapes(self, name: str, layer: nn.Module) -> None:
        weight = cast(Tensor, layer.weight)
        a, b = (self.tensors.get(f"{name}.lora_{which}.weight") for which in "AB")
        if a is None or b is None or a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1]:
            raise UsageError(f"{self.source} does not hold two matrices of one rank for the layer {name}; give a whole file")
        if (b.shape[0], *a.shape[1:]) != tuple(weight.shape):
            raise UsageError(
                f"{self.source} adapts a layer {name} of {(b.shape[0], *a.shape[1:])}, which is {tuple(weight.shape)} in this "
                "model; give an adapter of this model"
            )


def layer_of(name: str) -> str:
    """The layer that a weight of an adapter belongs to."""
    parts = name.split(".")
    return ".".join(parts[: next(number for number, part in enumerate(parts) if part.startswith(ADAPTER_WEIGHTS))])


def adapter_path(where: str | os.PathLike, file_name: str | None = None) -> Path:
    """The file that ``where`` names: itself, one of a directory, or one downloaded from the hub; ``file_name``: in these."""
    if is_hub_name(str(where)):
        with loading(
            f"{where} is no file here, and cannot be downloaded from the Hugging Face hub", "give a file, or a name there"
        ):
            return Path(hf_hub_download(str(where), file_name or ADAPTER_NAME))
    path = Path(where) if file_name is None else Path(where) / file_name
    if path.is_dir():
        found = [path / ADAPTER_NAME] if (path / ADAPTER_NAME).exists() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise UsageError(f"{where} holds {len(found)} .safetensors files; give the file of one adapter")
        path = found[0]
    if not path.is_file():
        raise UsageError(f"{where} is no file of an adapter; give a .safetensors file, or the directory that fit exported")
    return path


def _read_record(metadata: Mapping[str, str], source: str) -> Record | None:
    text = metadata.get(RECORD)
    if text is None:
        return None
    if len(text) > MAX_METADATA:
        raise LdmError(f"{source}: its metadata are {len(text)} characters long; restore it")
    content = parse_json(text.encode(), f"{source}: its metadata", dict)
    require_version(content.get("format_version"), RECORD_VERSION, f"{source}: the adapter")
    return check_type(content, f"{source}: its metadata", Record)


def _config(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> peft.PeftConfig:
    """peft's config. How the product is scaled is read from the metadata; the rest follows from the tensors, so that a broken
    file cannot ask for matrices that it does not hold. Without metadata the scale is 1, as diffusers has it."""
    ranks = {layer_of(name): len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
    if not ranks:
        raise UsageError(f"{source} holds no matrices of LoRA; give the file of an adapter")
    rank = Counter(ranks.values()).most_common(1)[0][0]
    own = {f"^{name}$": each for name, each in ranks.items() if each != rank}
    scales: Any = {"lora_alpha": rank, "alpha_pattern": dict(own)}
    if LORA_ADAPTER_METADATA_KEY in metadata:
        text = metadata[LORA_ADAPTER_METADATA_KEY]
        given = parse_json(text.encode(), f"{source}: {LORA_ADAPTER_METADATA_KEY}", dict)
        stripped = {name.removeprefix(PREFIX): value for name, value in given.items() if name.startswith(PREFIX)}
        read = check_type({key: stripped[key] for key in _Config.__annotations__ if key in stripped}, source, _Config)
        if read.get("peft_type", "LORA") != "LORA":
            raise UsageError(f"{source} is an adapter of the method {read.get('peft_type')}; give one of LoRA or DoRA")
        scales = {name: value for name, value in read.items() if name != "peft_type" and value is not None}
    return peft.LoraConfig(
        r=rank,
        rank_pattern=own,
        target_modules=sorted(ranks),
        use_dora=any("lora_magnitude_vector" in name for name in tensors),
        lora_bias=any(name.endswith(".lora_B.bias") for name in tensors),
        **scales,
    )


def add_to(network: nn.Module, adapter: AdapterFile, name: str, pipeline: Any = None) -> None:
    """Add an adapter that fits to a network, called ``name``, and activate it. ``pipeline``: whose offloading is respected."""
    metadata = {f"{PREFIX}{key}": value for key, value in plain(adapter.config).items()}
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in adapter.tensors.items()}
    with loading(f"{adapter.source} cannot be added to the model", "give a whole file"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multiple adapters.*")  # as it is meant
        adaptable(network).load_lora_adapter(tensors, adapter_name=name, metadata=metadata, _pipeline=pipeline)


def merge_into(network: nn.Module, adapters: Sequence[tuple[AdapterFile, float]]) -> None:
    """Add adapters that fit, each with its weight, to a network's own weights.

    Raises UsageError for DoRA beside another adapter: it scales the weights that it finds, so that the order would count.
    """
    scaling = [adapter.source for adapter, _ in adapters if cast(peft.LoraConfig, adapter.config).use_dora]
    if scaling and len(adapters) > 1:
        raise UsageError(f"{scaling[0]} is of DoRA, which cannot be merged together with others; merge it alone")
    names = [f"merged_{number}" for number in range(len(adapters))]
    for name, (adapter, _) in zip(names, adapters, strict=True):
        add_to(network, adapter, name)
    adapted = adaptable(network)
    adapted.set_adapters(names, [weight for _, weight in adapters])
    sources = ", ".join(adapter.source for adapter, _ in adapters)
    with loading(f"{sources} cannot be merged", "give whole files"):
        adapted.fuse_lora(safe_fusing=True)
    adapted.unload_lora()


def adapted_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers of a network with their names."""
    return ((name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer))


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: peft.PeftConfig,
    record: Record | None,
    others: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter's file into ``folder``; equal input gives equal bytes.

    Args:
        tensors: without :data:`PREFIX`.
        record: None for an adapter that another program has trained.
        others: further metadata, such as those of the file that it was made from.
    """
    metadata = {
        **(others or {}),
        **_shown_elsewhere(config, record),
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(
            {f"{PREFIX}{key}": value for key, value in plain(config).items()}, sort_keys=True
        ),
        **({} if record is None else {RECORD: json.dumps(record, sort_keys=True)}),
    }
    named = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    with atomic_file(folder / ADAPTER_NAME) as file:
        file.write(_in_order(save(named, metadata)))


def write_for_peft(folder: Path, tensors: Mapping[str, Tensor], config: peft.PeftConfig) -> None:
    """Write the same as :func:`write_adapter` for ``peft.PeftModel.from_pretrained(pipeline.transformer, folder)``: networks of
    diffusers that have no methods for adapters, such as PixArt's, take them from peft alone."""
    folder.mkdir()
    named = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    with atomic_file(folder / SAFETENSORS_WEIGHTS_NAME) as file:
        file.write(save(named, {"format": "pt"}))
    write_json(folder / CONFIG_NAME, plain(config))


def _shown_elsewhere(config: Any, record: Record | None) -> dict[str, str]:
    """Metadata that A1111, ComfyUI and image sites show: kohya's, and those of the model specification of Stability AI."""
    size = {"ss_network_dim": str(config.r), "ss_network_alpha": str(config.lora_alpha)}
    if record is None:
        return size
    training, words = record["training"], record["trigger_words"]
    values = {
        **size,
        "ss_network_module": "networks.lora",
        "ss_sd_model_name": record["base"]["name"],
        "ss_new_sd_model_hash": record["base"]["hashes"][0],
        "ss_steps": training.get("steps"),
        "ss_learning_rate": training.get("learning_rate"),
        "ss_lr_scheduler": training.get("schedule"),
        "ss_optimizer": training.get("optimiser"),
        "ss_max_grad_norm": training.get("max_grad_norm"),
        "ss_seed": training.get("seed"),
        "ss_tag_frequency": json.dumps({"trigger words": dict.fromkeys(words, 1)}) if words else None,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{record['base']['network']}/lora",
        "modelspec.trigger_phrase": ", ".join(words) or None,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def describe(where: str | os.PathLike) -> dict[str, Any]:
    """What a file says of itself, in plain values, also where another program made it for another model.

    Raises :class:`LdmError` for what is no file of tensors.
    """
    path = adapter_path(where)
    with loading(f"{where} cannot be read as an adapter", "give a whole .safetensors file"), safe_open(path, "pt") as file:
        metadata = dict(sorted((file.metadata() or {}).items()))
        shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
        dtypes = sorted({str(file.get_slice(name).get_dtype()) for name in shapes})
    ranks = {
        name.removesuffix(ending): shape[0]
        for name, shape in shapes.items()
        for ending in (".lora_A.weight", ".lora_down.weight")
        if name.endswith(ending) and shape
    }
    kinds = [kind for part, kind in METHODS.items() if any(part in name for name in shapes)]
    formats = [kind for start, kind in FORMATS.items() if any(name.startswith(start) for name in shapes)]
    described: dict[str, Any] = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "format": formats[0] if formats else "unknown",
        "method": kinds[0] if kinds else "unknown",
        "layers": len(ranks),
        "rank": sorted({*ranks.values()}),
        "weights": sum(math.prod(shape) for shape in shapes.values()),
        "dtype": dtypes,
    }
    try:
        record = AdapterFile.read(where).record
        described["opens here"] = "yes" if record else "yes, where the layers fit: it does not say its base"
    except LdmError as error:
        record = None
        described["opens here"] = f"no: {error}"
    if record is not None:
        base = record["base"]
        described["base"] = {"name": base["name"], "network": base["network"], "weights": base["hashes"][0][:12]}
        described["trigger words"], described["training"] = record["trigger_words"], record["training"]
    else:
        described["says"] = {name: value[:80] for name, value in metadata.items() if name.startswith(SAID)}
    return described | {"metadata": metadata, "ranks": ranks}


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted; the library writes them in an order of chance."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[end:]
