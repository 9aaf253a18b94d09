"""Directories of networks that others may have saved, as diffusers and transformers lay them out: their files and configs are
checked before a library reads them or builds anything from them."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import nn

from ldm.errors import LdmError, UsageError, first_line
from ldm.files import MAX_JSON_BYTES, RESTORE, open_regular, read_bytes
from ldm.terminal import printable

MAX_LAYERS = 1000
# Parts of a setting's name, and the most that it may be: a network of a million layers is built for hours before it fails.
_LIMITS = (("layer|heads", MAX_LAYERS), ("num_train_timesteps", 100_000), ("size|dim|position|width", 2**24))

log = logging.getLogger(__name__)


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of a network, tokenizer or scheduler.

    Raises :class:`LdmError`, naming file and setting, for no JSON object, and for so many layers, timesteps or features that
    building the network would take hours or all memory.
    """
    try:
        config = json.loads(read_bytes(path, MAX_JSON_BYTES, RESTORE))  # of any Python program, which may write NaN
    except (ValueError, RecursionError) as error:
        raise LdmError(f"{path} is not readable JSON ({first_line(error)}); {RESTORE}") from None
    if not isinstance(config, dict):
        raise LdmError(f"{path} is no JSON object; {RESTORE}")
    inner = [item for value in config.values() if isinstance(value, dict) for item in value.items()]  # such as text_config
    for name, value in [*config.items(), *inner]:
        limit = next((limit for part, limit in _LIMITS if re.search(part, name)), None)
        for number in value if isinstance(value, list) else [value]:
            if limit is not None and isinstance(number, int | float) and number > limit:
                raise LdmError(f"{path}: {printable(name)} is {number}, above the limit of {limit:,}; {RESTORE}")
    return config


@contextlib.contextmanager
def loading(what: str, fix: str) -> Iterator[None]:
    """Make a :class:`UsageError` of whatever a library raises on files that it did not expect: ``what`` (reason); ``fix``."""
    try:
        yield
    except (LdmError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers' panics are no Exception
        raise UsageError(f"{what} ({first_line(error)}); {fix}") from error


def variant_of(folder: Path, stem: str) -> str | None:
    """The variant (``fp16``) of the weights in a directory that holds no others, for ``from_pretrained``; which is logged.

    ``stem`` is the name of its weights without a variant: ``model``, or ``diffusion_pytorch_model``.
    """
    names = sorted(path.name for path in folder.iterdir())
    # whole, in several files, or the index of these
    ends = r"(-\d+-of-\d+)?\.(safetensors|bin)|\.(safetensors|bin)\.index"
    if any(re.fullmatch(rf"{stem}({ends})(\.json)?", name) for name in names):
        return None
    found = (re.fullmatch(rf"{stem}\.(\w+?)(-\d+-of-\d+)?\.(safetensors|bin)", name) for name in names)
    variant = next((match[1] for match in found if match), None)
    if variant is not None:
        log.warning("%s holds weights of variant %s alone, which are used", folder, variant)
    return variant


def require_regular_files(folder: Path) -> None:
    """Raise :class:`LdmError` for a pipe, a device or an unreadable file among the files of a directory: the libraries would
    wait for it, or read it without end."""
    for path in folder.iterdir():
        if not path.is_dir():
            with open_regular(path, "restore the directory, or move that away"):
                pass


def in_memory(network: nn.Module) -> None:
    """Copy weights that may be mapped from their file: the process would end if that file were cut, and compute with other
    weights if it were overwritten."""
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data = tensor.data.clone()


def is_hub_name(name: str) -> bool:
    """Whether it is OWNER/NAME, and neither it nor a folder OWNER is here."""
    hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
    return hub_name and not (os.path.lexists(name) or os.path.lexists(name.split("/")[0]))


def model_name(name: str) -> str:
    """A name on the hub, or that of a directory without those that it lies in: what a file records that others may read."""
    return name if is_hub_name(name) else os.path.basename(os.path.abspath(name))


def downloaded(path: str | Path, *subfolders: str) -> Path:
    """``path``, or where what it names on the Hugging Face hub has been downloaded to: a network, or the pipeline of one.

    Configs and safetensors of the repository itself and of its ``subfolders`` are downloaded, without variants. Raises
    :class:`UsageError` where they cannot be.
    """
    name = str(path)
    if not is_hub_name(name):
        return Path(path)
    files = ("*.json", "*.safetensors")
    at_top = ("model_index.json", "config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.json")
    with loading(
        f"{name} is no directory here, and cannot be downloaded from the Hugging Face hub", "give a directory, or a name there"
    ):
        return _snapshot(name, (*at_top, *(f"{folder}/{file}" for folder in subfolders for file in files)))


@functools.cache  # one request a process
def _snapshot(name: str, files: Sequence[str]) -> Path:
    return Path(snapshot_download(name, allow_patterns=[*files], ignore_patterns=["*.fp16*", "*non_ema*"]))
