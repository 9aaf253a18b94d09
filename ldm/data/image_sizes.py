"""The sizes of all images of a set, in a file beside its manifest: aspect-ratio buckets need them before any image is read."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np

from ldm.data.decode import DecodeError, image_size_of
from ldm.data.manifest import IMAGE_SHARDS, MANIFEST_NAME, SIZES_NAME, Manifest
from ldm.data.shards import ShardReader
from ldm.data.sources import ShardSource
from ldm.errors import LdmError, UsageError

#: of an image that cannot be used
UNKNOWN = (0, 0)
# of a .npy file: its header is 128 bytes
_MAX_HEADER = 2**12


def sizes_of(reader: ShardReader) -> np.ndarray:
    """(height, width) in pixels of each image of a shard, (N, 2) int32, upright by EXIF, from the headers; or UNKNOWN."""
    return np.array([_size_of(reader, index) for index in range(len(reader))], np.int32).reshape(-1, 2)


def _size_of(reader: ShardReader, index: int) -> tuple[int, int]:
    try:
        return image_size_of(reader[index].image or b"")
    except DecodeError:
        return UNKNOWN


def holds_sizes(path: Path) -> bool:
    """Whether a file is an array as :func:`sizes_of` gives it."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return False
    return isinstance(array, np.ndarray) and array.dtype == np.int32 and array.ndim == 2 and array.shape[1] == 2


def image_sizes(source: ShardSource) -> np.ndarray:
    """The images' sizes as in :func:`sizes_of`, for all shards of ``source.manifest``. No shard is read.

    Raises :class:`UsageError` where the manifest is of before there were sizes, and :class:`LdmError` for another or a broken
    file.
    """
    manifest = source.manifest
    where = f"{SIZES_NAME} of {source.spec}"
    if (digest := manifest.extra.get("sizes")) is None:
        raise UsageError(f"the manifest of {source.spec} has no sizes of its images; {_FIX}")
    # the file is of all shards that the manifest beside it lists
    whole = Manifest.parse(source.read(MANIFEST_NAME), source.spec, IMAGE_SHARDS) if source.restricted else manifest
    data = source.read(SIZES_NAME, limit=8 * whole.samples + _MAX_HEADER)
    if hashlib.sha256(data).hexdigest() != digest:
        raise LdmError(f"{where} has other bytes than the manifest's sha256; restore it, or {_FIX}")
    try:
        sizes = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, MemoryError):
        sizes = np.empty(0)
    if sizes.shape != (whole.samples, 2) or sizes.dtype != np.int32:
        raise LdmError(f"{where} is no array of {whole.samples} pairs of int32; {_FIX}")
    if whole is manifest:
        return sizes
    chosen = {entry.name for entry in manifest.shards}
    keep = [np.full(entry.samples, entry.name in chosen) for entry in whole.shards]
    return sizes[np.concatenate(keep)]


_FIX = "write the manifest again: ldm shards index"
