"""A folder of captioned images => image shards, with every file that cannot be used put on record.

Images of up to 128 pixels a side are written as PNG (lossless, and as small), larger ones as JPEG of quality 95
without chroma subsampling. A sample is ``{number:09d}.png|jpg``, ``.txt`` (the caption) and ``.json`` (the file it
came from, and the size that it had).
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps

from ldm.data.decode import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    DecodeError,
    decode_image,
    decode_text,
)
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.shards import ShardWriter, encode_png
from ldm.errors import UsageError, first_line
from ldm.files import atomic_folder, require_folder, require_new_folder

QUARANTINE_NAME = "quarantine.jsonl"
MAX_SIZE = 4096
PNG_UP_TO = 128

_ALLOWED = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS)
# Images of kinds that are not read: on record in the quarantine, so that nobody wonders where they went.
_OTHER_IMAGES = frozenset((".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg"))
_BATCH = 64


@dataclass(frozen=True)
class PackResult:
    """``packed + quarantined == found``; ``manifest`` is the one written."""

    packed: int
    quarantined: int
    found: int
    manifest: Manifest


def pack(
    src: str | os.PathLike,
    out: str | os.PathLike,
    captions: str | os.PathLike | None = None,
    size: int | None = None,
    samples_per_shard: int = 1000,
    prefix: str = "images",
    on_progress: Callable[[int, int], None] | None = None,
) -> PackResult:
    """Pack the images under ``src`` into the new folder ``out``: shards, manifest and ``quarantine.jsonl``.

    Captions come from the ``.txt`` file of the same name beside each image, or from ``captions``: a CSV, JSONL or
    Parquet file with columns ``file`` (relative to ``src``) and ``caption``. With ``size``, the shorter side is
    resized (up or down, Lanczos) to that many pixels and the centre cut out; without, images keep their sizes.
    Hidden files and folders are not looked at. Equal input gives equal bytes. ``on_progress(done, found)``.

    Raises :class:`UsageError`, with nothing written, where ``src`` holds no usable image, ``out`` holds other work or
    the caption file cannot be followed.
    """
    src = require_folder(src, "a folder of images to pack")
    out = require_new_folder(out, "image shards")
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise UsageError(f"size must be 1 to {MAX_SIZE} pixels, not {size}")
    table = None if captions is None else read_captions(captions, src)
    files = sorted(set(_find(src)) | set(table or ()))
    if not files:
        raise UsageError(f"{src} holds no image (.{', .'.join(IMAGE_EXTENSIONS)}); give the folder that does")

    prepare = partial(_prepare, src, table, captions, size)
    reasons: dict[str, int] = {}
    packed = 0
    with atomic_folder(out) as temporary:
        with (
            ShardWriter(temporary, prefix, samples_per_shard) as writer,
            open(temporary / QUARANTINE_NAME, "w", encoding="utf-8") as quarantine,
        ):
            for done, (file, result) in enumerate(_in_order(prepare, files), start=1):
                if isinstance(result, DecodeError):
                    line = {"file": _printable(file), "reason": str(result)}
                    quarantine.write(json.dumps(line, ensure_ascii=False) + "\n")
                    reasons[str(result)] = reasons.get(str(result), 0) + 1
                else:
                    writer.write(f"{packed:09d}", result)
                    packed += 1
                if on_progress is not None:
                    on_progress(done, len(files))
        quarantined = sum(reasons.values())
        if packed == 0:
            reason, count = max(reasons.items(), key=lambda item: item[1])
            raise UsageError(
                f"none of the {len(files)} images in {src} can be used ({count}: {reason}); captions come from a .txt "
                "beside each image or from --captions FILE"
            )
        extra = {"image_size": size, "source": "pack", "captioned": packed, "quarantined": quarantined}
        manifest = Manifest(IMAGE_SHARDS, tuple(writer.entries), extra)
        manifest.save(temporary)
    return PackResult(packed, quarantined, len(files), manifest)


def read_captions(path: str | os.PathLike, src: Path) -> dict[str, str]:
    """Read a caption file: image path relative to ``src`` (with /) -> caption, every path an existing file.

    Raises :class:`UsageError` for a missing or unreadable file, missing columns, a path named twice, outside ``src``
    or not there.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"caption file {path} does not exist; give a CSV, JSONL or Parquet file")
    rows = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(path.suffix.lower())
    if rows is None:
        raise UsageError(f"caption file {path} must end in .csv, .jsonl or .parquet")
    table: dict[str, str] = {}
    missing: list[str] = []
    try:
        for number, row in rows(path):
            file, caption = row["file"], row["caption"]
            if not isinstance(file, str) or not file.strip():
                raise UsageError(f'{path}, row {number}: "file" must be a path relative to {src}')
            if not isinstance(caption, str | None):
                raise UsageError(f'{path}, row {number}: "caption" must be a text, not {caption!r}')
            name = PurePosixPath(file.strip())
            if name.is_absolute() or ".." in name.parts:
                raise UsageError(f'{path}, row {number}: "file" must be a path relative to {src}, not {file}')
            if str(name) in table:
                raise UsageError(f"{path}, row {number}: {name} is named twice; keep one caption for each image")
            table[str(name)] = (caption or "").strip()
            if not (src / name).is_file():
                missing.append(str(name))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"caption file {path} cannot be read ({error}); write it as UTF-8 text") from None
    if missing:
        raise UsageError(
            f"{path} names {missing[0]}, which is not in {src} ({len(missing)} such in all); "
            'correct the "file" column or bring the images back'
        )
    if not table:
        raise UsageError(f"caption file {path} holds no row; each image needs one, with file and caption")
    return table


