"""Captioned images => image shards; every image that cannot be used is recorded in ``quarantine.jsonl``.

Two passes over the source: the first checks and counts its listing; the second prepares the images in threads and writes them
in the listing's order. Threads, because decoding, scaling and encoding release the GIL, and because a new process would first
import all of ldm.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from ldm.data.decode import DecodeError
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.pack.journal import Journal, require_claimable
from ldm.data.pack.prepare import Preparation, Prepared
from ldm.data.pack.sources import ImageSource, Item, open_pack_source
from ldm.data.parallel_map import parallel_map
from ldm.data.writer import ShardWriter, parse_shard_size
from ldm.errors import LdmError, UsageError

# Items prepared ahead of the one that is written, per worker: enough to hide a slow one, and a limit on memory.
_AHEAD = 8


@dataclass(frozen=True)
class PackResult:
    """``packed + quarantined == found``; ``manifest`` is the one written; ``enlarged`` images were scaled up."""

    packed: int
    quarantined: int
    found: int
    enlarged: int
    manifest: Manifest


def pack(
    src: str | os.PathLike | ImageSource,
    out: str | os.PathLike,
    captions: str | os.PathLike | None = None,
    size: int | None = None,
    shard_size: int | str = 1000,
    prefix: str = "images",
    on_progress: Callable[[int, int], None] | None = None,
    *,
    resize: str | None = None,
    min_size: int | None = None,
    keep_bytes: bool = False,
    format: str = "auto",
    quality: int = 95,
    background: str = "white",
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    workers: int | None = None,
) -> PackResult:
    """Pack the images of ``src`` into the folder ``out``: shards, ``quarantine.jsonl`` and, last, the manifest.

    Equal input gives equal bytes, whatever the number of workers. Interrupted and called again with the same arguments, it
    resumes after the last complete shard, and ends with the bytes of an uninterrupted run. Memory does not grow with the number
    of images.

    Args:
        src: a folder of images, each with its caption in a ``.txt`` (or ``"caption"``, ``"captions"`` in a ``.json``) of
            the same name; links are followed, hidden files skipped. Or what ``datasets`` wrote with ``save_to_disk``. Or any
            :class:`ImageSource`.
        out: new, empty, or holding the same pack unfinished.
        captions: a CSV, JSONL or Parquet file that lists the images to pack by their paths in ``src``, with captions.
        size, resize, min_size, keep_bytes, format, quality, background: see :class:`Preparation`.
        shard_size: samples (1000) or bytes (``256MB``, ``1GB``) that a shard holds at most.
        prefix: of the shards' names.
        on_progress: called after each item with the number done and the number found.
        image_column: of ``captions`` (default ``file``) or of the data set (default ``image``, ``jpg``, ``png``).
        caption_columns: of the same (default ``caption``), one or several. A cell may hold a list of captions.
        workers: threads that prepare images; None: as many as there are CPU cores.

    Raises:
        UsageError: with nothing written, where ``src`` holds nothing usable, ``out`` holds other work, or an argument is
            invalid.
        LdmError: ``src`` changed during packing, or an unfinished ``out`` is damaged.
    """
    preparation = Preparation(size, resize, min_size, keep_bytes, format, quality, background).checked()
    samples_per_shard, bytes_per_shard = parse_shard_size(shard_size)
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise UsageError(f"workers must be 1 or more, not {workers}")
    out = Path(out)
    require_claimable(out)
    if not isinstance(src, ImageSource):
        src = open_pack_source(src, captions, image_column, caption_columns)
    elif captions is not None or image_column is not None or caption_columns:
        raise UsageError(f"{src.src} is read by {type(src).__name__}, which takes neither a table of captions nor columns")
    source, src = src, src.src
    found, listing = source.survey()

    request = asdict(preparation) | {"shard_size": str(shard_size), "prefix": prefix, "image_column": image_column}
    # other versions of these may write other bytes
    request |= {package: version(package) for package in ("Pillow", "simplejpeg")}
    journal = Journal(out, request, listing)
    writer = ShardWriter(
        out, prefix, samples_per_shard, bytes_per_shard=bytes_per_shard, entries=journal.entries, on_shard=journal.record
    )
    with journal:
        packed, first_reason = sum(entry.samples for entry in journal.entries), ""
        remaining = islice(source.items(), journal.consumed, None)
        results = parallel_map(partial(_prepare, source, preparation), remaining, workers, _AHEAD)
        if journal.consumed and on_progress is not None:
            on_progress(journal.consumed, found)
        with writer, closing(results):
            for item, result in results:
                if isinstance(result, DecodeError):
                    journal.quarantine(printable(item.key), str(result))
                    first_reason = first_reason or f"{printable(item.key)}: {result}"
                else:
                    writer.write(f"{packed:09d}", result.files)
                    packed += 1
                    journal.enlarged += result.enlarged
                journal.consumed += 1
                if on_progress is not None:
                    on_progress(journal.consumed, found)
        if journal.consumed != found:
            raise LdmError(
                f"{src} changed while it was packed ({found} items, then {journal.consumed}); remove {out} and pack again"
            )
        if packed == 0:
            journal.abandon()
            raise UsageError(
                f"none of the {found} images in {src} can be used (first: {first_reason}); captions come from a .txt "
                "beside each image, or from a table of captions"
            )
        counts = {"found": found, "quarantined": found - packed, "captioned": packed, "enlarged": journal.enlarged}
        extra = {"image_size": size, "resize": preparation.resize, "source": "pack"} | counts
        manifest = Manifest(IMAGE_SHARDS, tuple(writer.entries), extra)
        journal.finish(manifest)
    return PackResult(packed, found - packed, found, journal.enlarged, manifest)


def _prepare(source: ImageSource, preparation: Preparation, item: Item) -> Prepared | DecodeError:
    """One item => the members of its sample, or why it cannot be used."""
    try:
        return preparation(printable(item.key), *source.load(item))
    except DecodeError as error:
        return error


def printable(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 (legal on Linux) become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
