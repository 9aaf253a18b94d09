"""Directories of networks as diffusers and transformers save them: which of their files are read, and how."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from torch import nn

from ldm.files import open_regular

log = logging.getLogger(__name__)


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
            with open_regular(path, "remove it, or restore the directory"):
                pass


def in_memory(network: nn.Module) -> None:
    """Copy weights that may be mapped from their file: the process would end if that file were cut, and compute with other
    weights if it were overwritten."""
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data = tensor.data.clone()
