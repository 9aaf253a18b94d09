"""The file of a learned token (textual inversion): its embeddings by its name, as diffusers and other programs read it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import UsageError
from ldm.models.directories import loading

# the name by which diffusers finds it
FILE = "learned_embeds.safetensors"
# what A1111 calls the tensor; the token is then the name of the file
A1111_NAME = "emb_params"
# of diffusers and A1111, by torch.save
PICKLED = (".pt", ".bin")
# of one token
MAX_VECTORS = 256
MAX_TOKEN = 100  # characters
MAX_BYTES = 2**26


class LearnedToken(NamedTuple):
    """A new word.

    Attributes:
        token: by which prompts call it up.
        vectors: (V, D), rows of the text encoder's table of embeddings.
        about: what its training recorded: ``text_encoder``, the hash of the encoder without it; empty where another program
            wrote the file.
    """

    token: str
    vectors: Tensor
    about: dict[str, Any]


def write_token(folder: Path, learned: LearnedToken) -> None:
    """Write the file into ``folder``."""
    # one entry of metadata: safetensors would write several in any order
    save_file({learned.token: learned.vectors.contiguous()}, folder / FILE, {"ldm": json.dumps(learned.about)})


def token_path(path: str | os.PathLike) -> Path:
    """The file of a token: itself, or the one in a folder of ``ldm embedding fit``. Raises :class:`UsageError` for none."""
    place = Path(path)
    place = place / FILE if place.is_dir() else place
    if not place.is_file() or place.suffix not in (".safetensors", *PICKLED):
        raise UsageError(f"{place} is no file of a token; give a {FILE}, or a .pt or .bin of another program")
    if place.stat().st_size > MAX_BYTES:
        raise UsageError(f"{place} has {place.stat().st_size / 2**20:.0f} MiB, and a token some kilobytes; give its {FILE}")
    return place


def read_token(path: str | os.PathLike) -> LearnedToken:
    """The token of a file as :func:`token_path` finds it: ldm's, diffusers' or A1111's. Raises :class:`UsageError` for any
    other."""
    place = token_path(path)
    fix = f"give a token's {FILE}"
    with loading(f"{place} cannot be read", fix):
        found, about = _read_pickled(place) if place.suffix in PICKLED else _read_safetensors(place)
        if len(found) != 1 or not isinstance(about, dict):
            raise UsageError(f"{place} holds {len(found)} tensors ({', '.join(sorted(found)[:4])}), and a token has one; {fix}")
        ((name, vectors),) = found.items()
        shape = tuple(vectors.shape)
        if not (1 <= len(shape) <= 2 and 1 <= shape[-1] <= 2**16 and (len(shape) == 1 or 1 <= shape[0] <= MAX_VECTORS)):
            raise UsageError(f"{place} holds a tensor {shape}, and a token's vectors are (V, D); {fix}")
        if not (vectors.is_floating_point() and vectors.float().isfinite().all()):
            raise UsageError(f"{place} holds vectors that are not finite numbers; {fix}")
    token = place.stem if name == A1111_NAME else name
    if not (token.strip() == token and token.isprintable() and 1 <= len(token) <= MAX_TOKEN):
        raise UsageError(f"{place} calls its token {token[:MAX_TOKEN]!r}, which no prompt can hold; rename it")
    return LearnedToken(token, vectors.detach().to(torch.float32).reshape(-1, shape[-1]), about)


def _read_safetensors(place: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors and ldm's record of a file."""
    with safe_open(place, "pt", backend="pread") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, json.loads(
            (file.metadata() or {}).get("ldm", "{}")
        )


def _read_pickled(place: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file of ``torch.save``, of which no code is run. A1111 calls the one tensor ``*``, and names the token
    beside it."""
    content = torch.load(place, "cpu", weights_only=True)
    if isinstance(content, dict) and "string_to_param" in content:
        stated, found = content.get("name"), content["string_to_param"]
        # as the other programs: the file's name, where the token has none
        content = {stated if isinstance(stated, str) and stated else A1111_NAME: found["*"]} if set(found) == {"*"} else found
    if not isinstance(content, dict) or not all(isinstance(each, Tensor) for each in content.values()):
        raise UsageError(f"{place} holds no token's vectors; give its .safetensors, .pt or .bin")
    return {str(name): tensor for name, tensor in content.items()}, {}
