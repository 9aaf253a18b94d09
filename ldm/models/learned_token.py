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
# of one token
MAX_VECTORS = 256


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


def read_token(path: str | os.PathLike) -> LearnedToken:
    """The token of a file, or of the folder that ``ldm embedding fit`` exports. Raises :class:`UsageError` for any other."""
    place = Path(path)
    place = place / FILE if place.is_dir() else place
    fix = f"give a token's {FILE}"
    if not place.is_file() or place.suffix != ".safetensors":
        raise UsageError(f"{place} is no .safetensors file; {fix}")
    with loading(f"{place} cannot be read", fix), safe_open(place, "pt") as file:
        names, about = sorted(file.keys()), json.loads((file.metadata() or {}).get("ldm", "{}"))
        if len(names) != 1 or not isinstance(about, dict):
            raise UsageError(f"{place} holds {len(names)} tensors ({', '.join(names[:4])}), and a token has one; {fix}")
        slices = file.get_slice(names[0])
        shape = slices.get_shape()
        if not (1 <= len(shape) <= 2 and 1 <= shape[-1] <= 2**16 and (len(shape) == 1 or 1 <= shape[0] <= MAX_VECTORS)):
            raise UsageError(f"{place} holds a tensor {tuple(shape)}, and a token's vectors are (V, D); {fix}")
        vectors = file.get_tensor(names[0]).reshape(-1, shape[-1])
    if not (vectors.is_floating_point() and vectors.float().isfinite().all()):
        raise UsageError(f"{place} holds vectors that are not finite numbers; {fix}")
    return LearnedToken(place.stem if names[0] == A1111_NAME else names[0], vectors.to(torch.float32), about)
