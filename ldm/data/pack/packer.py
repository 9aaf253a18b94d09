"""Captioned images => image shards; every image that cannot be used is recorded in ``quarantine.jsonl``.

Two passes over the source: the first checks and counts its listing; the second prepares the images in threads and writes them
in the listing's order. Threads, because decoding, scaling and encoding release the GIL, and because a new process would first
import all of ldm.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import islice

import numpy as np

from ldm.data.decode import DecodeError
from ldm.data.manifest import IMAGE_SHARDS, Manifest, relative_path
from ldm.data.pack.journal import Journal, require_claimable
from ldm.data.pack.prepare import Preparation, Prepared
from ldm.data.pack.sources import ImageSource, Item, hash_of, open_pack_source
from ldm.data.pack.tables import CaptionColumns
from ldm.data.parallel_map import parallel_map
from ldm.data.writer import ShardWriter, parse_shard_size
from ldm.errors import LdmError, UsageError
from ldm.files import exiting_on_sigterm, sha256_file
from ldm.terminal import printable

VALIDATION_NAME = "validation"
# Items prepared ahead of the one that is written, per worker: enough to hide a slow one, and a limit on memory.
_AHEAD = 8


@dataclass(frozen=True)
class PackResult:
    """``packed + quarantined == found``; ``enlarged`` images were scaled up; ``manifest`` and ``validation`` were written;
    ``named``: how many images have a caption of each name."""

    packed: int
    quarantined: int
    found: int
    enlarged: int
    manifest: Manifest
    validation: Manifest | None = None
    named: Mapping[str, int] = field(default_factory=dict)


# captions of these names would be other fields of a sample's json, or are read otherwise
TAKEN_NAMES = ("file", "width", "height", "caption", "captions", "txt")


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
    caption_columns: CaptionColumns = (),
    with_captions: bool = True,
    default_caption: str | None = None,
    validation: int | str | None = None,
    workers: int | None = None,
) -> PackResult:
    """Pack the images of ``src`` into the folder ``out``: shards, ``quarantine.jsonl`` and, last, the manifest.

    Equal input gives equal bytes, whatever the number of workers. Interrupted and called again with the same arguments, it
    resumes after the last complete shard, and ends with the bytes of an uninterrupted run. Memory does not grow with the number
    of images.

    Args:
        src: a folder of images with captions beside them or in a metadata table
            (:class:`ldm.data.pack.sources.FolderSource`); links are followed, hidden files skipped. Or Parquet files that hold
            images, or what ``datasets`` wrote with ``save_to_disk``. Or any :class:`ImageSource`.
        out: new, empty, or holding the same pack unfinished.
        captions: a CSV, TSV, JSONL or Parquet file that lists the images to pack by their paths in ``src``, with captions.
        size, resize, min_size, keep_bytes, format, quality, background: see :class:`Preparation`.
        shard_size: samples (1000) or bytes (``256MB``, ``1GB``) that a shard holds at most.
        prefix: of the shards' names.
        on_progress: called after each item with the number done and the number found.
        image_column: of ``captions`` (default ``file``, ``file_name``, ``filename``), or of a table or data set that holds
            images (default ``image``, ``jpg``, ``png``, ...).
        caption_columns: of the same (default ``caption``, ``captions``, ``text``, ``txt``, ``tags``), one or several. A cell
            may hold a list of captions. A mapping of names to columns: each caption is also kept under its name, for
            :func:`ldm.data.decode.captions_called`; of a folder of images, see :class:`ldm.data.pack.sources.FolderSource`.
        with_captions: False: captions are neither read nor stored, for an autoencoder; the manifest says that there are none.
        default_caption: of images that have none, which are refused otherwise.
        validation: so many images (``500``) or such a share (``"2%"``) go to shards in ``out/validation`` instead. A hash of
            the key decides: with a share, an image stays in its set when others are added; with a number, an added image may
            take the place of one that then goes to training, never the reverse.
        workers: threads that prepare images; None: as many as there are CPU cores.

    Raises:
        UsageError: with nothing written, where ``src`` holds nothing usable, ``out`` holds other work, or an argument is
            invalid.
        LdmError: ``src`` changed during packing, or an unfinished ``out`` is damaged.
    """
    preparation = Preparation(size, resize, min_size, keep_bytes, format, quality, background, with_captions, default_caption)
    preparation = preparation.checked()
    samples_per_shard, bytes_per_shard = parse_shard_size(shard_size)
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise UsageError(f"workers must be 1 or more, not {workers}")
    out = require_claimable(out)
    if not isinstance(src, ImageSource):
        src = open_pack_source(src, captions, image_column, caption_columns, with_captions)
    elif captions is not None or image_column is not None or caption_columns:
        raise UsageError(f"{src.src} is read by {type(src).__name__}, which takes neither a table of captions nor columns")
    names = dict(caption_columns) if isinstance(caption_columns, Mapping) else {}
    if wrong := [name for name in names if name in TAKEN_NAMES or name.isdecimal() or not with_captions]:
        fix = "call it otherwise, as in long=txt" if with_captions else "they are of packing with captions"
        raise UsageError(f"captions cannot be called {printable(wrong[0])}; {fix}")
    source, src = src, src.src
    if names and default_caption is not None:
        raise UsageError("captions have names, and one for images without has none; give one of the two")
    source.read_captions, source.require_captions = with_captions, default_caption is None
    found, listing = source.survey()
    limit = 0 if validation is None else _validation_limit(source, str(validation))

    request = asdict(preparation) | {"shard_size": str(shard_size), "prefix": prefix, "image_column": image_column}
    request["caption_columns"] = names or None
    request["validation"] = None if validation is None else str(validation)
    # other versions of these may write other bytes
    request |= {package: version(package) for package in ("Pillow", "simplejpeg")}
    parts = {"": False} if validation is None else {"": False, VALIDATION_NAME: True}
    journal, manifests, first_reason = Journal(out, request, listing), dict[str, Manifest](), ""
    writers = {
        folder: ShardWriter(
            out / folder,
            prefix,
            samples_per_shard,
            bytes_per_shard=bytes_per_shard,
            entries=journal.entries[folder],
            on_shard=partial(journal.record, folder),
        )
        for folder in parts
    }
    tables = [(table, sha256_file(table)) for table in source.tables]
    with exiting_on_sigterm(), journal:
        to_skip = journal.consumed
        if to_skip and on_progress is not None:
            on_progress(to_skip, found)
        for folder, held_out in parts.items():
            (out / folder).mkdir(exist_ok=True)
            entries = journal.entries[folder]
            items = (item for item in source.items() if (item.problem is None and hash_of(item.key) < limit) == held_out)
            count = sum(1 for _ in islice(items, to_skip))  # done by the process before
            to_skip -= count
            packed = sum(entry.samples for entry in entries)
            results = parallel_map(partial(_prepare, source, preparation), items, workers, _AHEAD)
            with writers[folder] as writer, closing(results):
                for item, result in results:
                    if isinstance(result, DecodeError):
                        journal.quarantine(stored_name(item.key), str(result))
                        first_reason = first_reason or f"{printable(stored_name(item.key))}: {result}"
                    else:
                        writer.write(f"{packed:09d}", result.files)
                        packed += 1
                        journal.sizes[folder].extend(result.size)
                        journal.enlarged[folder] += result.enlarged
                        journal.named[folder].update(name for name in result.extras if name in names)
                    count += 1
                    journal.consumed += 1
                    if on_progress is not None:
                        on_progress(journal.consumed, found)
            if packed == 0:
                if not folder:
                    journal.abandon()
                raise UsageError(
                    f"none of the {count} images in {src} can be used (first: {first_reason}); captions come from files beside "
                    "each image, from a table or from one for all, and an autoencoder needs none: then pack without captions"
                )
            counts = {"found": count, "quarantined": count - packed, "captioned": packed if with_captions else 0}
            extra = {"image_size": size, "resize": preparation.resize, "source": "pack"} | counts
            extra["enlarged"] = journal.enlarged[folder]
            place = out / folder
            listed = [{"path": stored_name(relative_path(table, place)), "sha256": sha256} for table, sha256 in tables]
            extra["packed_from"] = {"path": stored_name(relative_path(src, place)), "tables": listed}
            if names:
                extra["caption_names"] = {name: journal.named[folder][name] for name in names}
            if validation is not None:
                extra["validation"] = str(validation)
            sizes = np.array(journal.sizes[folder]).reshape(-1, 2)
            manifests[folder] = Manifest(IMAGE_SHARDS, tuple(entries), extra, sizes)
        if journal.consumed != found:
            raise LdmError(
                f"{src} changed while it was packed ({found} items, then {journal.consumed}); remove {out} and pack again"
            )
        journal.finish(manifests)
    packed, enlarged = sum(manifest.samples for manifest in manifests.values()), sum(journal.enlarged.values())
    named = sum(journal.named.values(), Counter({name: 0 for name in names}))
    return PackResult(packed, found - packed, found, enlarged, manifests[""], manifests.get(VALIDATION_NAME), named)


def _validation_limit(source: ImageSource, amount: str) -> int:
    """Images whose key has a lower hash are for validation: ``500`` or ``2%`` of them."""
    match = re.fullmatch(r"(\d{1,15})|(\d{1,2}(?:\.\d{1,9})?)\s*%", amount.strip())
    if match is None:
        raise UsageError(f"validation must be a number of images (500) or a share of them (2%), not {printable(amount)}")
    # 8 bytes an image
    hashes = np.sort(np.fromiter((hash_of(item.key) for item in source.checked_items() if item.problem is None), np.uint64))
    limit = 0 if match[2] is None else int(float(match[2]) / 100 * 2**64)
    chosen = int(np.searchsorted(hashes, np.uint64(limit))) if match[1] is None else int(match[1])
    if not 0 < chosen < len(hashes):
        raise UsageError(f"validation is {amount}, which is {chosen} of {len(hashes)} images; leave some for each set")
    return limit or int(hashes[chosen])


def _prepare(source: ImageSource, preparation: Preparation, item: Item) -> Prepared | DecodeError:
    """One item => the members of its sample, or why it cannot be used."""
    try:
        if item.problem is not None:
            raise DecodeError(item.problem)
        return preparation(stored_name(item.key), *source.load(item))
    except DecodeError as error:
        return error


def stored_name(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 (legal on Linux), and halves of surrogate pairs, become escapes."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace").decode()
