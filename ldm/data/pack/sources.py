"""Sources of images to pack: a folder, a table that names files, a Hugging Face data set on disk, or a class of your own.

A source lists its items in a fixed order, lazily and as often as asked, and loads each by itself: :class:`ImageSource`. The
listing is never held in memory, however long it is.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import tempfile
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

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
from ldm.data.pack.prepare import NO_EXTRAS
from ldm.data.pack.tables import read_table, texts_of
from ldm.errors import UsageError, first_line
from ldm.files import require_folder

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt")

_ALLOWED = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS)
# Images in unsupported formats are recorded in the quarantine.
_OTHER_IMAGES = frozenset((".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg"))
_IMAGES = _ALLOWED | _OTHER_IMAGES
_ROWS_AT_ONCE = 1000
# Names of one folder that are sorted in memory; more are sorted through temporary files.
_NAMES_AT_ONCE = 100_000


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a source's listing.

    Attributes:
        key: unique name: a path relative to the source (with /), or ``split/row`` of a data set. Packing stores it.
        captions: those that the listing itself holds; None where :meth:`ImageSource.load` finds them.
    """

    key: str
    captions: tuple[str, ...] | None = None


class LoadedImage(NamedTuple):
    """What a source holds of one item.

    Attributes:
        data: the encoded image file: JPEG, PNG or WebP.
        captions: one or several.
        extras: further JSON values, stored in the sample's ``.json``; ``file``, ``width``, ``height`` and ``captions`` are
            taken.
    """

    data: bytes
    captions: Sequence[str]
    extras: Mapping[str, Any] = NO_EXTRAS


class ImageSource(ABC):
    """Where images to pack come from: (key, bytes, captions, extras) for each of them.

    To pack from somewhere else, subclass it with :meth:`items` and :meth:`load`, and give an instance to
    :func:`ldm.data.pack.packer.pack`, or the class to ``ldm shards pack SRC OUT --source-class package.module.Class``.
    Everything else (decoding, resizing, quarantine, resuming, sharding) is the packer's.

    Attributes:
        src: where it reads, as the user named it; for messages.
        identity: changes when the content changes but neither keys, captions nor :meth:`state` do.
    """

    identity = ""

    def __init__(self, src: str | os.PathLike) -> None:
        self.src = Path(src)

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """Every item, lazily, always in the same order. Called twice: to survey the source, and to pack it."""

    @abstractmethod
    def load(self, item: Item) -> LoadedImage:
        """An item's content. Raises :class:`DecodeError` where it cannot be used. Called from several threads."""

    def state(self, item: Item) -> str:
        """Something cheap that changes when the item's content does, so that a changed source is not resumed."""
        return ""

    def checked_items(self) -> Iterator[Item]:
        """The items; raises :class:`UsageError` where the listing cannot be followed, at its end at the latest."""
        return self.items()

    def survey(self) -> tuple[int, str]:
        """How many items there are, and a hex sha256 over keys, captions and states, in order."""
        found, digest = 0, hashlib.sha256(self.identity.encode())
        for item in self.checked_items():
            found += 1
            digest.update(json.dumps([item.key, item.captions, self.state(item)]).encode())
        return found, digest.hexdigest()


class FolderSource(ImageSource):
    """The images of a folder and its subfolders, each with a ``.txt`` or ``.json`` of the same name."""

    def items(self) -> Iterator[Item]:
        return (Item(file) for file in sorted_files(self.src) if _suffix(file) in _IMAGES)

    def checked_items(self) -> Iterator[Item]:
        item = None
        for item in self.items():
            yield item
        if item is None and tar_paths(self.src):
            raise UsageError(f"{self.src} holds .tar shards already; run `ldm shards index {self.src}` for their manifest")
        if item is None:
            raise UsageError(f"{self.src} holds no image (.{', .'.join(IMAGE_EXTENSIONS)}); give the folder that does")

    def state(self, item: Item) -> str:
        path = os.path.join(self.src, item.key)
        beside = None if item.captions is not None else _caption_file(path)
        return " ".join(_stat(path) for path in (path, beside) if path is not None)

    def load(self, item: Item) -> LoadedImage:
        path = os.path.join(self.src, item.key)
        if _suffix(path) not in _ALLOWED:
            raise DecodeError("not an allowed format")
        data = _read(path, MAX_IMAGE_BYTES)
        return LoadedImage(data, _captions_beside(path) if item.captions is None else item.captions)


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
            hashes.append(_hash(item.key))
            if not os.path.isfile(os.path.join(self.src, item.key)):
                first_missing = first_missing or item.key
                missing += 1
            yield item
        if missing:
            raise UsageError(
                f"{self.table} names {first_missing}, which is not in {self.src} ({missing} such in all); "
                f'correct the "{self.file_column}" column or bring the images back'
            )
        if not hashes:
            raise UsageError(f"caption file {self.table} holds no row; each image needs one, with file and caption")
        self._refuse_duplicates(np.sort(np.frombuffer(hashes, np.uint64)))

    def _refuse_duplicates(self, hashes: np.ndarray) -> None:
        doubtful = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        seen: set[str] = set()
        for number, item in self._rows() if doubtful else ():
            if item.key in seen:
                raise UsageError(f"{self.table}, row {number}: {item.key} is named twice; give all its captions in one row")
            if _hash(item.key) in doubtful:
                seen.add(item.key)


