"""A folder of a few images as training data, without shards: it is packed when a run begins."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from ldm.data.manifest import MANIFEST_NAME, PACK_JOURNAL_NAME, tar_paths
from ldm.data.pack.packer import pack
from ldm.data.pack.sources import open_pack_source, sorted_files
from ldm.data.quarantine import QUARANTINE_NAME
from ldm.data.sources import ShardCache, ShardSource, open_source
from ldm.errors import LdmError, UsageError
from ldm.files import parse_json
from ldm.images import is_image
from ldm.locks import new_lock
from ldm.terminal import printable

#: more images are packed by the user, once, and not when a run begins
MAX_IMAGES = 1000
#: of a folder without shards, names that are looked at for an image
MAX_NAMES = 10_000
#: folder in the cache of shards
PACKED = "packed"


def open_data(
    spec: str, caption: str | None = None, cache: ShardCache | None = None, read_captions: bool = True
) -> ShardSource:
    """Shards, as :func:`open_source` finds them, or those of a folder of images, which are packed into the cache.

    The bytes are those of ``pack(spec, keep_bytes=True, default_caption=caption)``: the same wherever and however often the
    folder is opened, until an image or a caption in it changes. Any number of processes may open it at once.

    Args:
        spec: shards, or a local folder of 2 to 1,000 images, with captions beside them or in a table, or without.
        caption: of the images in a folder that have none.
        cache: of remote shards, and of packed folders.
        read_captions: False: the images in a folder need no captions, and those that they have are not packed.

    Raises:
        UsageError: as :func:`open_source` and :func:`pack` do; for a folder of one image or too many, and for an image that
            cannot be used: of few, each was chosen.
    """
    folder = Path(spec)
    if not is_image_folder(folder):
        if folder.is_dir() and next(sorted_files(folder), None) is None:
            raise UsageError(f"{printable(folder)} is empty; give a folder of images, or of shards")
        return open_source(spec, cache=cache)
    source = open_pack_source(folder)
    source.read_captions, source.require_captions = read_captions, caption is None
    found, listing = source.survey()
    if not 2 <= found <= MAX_IMAGES:
        fix = "give 5 to 50" if found < 2 else f"pack them first: ldm shards pack {printable(folder)} OUT"
        raise UsageError(f"{printable(folder)} holds {found} image{'s' * (found > 1)}; {fix}")
    made_by = [version(package) for package in ("Pillow", "simplejpeg")]
    key = hashlib.sha256(json.dumps([listing, caption, read_captions, made_by]).encode()).hexdigest()[:32]
    place = (cache or ShardCache()).folder / PACKED / key
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with new_lock(place.with_suffix(".lock")):
            if not (place / MANIFEST_NAME).exists():
                options = {"keep_bytes": True, "with_captions": read_captions, "default_caption": caption}
                result = pack(folder, place, **options)
                if result.quarantined:
                    first = parse_json((place / QUARANTINE_NAME).read_bytes().splitlines()[0], QUARANTINE_NAME, dict[str, str])
                    shutil.rmtree(place)
                    unusable = f"{result.quarantined} of {found} images in {printable(folder)} cannot be used"
                    raise UsageError(f"{unusable} ({printable(first['file'])}: {first['reason']}); {_fix(first['reason'])}")
    except OSError as error:
        raise LdmError(f"{place} cannot be written ({error.strerror}); set LDM_CACHE to another folder") from None
    return replace(open_source(place), spec=os.fspath(spec))


def _fix(reason: str) -> str:
    return "give a caption for images without one" if "caption" in reason else "convert it or move it away"


def is_image_folder(folder: Path) -> bool:
    """Whether a local folder holds images, and no shards."""
    if not folder.is_dir() or (folder / MANIFEST_NAME).exists() or (folder / PACK_JOURNAL_NAME).exists() or tar_paths(folder):
        return False
    return any(map(is_image, islice(sorted_files(folder), MAX_NAMES)))


def packed_folders(cache: ShardCache | None = None) -> Sequence[Path]:
    """The shards of all folders of images that were opened on this machine."""
    return sorted(path.parent for path in (cache or ShardCache()).folder.glob(f"{PACKED}/*/{MANIFEST_NAME}"))