def _require_columns(path: Path, columns: list[str], where: str = "") -> None:
    lacking = [column for column in ("file", "caption") if column not in columns]
    if lacking:
        found = ", ".join(map(str, columns)) or "none"
        raise UsageError(f"{path}{where} lacks the column {' and '.join(lacking)} (found: {found}); it needs file and caption")


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _require_columns(path, list(reader.fieldnames or ()))
        yield from enumerate(reader, start=1)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, row {number} is not JSON ({error}); write one object to a line") from None
            if not isinstance(row, dict):
                raise UsageError(f"{path}, row {number} is not a JSON object; write file and caption to each line")
            _require_columns(path, list(row), f", row {number}")
            yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"reading {path} needs pyarrow; run `pip install pyarrow`, or give a CSV file") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_columns(path, list(file.schema_arrow.names))
            number = 0
            for batch in file.iter_batches(columns=["file", "caption"]):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"caption file {path} is not readable Parquet ({first_line(error)})") from None


def _find(src: Path) -> Iterator[str]:
    """Paths, relative to ``src`` and with /, of everything that looks like an image."""

    def refuse(error: OSError) -> None:  # os.walk alone would pass over it in silence
        raise UsageError(f"{error.filename} cannot be read ({error.strerror}); correct its permissions") from None

    for folder, folders, names in os.walk(src, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and suffix in _ALLOWED | _OTHER_IMAGES:
                yield (Path(folder) / name).relative_to(src).as_posix()


def _in_order(prepare: Callable[[str], Any], files: list[str]) -> Iterator[tuple[str, Any]]:
    """``prepare`` over all files in a few threads (Pillow lets go of the GIL), in order, a batch at a time."""
    remaining = iter(files)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while batch := list(islice(remaining, _BATCH)):
            yield from zip(batch, pool.map(prepare, batch), strict=True)


def _prepare(
    src: Path, table: dict[str, str] | None, captions: Any, size: int | None, file: str
) -> dict[str, bytes] | DecodeError:
    """One file => the members of its sample, or the reason why it has none."""
    try:
        path = src / file
        if path.suffix.lower() not in _ALLOWED:
            raise DecodeError("not an allowed format")
        data = _read(path, MAX_IMAGE_BYTES)
        if table is None:
            caption = _caption_beside(path)
        elif file in table:
            caption = table[file]
        else:
            raise DecodeError(f"no caption: {Path(captions).name} does not name it")
        if not caption:
            raise DecodeError("empty caption")
        if len(caption.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
            raise DecodeError(f"caption of more than {MAX_TEXT_BYTES} bytes")
        image = decode_image(data)
        origin = {"file": _printable(file), "width": image.width, "height": image.height}
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        return {
            **_encode(image),
            "txt": caption.encode(),
            "json": json.dumps(origin, ensure_ascii=False).encode(),
        }
    except DecodeError as error:
        return error
    except UnicodeEncodeError:
        return DecodeError("caption is not UTF-8 text")


def _caption_beside(path: Path) -> str:
    for suffix in (".txt", ".TXT"):
        beside = path.with_suffix(suffix)
        if beside.exists():
            return decode_text(_read(beside, MAX_TEXT_BYTES))
    raise DecodeError(f"no caption: {_printable(path.with_suffix('.txt').name)} is not beside it")


def _read(path: Path, limit: int) -> bytes:
    # is_file before open: opening a named pipe would wait for ever.
    if not path.is_file():
        raise DecodeError(f"{path.suffix} is not a regular file")
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise DecodeError(f"{path.suffix} cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise DecodeError(f"{path.suffix} file of more than {limit} bytes")
    return data


def _encode(image: Image.Image) -> dict[str, bytes]:
    if max(image.size) <= PNG_UP_TO:
        return {"png": encode_png(image)}
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return {"jpg": buffer.getvalue()}


def _printable(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 (legal on Linux) become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
