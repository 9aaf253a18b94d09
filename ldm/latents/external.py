"""Read latents that other codebases computed. Their formats:

- LightningDiT (arXiv 2501.01423): ``*.safetensors`` with ``latents`` (N, C, h, w), sampled from the posterior and not
  normalised, ``latents_flip`` of the mirrored images, and ``labels`` (N,). A separate file has a caption for each class.
  ``latents_stats.pt`` is ignored: the statistics are computed again, over all latents.
- One ``.npy`` or ``.pt`` per image: a latent (C, h, w), perhaps multiplied by the autoencoder's scaling factor (fast-DiT,
  diffusers' scripts); means and log-variances (2C, h, w), diffusers' ``latent_dist.parameters`` (MAR, arXiv 2406.11838); or
  means and standard deviations (2C, h, w) (PixArt-alpha, arXiv 2310.00426; REPA, arXiv 2410.06940). A first axis of 1 is
  dropped. A ``.pt`` may hold a dict instead, with ``latent``, ``latents`` or ``moments``, and the mirrored image's under that
  name with ``_flip`` or ``_flipped``. Captions come from a ``.txt`` of the same name, or from a table.

Nothing that could run code is loaded: no pickled arrays, and from ``.pt`` files only tensors in plain containers.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.data.decode import MAX_TEXT_BYTES, DecodeError, decode_text
from ldm.data.pack.packer import stored_name
from ldm.data.pack.sources import Item, TableSource, sorted_files
from ldm.data.parallel_map import parallel_map
from ldm.data.quarantine import BadSample
from ldm.errors import LdmError, UsageError, first_line
from ldm.files import open_regular, parse_json, read_bytes

# limit of a file of one image, packed and unpacked
MAX_FILE_BYTES = 2**28
MAX_CAPTIONS_BYTES = 2**26  # of the file with a caption for each class

_SUFFIXES = (".npy", ".pt")
_NAMES = ("moments", "latents", "latent")
_FLIPS = ("_flip", "_flipped")
_READERS = 4


class ExternalLatent(NamedTuple):
    """One image's latent as found; ``file`` is for messages.

    ``latent`` and, where there is one, that of the mirrored image (``flip``): (C, h, w) or (2C, h, w), float32, finite.
    """

    file: str
    key: str
    captions: list[str]
    latent: Tensor
    flip: Tensor | None


class ExternalSource(ABC):
    """Latents of another codebase: ``found`` is the number of images; each is a latent, or the reason it cannot be used."""

    found: int

    def __init__(self, src: Path, channels: int):
        self.src, self.channels = src, channels

    @abstractmethod
    def images(self, step: int = 1) -> Iterator[ExternalLatent | BadSample]:
        """Every ``step``-th image, lazily, always in the same order."""

    def bad(self, file: str, reason: DecodeError) -> BadSample:
        """The record of an image that cannot be used."""
        return BadSample(str(self.src), file, str(reason))


class LightningDiTFolder(ExternalSource):
    """Safetensors files of many latents each, with class labels."""

    def __init__(self, src: Path, channels: int, paths: Sequence[Path], captions: str | os.PathLike | None):
        super().__init__(src, channels)
        if captions is None:
            raise UsageError(
                f"{src} holds class labels, not captions; give captions: a .txt or .json with the caption of each class"
            )
        self.captions_file, self.captions = captions, read_class_captions(captions)
        self.counts = {path: self._count(path) for path in paths}
        self.found = sum(self.counts.values())

    def _count(self, path: Path) -> int:
        """The number of latents. Raises where the file as a whole cannot be used: the loss could not be counted."""
        try:
            with open_regular(path), safe_open(path, "pt", backend="pread") as file:
                names = set(file.keys())
                if lacking := {"latents", "labels"} - names:
                    raise UsageError(
                        f"{path} lacks {' and '.join(sorted(lacking))} (found: {', '.join(sorted(names)) or 'nothing'}); "
                        "LightningDiT's files have latents, latents_flip and labels"
                    )
                shape = file.get_slice("latents").get_shape()
                labels = file.get_tensor("labels")
                flip = file.get_slice("latents_flip").get_shape() if "latents_flip" in names else shape
        except (SafetensorError, OSError) as error:
            raise LdmError(f"{path} cannot be read ({first_line(error)}); restore it, or move it away") from None
        if len(shape) != 4 or flip != shape or labels.shape != (shape[0],) or labels.is_floating_point():
            raise UsageError(
                f"{path}: latents {shape}, latents_flip {flip} and labels {list(labels.shape)} ({labels.dtype}) do not match; "
                "latents are (N, C, h, w), labels N integers"
            )
        if shape[1] not in (self.channels, 2 * self.channels):
            raise UsageError(
                f"{path} has latents of {shape[1]} channels, the autoencoder {self.channels}; give the one that encoded them"
            )
        return shape[0]

    def images(self, step: int = 1) -> Iterator[ExternalLatent | BadSample]:
        before = 0
        for path, count in self.counts.items():
            try:
                yield from self._images(path, range(-before % step, count, step))
            except (SafetensorError, OSError, IndexError) as error:
                raise LdmError(
                    f"{path} changed while it was read ({first_line(error)}); restore it, and import again"
                ) from None
            before += count

    def _images(self, path: Path, rows: range) -> Iterator[ExternalLatent | BadSample]:
        with safe_open(path, "pt", backend="pread") as file:
            labels, latents = file.get_tensor("labels").tolist(), file.get_slice("latents")
            flips = file.get_slice("latents_flip") if "latents_flip" in file.keys() else None  # noqa: SIM118 (no dict)
            for row in rows:
                file_and_row = f"{path.name}#{row}"
                try:
                    caption = self.captions.get(labels[row])
                    if not caption:
                        raise DecodeError(f"has label {labels[row]}, for which {self.captions_file} holds no caption")
                    latent = _checked(latents[row : row + 1], self.channels)
                    flip = None if flips is None else _checked(flips[row : row + 1], self.channels)
                    yield ExternalLatent(file_and_row, f"{path.stem}/{row:06d}", [caption], latent, flip)
                except DecodeError as error:
                    yield self.bad(file_and_row, error)


class FilePerImageFolder(ExternalSource):
    """One file per image."""

    def __init__(self, src: Path, channels: int, table: str | os.PathLike | None):
        super().__init__(src, channels)
        self.table = None if table is None else TableSource(src, Path(table), "file", ("caption",))
        # a table is checked to name existing files, each once
        self.found = sum(1 for _ in (self._items() if self.table is None else self.table.checked_items()))
        if not self.found:
            raise UsageError(f"{src} holds neither *.safetensors nor .npy or .pt files; give the folder of the latents")

    def _items(self) -> Iterator[Item]:
        if self.table is not None:
            return self.table.items()
        return (Item(file) for file in sorted_files(self.src) if file.lower().endswith(_SUFFIXES))

    def images(self, step: int = 1) -> Iterator[ExternalLatent | BadSample]:
        items = islice(self._items(), 0, None, step)
        return (image for _, image in parallel_map(self._load, items, _READERS))

    def _load(self, item: Item) -> ExternalLatent | BadSample:
        file = stored_name(item.key)
        try:
            if item.problem is not None:
                raise DecodeError(item.problem)
            path = self.src / item.key
            captions = _caption_beside(path) if item.captions is None else item.captions
            captions = [caption for caption in map(str.strip, captions) if caption]
            if not captions:
                raise DecodeError("has no caption")
            latent, flip = read_latent(path)
            latent = _checked(latent, self.channels)
            flip = None if flip is None else _checked(flip, self.channels)
            if flip is not None and flip.shape != latent.shape:
                raise DecodeError(f"has shapes {list(latent.shape)} and, mirrored, {list(flip.shape)}")
            return ExternalLatent(file, os.path.splitext(file)[0], captions, latent, flip)
        except DecodeError as error:
            return self.bad(file, error)


def read_class_captions(path: str | os.PathLike) -> dict[int, str]:
    """Captions by class, from a ``.json`` (a list, or an object keyed by class number) or a text file, a line per class."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"caption file {path} does not exist; give a .txt or .json with the caption of each class")
    try:
        data = read_bytes(path, MAX_CAPTIONS_BYTES)
        found = parse_json(data, str(path)) if path.suffix.lower() == ".json" else data.decode("utf-8-sig").splitlines()
        captions = {int(number): text for number, text in (found.items() if isinstance(found, dict) else enumerate(found))}
        return {number: decode_text(text.encode()) for number, text in captions.items()}
    except (LdmError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"caption file {path} cannot be used ({first_line(error)}); line or entry i is the caption of class i, a text"
        ) from None


