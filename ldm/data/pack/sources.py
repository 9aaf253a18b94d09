"""What is to be packed: a folder of images, a table that names them, or a Hugging Face data set on disk.

A source is a listing in a fixed order, read lazily and as often as needed, and the way from an item to its bytes and
captions. However long it is, the listing is never held in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldm.data.decode import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    MAX_JSON_BYTES,
    MAX_TEXT_BYTES,
    DecodeError,
    captions_of,
    decode_text,
)
from ldm.data.manifest import tar_paths
from ldm.data.pack.tables import read_table, texts_of
from ldm.data.pack.walk import walk
from ldm.errors import UsageError, first_line
from ldm.files import require_folder

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt")

_ALLOWED = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS)
# Images of kinds that are not read: on record in the quarantine, so that nobody wonders where they went.
_OTHER_IMAGES = frozenset((".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg"))
_IMAGES = _ALLOWED | _OTHER_IMAGES
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a listing.

    Attributes:
        file: its name: a path relative to the source (with /), or ``split/row`` of a data set.
        captions: what the listing itself says of it; None: what lies beside the image does.
    """

    file: str
    captions: tuple[str, ...] | None = None


class ImageSource(ABC):
    """A listing, and what it lists."""

    identity = ""

    def __init__(self, src: Path) -> None:
        self.src = src

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """Every item, lazily, always in the same order."""

    @abstractmethod
    def load(self, item: Item) -> tuple[bytes, Sequence[str]]:
        """An item's image file and its captions, as they are. Raises :class:`DecodeError`. Called from several threads."""

    def state(self, item: Item) -> str:
        """What is cheap to know and changes when the item's content does."""
        return ""

    def checked_items(self) -> Iterator[Item]:
        """The items; raises :class:`UsageError` where the listing cannot be followed, at its end at the latest."""
        return self.items()

    def survey(self) -> tuple[int, str]:
        """How many items there are, and a hex sha256 over names, captions and states, in their order."""
        found, digest = 0, hashlib.sha256(self.identity.encode())
        for item in self.checked_items():
            found += 1
            digest.update(json.dumps([item.file, item.captions, self.state(item)]).encode())
        return found, digest.hexdigest()


class FolderSource(ImageSource):
    """The images of a folder and its subfolders, each with a ``.txt`` or ``.json`` of the same name."""

    def items(self) -> Iterator[Item]:
        return (Item(file) for file in walk(self.src) if _suffix(file) in _IMAGES)

    def checked_items(self) -> Iterator[Item]:
        empty = True
        for item in self.items():
            empty = False
            yield item
        if empty and tar_paths(self.src):
            raise UsageError(f"{self.src} holds .tar shards already; run `ldm shards index {self.src}` for their manifest")
        if empty:
            raise UsageError(f"{self.src} holds no image (.{', .'.join(IMAGE_EXTENSIONS)}); give the folder that does")

    def state(self, item: Item) -> str:
        path = os.path.join(self.src, item.file)
        beside = None if item.captions is not None else _caption_file(path)
        return " ".join(_stat(path) for path in (path, beside) if path is not None)

    def load(self, item: Item) -> tuple[bytes, Sequence[str]]:
        path = os.path.join(self.src, item.file)
        if _suffix(path) not in _ALLOWED:
            raise DecodeError("not an allowed format")
        data = _read(path, MAX_IMAGE_BYTES)
        return data, _captions_beside(path) if item.captions is None else item.captions


class TableSource(FolderSource):
    """The images that a CSV, JSONL or Parquet file names (relative to the folder), in the order of its rows."""

    def __init__(self, src: Path, table: Path, file_column: str, caption_columns: Sequence[str]) -> None:
        super().__init__(src)
        self.table, self.file_column, self.caption_columns = table, file_column, caption_columns

    def items(self) -> Iterator[Item]:
        return (item for _, item in self._rows())

    def _rows(self) -> Iterator[tuple[int, Item]]:
        for number, row in read_table(self.table, [self.file_column, *self.caption_columns]):
            where = f"{self.table}, row {number}"
            file = row[self.file_column]
            if not isinstance(file, str) or not file.strip():
                raise UsageError(f'{where}: "{self.file_column}" must be a path relative to {self.src}')
            name = PurePosixPath(file.strip())
            if name.is_absolute() or ".." in name.parts:
                raise UsageError(f'{where}: "{self.file_column}" must be a path relative to {self.src}, not {file}')
            yield number, Item(str(name), texts_of(row, self.caption_columns, where))

    def checked_items(self) -> Iterator[Item]:
        hashes = array("Q")  # 8 bytes a row: the names themselves would not fit
        missing, first_missing = 0, ""
        for item in self.items():
            hashes.append(_hash(item.file))
            if not os.path.isfile(os.path.join(self.src, item.file)):
                first_missing = first_missing or item.file
                missing += 1
            yield item
        if missing:
            raise UsageError(
                f"{self.table} names {first_missing}, which is not in {self.src} ({missing} such in all); "
                f'correct the "{self.file_column}" column or bring the images back'
            )
        if not hashes:
            raise UsageError(f"caption file {self.table} holds no row; each image needs one, with file and caption")
        self._refuse_twins(np.sort(np.frombuffer(hashes, np.uint64)))

    def _refuse_twins(self, hashes: np.ndarray) -> None:
        doubtful = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        seen: set[str] = set()
        for number, item in self._rows() if doubtful else ():
            if item.file in seen:
                raise UsageError(f"{self.table}, row {number}: {item.file} is named twice; give all its captions in one row")
            if _hash(item.file) in doubtful:
                seen.add(item.file)