class DatasetSource(ImageSource):
    """What ``datasets.Dataset.save_to_disk``, or that of a ``DatasetDict``, wrote: split after split, row after row."""

    def __init__(self, src: Path, image_column: str | None, caption_columns: Sequence[str]) -> None:
        super().__init__(src)
        try:
            import datasets
        except ImportError:
            raise UsageError(f"reading {src} needs datasets; run `pip install datasets`") from None
        datasets.disable_progress_bars()
        try:
            loaded = datasets.load_from_disk(str(src))
        except Exception as error:  # from pyarrow, json, fsspec and others, depending on the damage
            raise UsageError(
                f"{src} cannot be loaded by datasets ({first_line(error)}); save it with save_to_disk again"
            ) from None
        self._images: dict[str, tuple[str, Any]] = {}
        self._captions: dict[str, tuple[Sequence[str], Any]] = {}
        for name, split in loaded.items() if isinstance(loaded, datasets.DatasetDict) else [("", loaded)]:
            name = str(name)
            where = f"split {name} of {src}" if name else str(src)
            split = split.with_format(None)
            (image,) = _choose([image_column] if image_column else [], IMAGE_COLUMNS, split.column_names, where, "image")
            captions = _choose(caption_columns, CAPTION_COLUMNS, split.column_names, where, "caption")
            self._captions[name] = captions, split.select_columns(captions)
            if isinstance(split.features[image], datasets.Image):
                split = split.cast_column(image, datasets.Image(decode=False))  # the file's own bytes
            self._images[name] = image, split.select_columns(image)
        # rows have no state; the files that hold them do
        files = [file for file in sorted_files(src) if file.endswith((".arrow", ".json"))]
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

    def load(self, item: Item) -> LoadedImage:
        name, _, number = item.key.rpartition("/")
        column, split = self._images[name]
        value = split[int(number)][column]
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DecodeError(f'no bytes of an image in "{column}"')
        return LoadedImage(data, item.captions or ())


def open_pack_source(
    src: str | os.PathLike,
    captions: str | os.PathLike | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
) -> ImageSource:
    """The source for a folder or saved data set ``src``, and a table ``captions``. Raises :class:`UsageError` for neither."""
    src = require_folder(src, "a folder of images to pack")
    if captions is not None:
        return TableSource(src, Path(captions), image_column or "file", caption_columns or ("caption",))
    if (src / "dataset_dict.json").is_file() or ((src / "state.json").is_file() and (src / "dataset_info.json").is_file()):
        return DatasetSource(src, image_column, caption_columns)
    if image_column or caption_columns:
        raise UsageError(f"columns are named, but {src} is a folder of images; give the table that has them as captions")
    return FolderSource(src)


def sorted_files(folder: str | os.PathLike, inside: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Paths of all files under ``folder``, relative and with /, sorted, in bounded memory; hidden files and folders excluded.

    Links are followed, except links to a folder that contains them. Raises :class:`UsageError` for a folder that cannot be
    read. ``inside`` and ``above`` are for the recursion.
    """
    with ExitStack() as stack:
        try:
            about = os.stat(folder)
            here = (about.st_dev, about.st_ino)
            if here in above:
                return
            with os.scandir(folder) as entries:
                names = _sorted((_name(entry) for entry in entries if not entry.name.startswith(".")), stack)
        except OSError as error:  # os.walk would skip it silently
            raise UsageError(f"{error.filename} cannot be read ({error.strerror}); correct its permissions") from None
        for name in names:
            if name.endswith("/"):
                yield from sorted_files(os.path.join(folder, name[:-1]), inside + name, above | {here})
            else:
                yield inside + name


def _name(entry: os.DirEntry[str]) -> str:
    # a folder's / takes part in the order, so that whole paths come sorted; isdir detects circular links
    is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
    return f"{entry.name}/" if is_folder else entry.name


def _sorted(names: Iterator[str], stack: ExitStack) -> Iterator[str]:
    """The names in order, in bounded memory: an external merge sort of runs of ``_NAMES_AT_ONCE``."""
    runs: list[Iterable[str]] = []
    while run := sorted(islice(names, _NAMES_AT_ONCE)):
        if len(run) < _NAMES_AT_ONCE:
            runs.append(run)
            break
        file = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 (the caller's stack closes it)
        file.writelines(json.dumps(name) + "\n" for name in run)  # a name may hold a line break
        file.seek(0)
        runs.append(map(json.loads, file))
    return heapq.merge(*runs)


def _choose(asked: Sequence[str], usual: Sequence[str], columns: Sequence[str], where: str, what: str) -> list[str]:
    """The columns asked for, or the first of the usual ones."""
    chosen = list(dict.fromkeys(asked)) or [column for column in usual if column in columns][:1]
    lacking = [column for column in chosen if column not in columns]
    if lacking or not chosen:
        raise UsageError(
            f"{where} lacks the column {' and '.join(lacking) or ' or '.join(usual)} (found: {', '.join(columns)}); "
            f"give the right one as {what}_column{'s' * (what == 'caption')}"
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
    # isfile before open: opening a named pipe would block
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