def _caption_beside(path: Path) -> Sequence[str]:
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise DecodeError("has no caption: no .txt of the same name beside it, and no table of captions")
    try:
        return [decode_text(read_bytes(text, MAX_TEXT_BYTES))]
    except DecodeError:
        raise
    except LdmError as error:
        raise DecodeError(f"has a caption that cannot be read: {error}") from None


def read_latent(path: Path) -> tuple[Tensor, Tensor | None]:
    """The latents of an image and of its mirror image in a ``.npy`` or ``.pt``. Runs no code from the file.

    Raises :class:`DecodeError` for anything but a tensor, or a dict with a tensor under a known name.
    """
    try:
        data = read_bytes(path, MAX_FILE_BYTES)
    except LdmError as error:
        raise DecodeError(str(error).removeprefix(f"{path} ")) from None
    try:
        held = _read_npy(data) if path.suffix.lower() == ".npy" else _read_pt(data)
    except DecodeError:
        raise
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        what = f"needs {match[1]}" if match else first_line(error)
        raise DecodeError(f"holds more than tensors ({what}), which was not run; save only the tensor") from None
    # broken bytes raise RuntimeError, EOFError, KeyError, struct.error, BadZipFile and more from torch
    except Exception as error:
        raise DecodeError(f"cannot be read ({first_line(error)})") from None
    if not isinstance(held, dict):
        return held, None
    name = next((name for name in _NAMES if name in held), None)
    if name is None:
        raise DecodeError(f"holds none of {', '.join(_NAMES)} (found: {', '.join(map(str, held)) or 'nothing'})")
    return held[name], next((held[name + flip] for flip in _FLIPS if name + flip in held), None)