class DatasetSource(ImageSource):
    """What ``datasets.Dataset.save_to_disk``, or that of a ``DatasetDict``, wrote: split after split, row after row."""

    def __init__(self, src: Path, image_column: str | None, caption_columns: Sequence[str]) -> None:
        super().__init__(src)
        try:
            import datasets
        except ImportError:
            raise UsageError(f"reading {src} needs datasets; run `pip install datasets`") from None
        datasets.disable_progress_bars()  # they would tear ours
        try:
            loaded = datasets.load_from_disk(str(src))
        except Exception as error:  # of pyarrow, json, fsspec and more, as the damage is
            raise UsageError(
                f"{src} cannot be loaded by datasets ({first_line(error)}); save it with save_to_disk again"
            ) from None
        self._images: dict[str, tuple[str, Any]] = {}
        self._captions: dict[str, tuple[Sequence[str], Any]] = {}
        for name, split in loaded.items() if isinstance(loaded, dict) else [("", loaded)]:
            where = f"split {name} of {src}" if name else str(src)
            split = split.with_format(None)
            (image,) = _choose([image_column] if image_column else [], IMAGE_COLUMNS, split.column_names, where, "image")
            captions = _choose(caption_columns, CAPTION_COLUMNS, split.column_names, where, "caption")
            self._captions[name] = captions, split.select_columns(captions)
            if isinstance(split.features[image], datasets.Image):
                split = split.cast_column(image, datasets.Image(decode=False))  # the file's own bytes
            self._images[name] = image, split.select_columns(image)
        # rows have no state of their own: the files that they lie in have
        files = [file for file in walk(src) if file.endswith((".arrow", ".json"))]
        self.identity = json.dumps([(file, _stat(os.path.join(src, file))) for file in files])

    def items(self) -> Iterator[Item]:
        for name, (columns, split) in self._captions.items():
            number = 0
            for batch in split.iter(_ROWS_AT_ONCE):
                for cells in zip(*(batch[column] for column in columns), strict=True):
                    file = f"{name}/{number:09d}" if name else f"{number:09d}"
                    row = dict(zip(columns, cells, strict=True))
                    yield Item(file, texts_of(row, columns, f"{self.src}, row {file}"))
                    number += 1

    def checked_items(self) -> Iterator[Item]:
        if not any(len(split) for _, split in self._images.values()):
            raise UsageError(f"{self.src} holds no row; give a data set that does")
        return self.items()

    def load(self, item: Item) -> tuple[bytes, Sequence[str]]:
        name, _, number = item.file.rpartition("/")
        column, split = self._images[name]
        value = split[int(number)][column]
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DecodeError(f'no bytes of an image in "{column}"')
        return data, item.captions or ()


def open_pack_source(
    src: str | os.PathLike,
    captions: str | os.PathLike | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
) -> ImageSource:
    """The source that ``src`` and ``captions`` (a table) are. Raises :class:`UsageError` where they are none."""
    src = require_folder(src, "a folder of images to pack")
    if captions is not None:
        return TableSource(src, Path(captions), image_column or "file", caption_columns or ("caption",))
    if (src / "dataset_dict.json").is_file() or ((src / "state.json").is_file() and (src / "dataset_info.json").is_file()):
        return DatasetSource(src, image_column, caption_columns)
    if image_column or caption_columns:
        raise UsageError(f"columns are named, but {src} is a folder of images; give the table they are in with --captions")
    return FolderSource(src)


def _choose(asked: Sequence[str], usual: Sequence[str], columns: Sequence[str], where: str, what: str) -> list[str]:
    """The columns asked for, or the first of the usual ones."""
    chosen = list(dict.fromkeys(asked)) or [column for column in usual if column in columns][:1]
    lacking = [column for column in chosen if column not in columns]
    if lacking or not chosen:
        raise UsageError(
            f"{where} lacks the column {' and '.join(lacking) or ' or '.join(usual)} (found: {', '.join(columns)}); "
            f"name the right one with --{what}-column"
        )
    return chosen


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _stat(path: str) -> str:
    try:
        about = os.stat(path)
    except OSError:
        return "-"
    return f"{about.st_size} {about.st_mtime_ns}"


def _caption_file(path: str) -> str | None:
    stem = os.path.splitext(path)[0]
    return next((stem + suffix for suffix in (".txt", ".TXT", ".json", ".JSON") if os.path.exists(stem + suffix)), None)


def _captions_beside(path: str) -> Sequence[str]:
    beside = _caption_file(path)
    if beside is None:
        raise DecodeError("no caption: no .txt or .json of the same name beside it")
    if _suffix(beside) == ".txt":
        return [decode_text(_read(beside, MAX_TEXT_BYTES))]
    captions = captions_of(None, _read(beside, MAX_JSON_BYTES))
    if not captions:
        raise DecodeError('no caption: neither "caption" nor "captions" in the .json beside it')
    return captions


def _read(path: str, limit: int) -> bytes:
    # isfile before open: opening a named pipe would wait for ever.
    if not os.path.isfile(path):
        raise DecodeError(f"{os.path.splitext(path)[1]} is not a regular file")
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise DecodeError(f"{os.path.splitext(path)[1]} cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise DecodeError(f"{os.path.splitext(path)[1]} file of more than {limit} bytes")
    return data
