"""Files of adapters in diffusers' format.

A file ``pytorch_lora_weights.safetensors`` holds the matrices of every adapted layer by the layer's name. Its metadata say how
they are scaled, which base they belong to, and how they were trained.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, cast

import peft
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from huggingface_hub import hf_hub_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from pydantic import FiniteFloat, PositiveInt
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from typing_extensions import TypedDict

from ldm.errors import LdmError, UsageError
from ldm.files import atomic_file, check_type, parse_json, require_version, write_json
from ldm.models.adapters import ADAPTER_WEIGHTS, Base, adaptable, adaptable_layers, base_hash, is_adapter_weight, layer_of
from ldm.models.directories import is_hub_name, loading
from ldm.models.fingerprint import HALF_PRECISION

#: of the file in an adapter's directory
ADAPTER_NAME = LORA_WEIGHT_NAME_SAFE
#: of the denoiser's layers among the names in a file, as diffusers has it
PREFIX = "transformer."
RECORD, RECORD_VERSION = "ldm", 1
NEAR_NAMES = 3
# what the names in a file tell: how it was trained, and which program wrote it; the first that is found counts
METHODS = {"magnitude": "DoRA", "dora_scale": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "lora_": "LoRA"}
FORMATS = {PREFIX: "diffusers", "unet.": "diffusers, of a U-Net", ("lora_", "lycoris_"): "kohya", "base_model.": "peft"}
# peft's configs by the beginnings of their weights' names
KINDS = dict(zip(ADAPTER_WEIGHTS, (peft.LoraConfig, peft.LoKrConfig, peft.LoHaConfig), strict=True))
# metadata of other programs that say what a file is
SAID = ("ss_base", "ss_network", "ss_sd_model", "ss_steps", "ss_output", "modelspec.")
MAX_METADATA = 2**22  # characters


class Record(TypedDict):
    """What ldm writes about an adapter into the metadata of its file."""

    format_version: int
    base: Base
    trigger_words: list[str]
    training: dict[str, Any]


class _Scales(TypedDict):
    """What is read of peft's config of LoRA; ranks are those of the matrices."""

    lora_alpha: NotRequired[FiniteFloat | int]
    alpha_pattern: NotRequired[dict[str, FiniteFloat | int] | None]
    use_rslora: NotRequired[bool]