def _read_npy(data: bytes) -> Tensor:
    array = np.load(BytesIO(data), allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise DecodeError(f"holds no array of floats ({getattr(array, 'dtype', type(array).__name__)})")
    return torch.from_numpy(array.astype(np.float32))


def _read_pt(data: bytes) -> Any:
    if zipfile.is_zipfile(BytesIO(data)):
        with zipfile.ZipFile(BytesIO(data)) as archive:
            if (size := sum(member.file_size for member in archive.infolist())) > MAX_FILE_BYTES:
                raise DecodeError(f"unpacks to {size} bytes, the limit is {MAX_FILE_BYTES}")
    return torch.load(BytesIO(data), map_location="cpu", weights_only=True)


def _checked(latent: Any, channels: int) -> Tensor:
    """The latent as float32 (C, h, w) or (2C, h, w). Raises :class:`DecodeError` for anything else."""
    if not isinstance(latent, Tensor) or latent.layout != torch.strided or latent.is_meta or not latent.is_floating_point():
        raise DecodeError(f"holds no tensor of floats ({getattr(latent, 'dtype', type(latent).__name__)})")
    if latent.numel() * 4 > MAX_FILE_BYTES:  # a view may be larger than its file
        raise DecodeError(f"holds {latent.numel()} numbers, the limit is {MAX_FILE_BYTES // 4}")
    if latent.ndim == 4 and len(latent) == 1:
        latent = latent[0]
    if latent.ndim != 3 or 0 in latent.shape:
        raise DecodeError(f"has shape {list(latent.shape)}, a latent has (C, h, w)")
    if len(latent) not in (channels, 2 * channels):
        raise DecodeError(f"has {len(latent)} channels, the autoencoder {channels}")
    latent = latent.detach().float().contiguous()
    if not latent.isfinite().all():
        raise DecodeError("is not finite")
    return latent
