"""Latent shards -> a folder of PNGs with their captions, which can be packed again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ldm.data.decode import DecodeError
from ldm.data.latent_schema import LatentShard, latent_info
from ldm.data.manifest import LATENT_SHARDS
from ldm.data.parallel_map import parallel_map
from ldm.data.sources import ShardSource, open_source
from ldm.data.writer import encode_png
from ldm.errors import LdmError, UsageError
from ldm.files import atomic_folder, require_new_folder
from ldm.latents.compute import Process
from ldm.latents.image_encoder import load_matching
from ldm.machine import full_fp32
from ldm.models.autoencoder import decode, images_to_pil
from ldm.models.autoencoder_kinds import Autoencoder

CAPTIONS_NAME = "captions.jsonl"
MAX_NAME_BYTES = 200

_WRITERS = 4
# images queued per writer: enough to keep all of them busy while a batch is decoded
_AHEAD = 8


class Decoded(NamedTuple):
    """A decoded image and the path it is written to."""

    key: str
    captions: list[str]
    image: Image.Image
    path: Path


@full_fp32()
def decode_latent_shards(
    latents: str | Path,
    out: str | Path,
    autoencoder_path: str | Path,
    samples: int | None = None,
    flips: bool = False,
    device: torch.device | str | None = None,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Decode the posteriors' modes into ``out/{key}.png`` and list them, with captions, in ``out/captions.jsonl``.

    ``ldm shards pack OUT SHARDS --captions OUT/captions.jsonl`` packs them again. In file names, ``_`` replaces unusual
    characters of the key, and a number is added where two names would be equal. The list has the unchanged keys.

    Args:
        latents: a folder of latent shards, or another spec (:mod:`ldm.data.sources`).
        out: a new folder, which appears complete or not at all.
        autoencoder_path: of the autoencoder that encoded the latents, see :func:`ldm.models.autoencoder.load_autoencoder`.
        samples: decode the first so many; None: all.
        flips: also decode the latents of mirrored images, into ``{key}_flip.png``.
        device: None: a GPU where there is one.
        batch_size: latents per forward pass of the decoder.
        on_progress: called with (images written, images).

    Returns:
        the number of images written.

    Raises:
        UsageError: another autoencoder encoded the latents, or an argument is invalid.
        LdmError: a broken shard, images that are not finite, or ``out`` cannot be written.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; give 1 or more")
    source, out = open_source(latents, LATENT_SHARDS), require_new_folder(out, "decoded images")
    info = latent_info(source)
    if flips and not info.flips:
        raise UsageError(f"{source.spec} has no latents of mirrored images; leave flips out, or export again with flips")
    autoencoder = load_matching(autoencoder_path, source, Process.from_environment().device() if device is None else device)
    source.check_cheap()
    ends = ("", "_flip") if flips else ("",)
    samples = min(samples or source.manifest.samples, source.manifest.samples)
    try:
        with (
            atomic_folder(out) as folder,
            open(folder / CAPTIONS_NAME, "x", encoding="utf-8", errors="backslashreplace") as listing,
        ):
            # PNGs are compressed and written while the next batch is decoded
            decoded = _decode(source, autoencoder, folder, samples, ends, batch_size)
            written = parallel_map(lambda one: one.path.write_bytes(encode_png(one.image)), decoded, _WRITERS, _AHEAD)
            with closing(written):
                for done, (one, _) in enumerate(written, start=1):
                    caption = one.captions[0] if len(one.captions) == 1 else one.captions
                    row = {"file": one.path.name, "caption": caption, "key": one.key}
                    listing.write(json.dumps(row, ensure_ascii=False) + "\n")
                    if on_progress is not None:
                        on_progress(done, samples * len(ends))
    except OSError as error:
        raise LdmError(f"{out} cannot be written ({error.strerror or error}); fix that and decode again") from error
    return samples * len(ends)


def _decode(
    source: ShardSource, autoencoder: Autoencoder, folder: Path, samples: int, ends: tuple[str, ...], batch_size: int
) -> Iterator[Decoded]:
    """The images of the first ``samples``, each with an empty file of its own in the folder."""
    left = samples
    for number, entry in enumerate(source.manifest.shards):
        shard = LatentShard(source.path(number), entry.samples)
        for chunk in range(len(shard.spans)):
            if not left:
                return
            try:
                tensors, metadata = shard.tensors(chunk), shard.metadata(chunk)
            except DecodeError as error:
                raise LdmError(f"{source.name(number)}: chunk {chunk} {error}; restore it, or export again") from None
            rows = min(len(metadata["keys"]), left)
            left -= rows
            for start in range(0, rows, batch_size):
                some = slice(start, min(start + batch_size, rows))
                keys = metadata["keys"][some]
                where = f"{source.name(number)}: {keys[0]}"
                several = [_images(autoencoder, tensors[f"mean{end}"][some], where) for end in ends]
                for key, captions, *images in zip(keys, metadata["captions"][some], *several, strict=True):
                    for end, image in zip(ends, images, strict=True):
                        yield Decoded(key, captions, image, _claim(folder, key + end))


def _images(autoencoder: Autoencoder, mean: np.ndarray, where: str) -> list[Image.Image]:
    """Stored latents (B, C, h, w) -> images; ``where`` names the first in errors."""
    z = torch.from_numpy(mean.astype(np.float32)).to(autoencoder.device)
    with torch.inference_mode():
        images = decode(autoencoder, z)
    if not images.isfinite().all():
        raise LdmError(
            f"{where} or one of the {len(z) - 1} after it decodes to values that are not finite; check the autoencoder"
        )
    return images_to_pil(images)


def _claim(folder: Path, key: str) -> Path:
    """A new empty file named after the key, with a number added where that name is taken."""
    name = re.sub(r"[^\w.+=-]+", "_", key).lstrip(".") or "_"
    name = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    number = 1
    while True:
        path = folder / (f"{name}.png" if number == 1 else f"{name}~{number}.png")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            return path
        except FileExistsError:
            number += 1