class _LycorisScales(TypedDict):
    """The same of LoKr and LoHa; the rank of LoKr's matrices does not follow from them where they are whole."""

    r: PositiveInt
    alpha: FiniteFloat | int
    alpha_pattern: NotRequired[dict[str, FiniteFloat | int]]
    rank_pattern: NotRequired[dict[str, PositiveInt]]
    decompose_both: NotRequired[bool]
    decompose_factor: NotRequired[int]


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
        for name, tensor in tensors.items():
            if not (tensor.is_floating_point() and tensor.float().isfinite().all()):
                what = "numbers that are not finite" if tensor.is_floating_point() else "integers"
                raise UsageError(f"{where}: {name} holds {what}; give a whole file")
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        record = _read_record(metadata, str(where))
        return cls(str(where), path, tensors, _config(tensors, metadata, str(where)), record, metadata)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that it adapts."""
        return sorted({layer_of(name) for name in self.tensors})

    @property
    def method(self) -> str:
        """LoRA, DoRA, LoKr or LoHa."""
        return next(kind for part, kind in METHODS.items() if any(part in name for name in self.tensors))

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        config: Any = self.config
        return max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r

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
        weight, found = cast(Tensor, layer.weight), self._shape_of(name)
        if found is None:
            raise UsageError(f"{self.source} does not hold matrices that fit together for the layer {name}; give a whole file")
        if found != tuple(weight.shape):
            raise UsageError(
                f"{self.source} adapts a layer {name} of {found}, which is {tuple(weight.shape)} in this model; give an "
                "adapter of this model"
            )

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of what the matrices of a layer add to its weight; None where they are no whole set."""

        def product(left: str, right: str) -> tuple[int, ...] | None:
            shapes = [self.tensors[f"{name}.{each}"].shape for each in (left, right) if f"{name}.{each}" in self.tensors]
            fitting = len(shapes) == 2 and all(len(shape) > 1 for shape in shapes) and shapes[0][1] == shapes[1][0]
            return (shapes[0][0], *shapes[1][1:]) if fitting else None

        if self.method == "LoHa":
            factors = product("hada_w1_a", "hada_w1_b"), product("hada_w2_a", "hada_w2_b")
            return factors[0] if factors[0] == factors[1] else None
        if self.method == "LoKr":
            whole = {number: self.tensors.get(f"{name}.lokr_w{number}") for number in (1, 2)}
            shapes = [product(f"lokr_w{n}_a", f"lokr_w{n}_b") if w is None else tuple(w.shape) for n, w in whole.items()]
            sizes = [shape for shape in shapes if shape is not None and len(shape) == 2]
            return (sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1]) if len(sizes) == 2 else None
        return product("lora_B.weight", "lora_A.weight")


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
    file cannot ask for matrices that it does not hold."""
    kinds = [kind for part, kind in KINDS.items() if any(f".{part}" in name for name in tensors)]
    if len(kinds) != 1:
        raise UsageError(f"{source} holds matrices of LoRA and of another method; give the file of one adapter")
    kind, given = kinds[0], None
    if LORA_ADAPTER_METADATA_KEY in metadata:
        text = metadata[LORA_ADAPTER_METADATA_KEY]
        content = parse_json(text.encode(), f"{source}: {LORA_ADAPTER_METADATA_KEY}", dict)
        given = {name.removeprefix(PREFIX): value for name, value in content.items() if name.startswith(PREFIX)}
        expected = peft.PeftType(kind().peft_type)
        said = given.get("peft_type", expected)
        if said != expected:
            raise UsageError(f"{source} is an adapter of the method {said}, and holds matrices of {expected.value}; restore it")
    return _lora_config(tensors, given, source) if kind is peft.LoraConfig else _lycoris_config(tensors, given, kind, source)


def _read_as(kind: type, given: Mapping[str, Any], source: str) -> dict[str, Any]:
    read = check_type({key: given[key] for key in kind.__annotations__ if key in given}, source, kind)
    return {name: value for name, value in read.items() if value is not None}


def _lora_config(tensors: Mapping[str, Tensor], given: Mapping[str, Any] | None, source: str) -> peft.LoraConfig:
    """Without metadata the scale is 1, as diffusers has it."""
    ranks = {layer_of(name): len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
    if not ranks:
        raise UsageError(f"{source} holds no matrices of LoRA; give the file of an adapter")
    rank = Counter(ranks.values()).most_common(1)[0][0]
    own = {f"^{name}$": each for name, each in ranks.items() if each != rank}
    scales = {"lora_alpha": rank, "alpha_pattern": dict(own)} if given is None else _read_as(_Scales, given, source)
    return peft.LoraConfig(
        r=rank,
        rank_pattern=own,
        target_modules=sorted(ranks),
        use_dora=any("lora_magnitude_vector" in name for name in tensors),
        lora_bias=any(name.endswith(".lora_B.bias") for name in tensors),
        **scales,
    )


def _lycoris_config(tensors: Mapping[str, Tensor], given: Mapping[str, Any] | None, kind: Any, source: str) -> peft.PeftConfig:
    if given is None:
        raise UsageError(
            f"{source} does not say how its matrices are scaled; give a file whose metadata hold {LORA_ADAPTER_METADATA_KEY}, "
            "as diffusers and ldm write it"
        )
    read = _read_as(_LycorisScales, given, source)
    if kind is peft.LoHaConfig:
        if (most := max(max(tensor.shape, default=0) for tensor in tensors.values())) < read["r"]:
            raise UsageError(f"{source} says that its rank is {read['r']}, and holds no matrix above {most}; give a whole file")
        read = {name: value for name, value in read.items() if not name.startswith("decompose")}
    return kind(target_modules=sorted({layer_of(name) for name in tensors}), **read)


def add_to(network: nn.Module, adapter: AdapterFile, name: str, pipeline: Any = None) -> None:
    """Add an adapter that fits to a network, called ``name``, and activate it. ``pipeline``: whose offloading is respected.

    Raises UsageError beside an adapter of another kind: peft's layers of LoRA, LoKr and LoHa do not go together.
    """
    kind = adapter.config.peft_type
    for other in getattr(network, "peft_config", {}).values():
        if other.peft_type != kind:
            raise UsageError(
                f"{adapter.source} is of {adapter.method}, which cannot be used beside an adapter of {other.peft_type.value}; "
                "merge one of them into the model first (ldm adapter merge)"
            )
    metadata = {f"{PREFIX}{key}": value for key, value in plain(adapter.config).items()}
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in adapter.tensors.items()}
    with loading(f"{adapter.source} cannot be added to the model", "give a whole file"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multiple adapters.*")  # as it is meant
        if kind == peft.PeftType.LOHA:  # which diffusers does not load
            if hasattr(network, "_hf_hook"):
                raise UsageError("add an adapter of LoHa before enable_model_cpu_offload")
            adaptable(network).add_adapter(adapter.config, name)
            set_peft_model_state_dict(network, dict(adapter.tensors), name)
        else:
            adaptable(network).load_lora_adapter(tensors, adapter_name=name, metadata=metadata, _pipeline=pipeline)


def merge_into(network: nn.Module, adapters: Sequence[tuple[AdapterFile, float]]) -> None:
    """Add adapters that fit, each with its weight, to a network's own weights.

    Raises UsageError for DoRA beside another adapter: it scales the weights that it finds, so that the order would count.
    """
    scaling = [adapter.source for adapter, _ in adapters if adapter.method == "DoRA"]
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


def plain(config: peft.PeftConfig) -> dict[str, Any]:
    """peft's config as JSON has it, the same for the same adapter: peft keeps names in sets, which have no order."""
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return {name: value.value if isinstance(value, peft.PeftType) else value for name, value in values.items()}


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
    algorithm = config.peft_type.value.lower()
    alpha = config.lora_alpha if algorithm == "lora" else config.alpha
    size = {"ss_network_dim": str(config.r), "ss_network_alpha": str(alpha)}
    if record is None:
        return size
    training, words = record["training"], record["trigger_words"]
    values = {
        **size,
        "ss_network_module": "networks.lora" if algorithm == "lora" else "lycoris.kohya",
        "ss_network_args": None if algorithm == "lora" else json.dumps({"algo": algorithm}),
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
        "modelspec.architecture": f"{record['base']['network']}/{algorithm}",
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
        for ending in (".lora_A.weight", ".lora_down.weight", ".hada_w1_b", ".lokr_w2_b")
        if name.endswith(ending) and shape
    }
    parts = [re.split(r"\.(?:lora|lokr|hada)_", name) for name in shapes]
    kinds = [kind for part, kind in METHODS.items() if any(part in name for name in shapes)]
    formats = [kind for start, kind in FORMATS.items() if any(name.startswith(start) for name in shapes)]
    described: dict[str, Any] = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "format": formats[0] if formats else "unknown",
        "method": kinds[0] if kinds else "unknown",
        "layers": len({part[0] for part in parts if len(part) > 1}),
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
