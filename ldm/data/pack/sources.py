"""Sources of images to pack: a folder, a table that names files, Parquet files or a Hugging Face data set that hold images, or
a class of your own.

A source lists its items in a fixed order, lazily and as often as asked, and loads each by itself: :class:`ImageSource`. The
listing is never held in memory, however long it is.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import sqlite3
import tempfile
import unicodedata
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import TypedDict

from ldm.data.decode import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    MAX_SAMPLE_JSON_BYTES,
    MAX_TEXT_BYTES,
    DecodeError,
    captions_called,
    captions_of,
)
from ldm.data.manifest import tar_paths
from ldm.data.pack.prepare import NO_EXTRAS
from ldm.data.pack.tables import (
    CAPTION_COLUMNS,
    CaptionColumns,
    Columns,
    MissingColumnError,
    Row,
    columns_in,
    parquet_rows,
    parquet_schema,
    read_table,
    texts_of,
)
from ldm.errors import LdmError, UsageError, first_line
from ldm.files import open_regular, read_bytes, read_json, require_folder
from ldm.images import KIND_BYTES, is_image, kind_of
from ldm.terminal import printable

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
# Of these the first that is there, in either case, holds the captions beside an image, with what its .json adds.
TEXT_SUFFIXES = (".txt", ".caption", ".tags")
# Tables of a folder's captions by file name, as the Hub's image folders have them; those in deeper folders come first.
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# The list of images and their settings in an output folder of ``ldm sample``.
GENERATED = "run.json"

_ALLOWED = frozenset(("JPEG", "PNG", "WebP"))
_TEXTS = frozenset((*TEXT_SUFFIXES, ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow"))
_FORMS = ("NFC", "NFD")  # Unicode forms of one name: macOS and archives made on it have accents as characters of their own
_ROWS_AT_ONCE = 1000
_IMAGES_AT_ONCE = 32
# Names of one folder that are sorted in memory; more are sorted through temporary files.
_NAMES_AT_ONCE = 100_000


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a source's listing.

    Attributes:
        key: unique name: a path relative to the source (with /), or ``split/row`` of a data set. Packing stores it.
        captions: those that the listing itself holds; None where :meth:`ImageSource.load` finds them.
        problem: why it cannot be used, where the listing itself shows that; it is not loaded.
        named: of those captions the ones of each name, where they have names.
    """

    key: str
    captions: tuple[str, ...] | None = None
    problem: str | None = None
    named: Mapping[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _EmbeddedItem(Item):
    """An item with its image, which is read with the listing."""

    image: Any = None


class LoadedImage(NamedTuple):
    """What a source holds of one item.

    Attributes:
        data: the encoded image file: JPEG, PNG or WebP.
        captions: one or several; not used where images are packed without captions.
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
        read_captions: False where images are packed without captions: a source need not look for any.
        require_captions: False where an item without a caption is given one by the packer; then it is loaded with none.
        tables: files that list the images or hold them, whose fingerprints the manifest has.
        identity: changes when the content changes but neither keys, captions nor :meth:`state` do.
    """

    identity = ""
    tables: Sequence[Path] = ()
    read_captions = True
    require_captions = True

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
            named = [dict(item.named)] if item.named else []
            digest.update(json.dumps([item.key, item.captions, self.state(item), *named]).encode())
        return found, digest.hexdigest()


class FolderSource(ImageSource):
    """The images of a folder and its subfolders, each with its captions in files beside it or in a table of the folder.

    The captions are those in the files of the same name (``.txt``, ``.caption`` or ``.tags``, and ``.json``), as
    :func:`ldm.data.decode.captions_of` reads them; where these hold none, those in the image's row of a ``metadata.jsonl``,
    ``.csv`` or ``.parquet`` of its folder or one above. A row that is malformed or names no image is an item, too.
    """

    def __init__(
        self, src: str | os.PathLike, metadata: Sequence[str] | None = None, names: Mapping[str, str] = NO_EXTRAS
    ) -> None:
        """
        Args:
            metadata: the tables of the folder, where they are known.
            names: captions by name, and what each is called here: the captions of ``short`` called ``brief`` are those in
                ``photo.brief.txt``, in a field of ``photo.json``, or in a column of a metadata table. ``txt``, ``caption`` and
                ``tags`` are also the files with these endings.
        """
        super().__init__(src)
        self._metadata, self.names = metadata, names

    def items(self) -> Iterator[Item]:
        if self._metadata is None:
            self._metadata = [file for file in sorted_files(self.src) if os.path.basename(file) in METADATA_NAMES]
        try:
            read = self._metadata if self.read_captions else []
            self.tables = [self.src / file for file in read]
            with closing(_Metadata(self.src, read, self.names)) as rows:
                for file in image_files(self.src):
                    captions, named = rows.captions(file)
                    yield Item(file, captions, named=named)
                yield from rows.problems()
        except sqlite3.Error as error:
            raise LdmError(f"the tables of {self.src} cannot be kept in a temporary file ({error}); set TMPDIR") from None

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
        beside = list(_caption_files(self.src, item.key)) if self.read_captions else []
        beside += [self._named_file(item.key, called) for called in self.names.values()]
        return " ".join(_stat(path) for path in (path, *beside) if path is not None)

    def load(self, item: Item) -> LoadedImage:
        path = os.path.join(self.src, item.key)
        data = _read(path, MAX_IMAGE_BYTES)
        kind = kind_of(data[:KIND_BYTES])
        if kind not in _ALLOWED and (kind or _suffix(path)[1:] not in IMAGE_EXTENSIONS):
            raise DecodeError("not an allowed format" + (f" ({kind}); convert it to JPEG, PNG or WebP" if kind else ""))
        if self.names:
            named = self.named_captions(item)
            return LoadedImage(data, [text for texts in named.values() for text in texts], _values(named))
        return LoadedImage(data, self.captions(item) if self.read_captions else (), _values(item.named))

    def named_captions(self, item: Item) -> Mapping[str, Sequence[str]]:
        """The captions of each name that an item has. Raises :class:`DecodeError` where there are none."""
        _, about = _caption_files(self.src, item.key)
        fields = None if about is None else _read(about, MAX_SAMPLE_JSON_BYTES)
        found: dict[str, Sequence[str]] = {}
        for name, called in self.names.items():
            file = self._named_file(item.key, called)
            texts = [] if file is None else _captions_in(file, None)
            if texts := texts or captions_called(called, None, fields) or item.named.get(name):
                found[name] = texts
        if not found:
            called = " or ".join(self.names.values())
            raise DecodeError(f"no caption called {called}: neither such a .txt nor such a field of a .json beside it")
        return found

    def _named_file(self, key: str, called: str) -> str | None:
        endings = (f".{called}.txt", *(suffix for suffix in TEXT_SUFFIXES if suffix == f".{called}"))
        return _file_beside(self.src, key, endings)

    def captions(self, item: Item) -> Sequence[str]:
        """The captions of an item. Raises :class:`DecodeError` where there are none."""
        text, about = _caption_files(self.src, item.key)
        if captions := _captions_in(text, about) or item.captions:
            return captions
        if not self.require_captions:
            return ()
        if text is not None or item.captions is not None:
            raise DecodeError("empty caption")
        if about is not None:
            raise DecodeError('no caption: neither "caption" nor "captions" nor "tags" in the .json beside it')
        raise DecodeError(f"no caption: no .json, {' or '.join(TEXT_SUFFIXES)} of the same name beside it")


class _Metadata:
    """The rows of a folder's metadata ``tables`` by file name, in a temporary file.

    A table or row without columns of files and captions is another program's, and ignored.
    """

    def __init__(self, src: Path, tables: Sequence[str], names: Mapping[str, str]) -> None:
        self._columns = Columns(captions=names, all_names=False)
        self._src, self._problems, self._rows = src, list[Item](), sqlite3.connect("")
        self._rows.execute(
            "CREATE TABLE rows (file BLOB PRIMARY KEY, source INT, place TEXT, captions TEXT, used INT DEFAULT 0)"
        )
        self._empty = not tables
        for number, table in enumerate(
            sorted(tables, key=lambda file: (-file.count("/"), METADATA_NAMES.index(os.path.basename(file))))
        ):
            with suppress(MissingColumnError):
                self._read(number, table)

    def _read(self, source: int, table: str) -> None:
        folder = os.path.dirname(table)
        rows = read_table(self._src / table, self._columns, lambda name: _names_image(self._src, os.path.join(folder, name)))
        for row in rows:
            where = os.path.join(folder, row.where)
            if row.lacks_column:
                continue
            if problem := row.problem or _outside(row.file):
                self._problems.append(Item(where, problem=problem))
                continue
            file = _name_bytes(os.path.normpath(os.path.join(folder, row.file)))
            there = self._rows.execute("SELECT source, place FROM rows WHERE file = ?", (file,)).fetchone()
            if there is None:
                captions = json.dumps([row.captions, row.named])
                self._rows.execute("INSERT INTO rows VALUES (?, ?, ?, ?, 0)", (file, source, where, captions))
            elif there[0] == source:
                self._problems.append(Item(where, problem=f"names {row.file} again, after {there[1]}"))

    def captions(self, file: str) -> tuple[tuple[str, ...] | None, dict[str, list[str]]]:
        """The captions in the row of an image, and by name where they have names; None where it has no row."""
        if self._empty:
            return None, {}
        name = _name_bytes(file)
        row = self._rows.execute("SELECT captions FROM rows WHERE file = ?", (name,)).fetchone()
        if row is None:
            return None, {}
        self._rows.execute("UPDATE rows SET used = 1 WHERE file = ?", (name,))
        captions, named = json.loads(row[0])
        return tuple(captions), named

    def problems(self) -> Iterator[Item]:
        """An item for each row that is malformed, or names a file that has not been asked for."""
        yield from self._problems
        for file, place in self._rows.execute("SELECT file, place FROM rows WHERE NOT used ORDER BY source, rowid"):
            yield Item(place, problem=f"names {os.fsdecode(file)}, which is no image in the folder")

    def close(self) -> None:
        self._rows.close()


class _Prompt(TypedDict):
    prompt: str


class _Generated(TypedDict):
    """``run.json`` of ``ldm sample``, as far as it is read here."""

    images: dict[str, _Prompt]


class GeneratedSource(FolderSource):
    """The images of an output folder of ``ldm sample``, without its grid; their captions are their prompts.

    Its ``run.json`` names both. An image that is not there is an item that cannot be used.
    """

    def items(self) -> Iterator[Item]:
        listed = read_json(self.src / GENERATED, _Generated)["images"]
        for name, settings in sorted(listed.items()):
            known = name == os.path.basename(name) and os.path.isfile(os.path.join(self.src, name))
            problem = None if known else "is listed in run.json but has not been generated; run the same ldm sample again"
            yield Item(name, (settings["prompt"],), problem)


class TableSource(FolderSource):
    """The images that a CSV, TSV, JSONL or Parquet file names (relative to the folder), in the order of its rows.

    A malformed row is an item that cannot be used.
    """

    def __init__(self, src: Path, table: Path, file_column: str | None = None, caption_columns: CaptionColumns = ()) -> None:
        super().__init__(src)
        self.table, self.file_column, self.caption_columns = table, file_column, caption_columns
        self.tables = [table]

    def items(self) -> Iterator[Item]:
        return (item for _, item in self._rows())

    def _rows(self) -> Iterator[tuple[str, Item]]:
        columns = Columns(self.file_column, self.caption_columns, self.read_captions)
        for row in read_table(self.table, columns, lambda name: os.path.isfile(os.path.join(self.src, name))):
            problem = row.problem or _outside(row.file)
            name = str(PurePosixPath(row.file))
            file = existing_name(self.src, name) or name
            item = Item(row.where, problem=problem) if problem else Item(file, row.captions, named=row.named)
            yield row.where, item

    def checked_items(self) -> Iterator[Item]:
        hashes = array("Q")  # 8 bytes a row: the names themselves would not fit
        missing, first_missing = 0, ""
        for item in self.items():
            if item.problem is None:
                hashes.append(hash_of(item.key))
                if not os.path.isfile(os.path.join(self.src, item.key)):
                    first_missing = first_missing or item.key
                    missing += 1
            else:
                hashes.append(hash_of(f"/{item.key}"))  # no name of a file
            yield item
        if missing:
            raise UsageError(
                f"{self.table} names {printable(first_missing)}{_form(first_missing)}, which is not in {self.src} "
                f"({missing} such in all); correct the column of files or bring the images back"
            )
        if not hashes:
            raise UsageError(f"caption file {self.table} holds no row; each image needs one, with file and caption")
        self._refuse_duplicates(np.sort(np.frombuffer(hashes, np.uint64)))

    def _refuse_duplicates(self, hashes: np.ndarray) -> None:
        doubtful = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        seen: set[str] = set()
        for where, item in self._rows() if doubtful else ():
            if item.problem is None and item.key in seen:
                raise UsageError(
                    f"{self.table.parent / where}: {printable(item.key)} is named twice; give all its captions in one row"
                )
            if hash_of(item.key) in doubtful:
                seen.add(item.key)

    def state(self, item: Item) -> str:
        return _stat(os.path.join(self.src, item.key))

    def captions(self, item: Item) -> Sequence[str]:
        return item.captions or ()


class DatasetSource(ImageSource):
    """What ``datasets.Dataset.save_to_disk``, or that of a ``DatasetDict``, wrote: split after split, row after row."""

    def __init__(
        self, src: Path, image_column: str | None, caption_columns: CaptionColumns, read_captions: bool = True
    ) -> None:
        super().__init__(src)
        self.read_captions = read_captions
        try:
            import datasets
        except ImportError:
            raise UsageError(f"reading {src} needs datasets; run `pip install datasets`") from None
        datasets.disable_progress_bars()
        if other := next((file for file in sorted_files(src) if not os.path.isfile(os.path.join(src, file))), None):
            raise UsageError(f"{src} cannot be loaded by datasets: {printable(other)} is not a regular file; move it away")
        try:
            loaded = datasets.load_from_disk(str(src))
        except Exception as error:  # from pyarrow, json, fsspec and others, depending on the damage
            raise UsageError(
                f"{src} cannot be loaded by datasets ({first_line(error)}); save it with save_to_disk again"
            ) from None
        self._images: dict[str, tuple[str, Any]] = {}
        self._captions: dict[str, tuple[CaptionColumns, Any]] = {}
        for name, split in loaded.items() if isinstance(loaded, datasets.DatasetDict) else [("", loaded)]:
            name = str(name)
            where = f"split {name} of {src}" if name else str(src)
            split = split.with_format(None)
            (image,) = _choose([image_column] if image_column else [], IMAGE_COLUMNS, split.column_names, where, "image")
            captions = _choose(caption_columns, CAPTION_COLUMNS, split.column_names, where, "caption") if read_captions else []
            self._captions[name] = captions, split.select_columns(columns_in(captions))
            if isinstance(split.features[image], datasets.Image):
                split = split.cast_column(image, datasets.Image(decode=False))  # the file's own bytes
            self._images[name] = image, split.select_columns(image)
        # rows have no state; the files that hold them do
        files = [file for file in sorted_files(src) if file.endswith((".arrow", ".json"))]
        self.identity = json.dumps([(file, _stat(os.path.join(src, file))) for file in files])

    def items(self) -> Iterator[Item]:
        for name, (columns, split) in self._captions.items():
            prefix = f"{name}/" if name else ""
            if not columns:
                yield from (Item(f"{prefix}{number:09d}") for number in range(len(self._images[name][1])))
                continue
            number = 0
            names = columns_in(columns)
            for batch in split.iter(_ROWS_AT_ONCE):
                for cells in zip(*(batch[column] for column in names), strict=True):
                    yield Item(f"{prefix}{number:09d}", *_texts(dict(zip(names, cells, strict=True)), columns))
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
        return LoadedImage(data, item.captions or (), _values(item.named))


class ParquetSource(ImageSource):
    """Parquet tables that hold images themselves, as data sets on the Hub are kept: table after table, row after row.

    The column of images holds bytes, or structs of ``bytes`` and ``path``; a path without bytes is a file in the folder.
    """

    def __init__(
        self,
        src: Path,
        tables: Sequence[str],
        image_column: str | None = None,
        caption_columns: CaptionColumns = (),
        read_captions: bool = True,
    ) -> None:
        """``tables``: paths in ``src``."""
        super().__init__(src)
        self.read_captions = read_captions
        self._tables: dict[str, tuple[str, CaptionColumns]] = {}
        for table in tables:
            schema, where = parquet_schema(src / table), f"{src / table}"
            image = embedded_column(schema, image_column)
            if image is None:
                raise UsageError(
                    f"{where} has no column of images in bytes (found: {', '.join(schema.names)}); name it as image_column"
                )
            captions = _choose(caption_columns, CAPTION_COLUMNS, schema.names, where, "caption") if read_captions else []
            self._tables[table] = image, captions
        self.tables = [src / table for table in tables]
        self.identity = json.dumps([(table, _stat(os.path.join(src, table))) for table in tables])

    def items(self) -> Iterator[Item]:
        return self._items(True)

    def checked_items(self) -> Iterator[Item]:
        item = None
        for item in self._items(False):
            yield item
        if item is None:
            raise UsageError(f"{self.src} holds no row; give tables that do")

    def _items(self, with_images: bool) -> Iterator[Item]:
        for table, (image, captions) in self._tables.items():
            name = os.path.splitext(os.path.basename(table) if os.path.isabs(table) else table)[0]
            # a table may have no other column: then the images are read to count the rows
            columns = columns_in(captions)
            columns = [*columns, image] if with_images or not columns else columns
            for number, row in parquet_rows(self.src / table, columns, _IMAGES_AT_ONCE if image in columns else _ROWS_AT_ONCE):
                image_cell = row[image] if with_images else None
                yield _EmbeddedItem(f"{name}/{number - 1:09d}", *_texts(row, captions), image_cell)

    def load(self, item: Item) -> LoadedImage:
        assert isinstance(item, _EmbeddedItem)
        value = item.image if isinstance(item.image, dict) else {"bytes": item.image}
        data, path = value.get("bytes"), value.get("path")
        if data is None and isinstance(path, str) and not _outside(path):
            data = _read(os.path.join(self.src, path), MAX_IMAGE_BYTES)
        if not isinstance(data, bytes):
            raise DecodeError("no bytes of an image")
        return LoadedImage(data, item.captions or (), _values(item.named))


def embedded_column(schema: Any, asked: str | None = None) -> str | None:
    """The column of a ``pyarrow.Schema`` that holds images: the one asked for, or the first; None where none does."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    for name in [asked] if asked else dict.fromkeys([*IMAGE_COLUMNS, *schema.names]):
        if (index := schema.get_field_index(name)) >= 0:  # there, and once
            kind = schema.field(index).type
            inside = kind.get_field_index("bytes") if types.is_struct(kind) else -1
            if is_bytes(kind.field(inside).type) if inside >= 0 else is_bytes(kind) and (asked or name in IMAGE_COLUMNS):
                return name
    return None


def open_pack_source(
    src: str | os.PathLike,
    captions: str | os.PathLike | None = None,
    image_column: str | None = None,
    caption_columns: CaptionColumns = (),
    read_captions: bool = True,
) -> ImageSource:
    """The source for what a user names.

    Args:
        src: a folder of images, a saved data set, a Parquet file of images or a folder of such.
        captions: a table that lists images of ``src``.
        image_column, caption_columns: of ``captions``, the data set or the Parquet files. Captions with names may be of a
            folder of images, too: see :class:`FolderSource`.
        read_captions: False: pack images alone.

    Raises:
        UsageError: for anything else.
    """
    columns = image_column, caption_columns, read_captions
    if _suffix(os.fspath(src)) == ".parquet" and os.path.isfile(src):
        return ParquetSource(Path(src).parent, [Path(src).name], *columns)
    src = require_folder(src, "a folder of images to pack")
    if captions is not None:
        table = Path(captions)
        if (
            table.suffix.lower() == ".parquet"
            and os.path.isfile(table)
            and embedded_column(parquet_schema(table), image_column)
        ):
            return ParquetSource(src, [str(table.absolute())], *columns)
        source = TableSource(src, table, image_column, caption_columns)
    elif (src / "dataset_dict.json").is_file() or ((src / "state.json").is_file() and (src / "dataset_info.json").is_file()):
        return DatasetSource(src, *columns)
    elif is_generated(src):
        source = GeneratedSource(src)
    elif tables := _with_images(src, found := _tables_in(src), image_column):
        return ParquetSource(src, tables, *columns)
    elif image_column or (caption_columns and not isinstance(caption_columns, Mapping)):
        raise UsageError(f"columns are named, but {src} is a folder of images; give the table that has them as captions")
    else:
        names = caption_columns if isinstance(caption_columns, Mapping) else {}
        source = FolderSource(src, [table for table in found if os.path.basename(table) in METADATA_NAMES], names)
    source.read_captions = read_captions
    return source


def is_generated(src: Path) -> bool:
    """Whether a folder is an output folder of ``ldm sample``, and no other program's. Raises LdmError for a broken list:
    without it the grid would count as an image."""
    content = read_json(src / GENERATED) if (src / GENERATED).is_file() else None
    return isinstance(content, dict) and {"images", "model_hash"} <= content.keys()


def _tables_in(src: Path) -> list[str]:
    """The metadata tables and Parquet files of a folder."""
    return [file for file in sorted_files(src) if _suffix(file) == ".parquet" or os.path.basename(file) in METADATA_NAMES]


def _with_images(src: Path, tables: Sequence[str], image_column: str | None) -> list[str]:
    """The Parquet files that hold images. Raises :class:`UsageError` where the folder has files of images as well."""
    tables = [table for table in tables if _suffix(table) == ".parquet"]
    try:
        tables = [table for table in tables if embedded_column(parquet_schema(src / table), image_column)]
    except UsageError:
        if next(image_files(src), None) is None:
            raise
        return []  # beside files of images it need not be readable
    if tables and (file := next(image_files(src), None)) is not None:
        kinds = f"images in {tables[0]} and as files ({printable(file)})"
        raise UsageError(f"{src} holds {kinds}; pack one of them: give {src / tables[0]}, or move it away")
    return tables


def image_files(src: Path) -> Iterator[str]:
    """The files of a folder and its subfolders that are images by their name or by how they begin, in order."""
    return (file for file in sorted_files(src) if _names_image(src, file))


def _names_image(src: Path, file: str) -> bool:
    """Whether a file of a folder is there and an image, of whatever format."""
    if _suffix(file) in _TEXTS:
        return False
    path = os.path.join(src, file)
    if is_image(file):
        return os.path.lexists(path)
    with suppress(LdmError, OSError), open_regular(path) as opened:
        return kind_of(opened.read(KIND_BYTES)) is not None
    return False


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


def _name_bytes(file: str) -> bytes:
    return os.fsencode(unicodedata.normalize("NFC", file))


def _choose(asked: CaptionColumns, usual: Sequence[str], columns: Sequence[str], where: str, what: str) -> CaptionColumns:
    """The columns asked for, or the first of the usual ones."""
    chosen = asked or [column for column in usual if column in columns][:1]
    lacking = [column for column in columns_in(chosen) if column not in columns]
    if lacking or not chosen:
        raise UsageError(
            f"{where} lacks the column {' and '.join(lacking) or ' or '.join(usual)} (found: {', '.join(columns)}); "
            f"give the right one as {what}_column{'s' * (what == 'caption')}"
        )
    return chosen


def hash_of(name: str) -> int:
    """A hash of 64 bits of a key, equal in both Unicode forms."""
    name = unicodedata.normalize("NFC", name)
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def existing_name(folder: str | os.PathLike, name: str) -> str | None:
    """``name`` (a path in ``folder``, with /) as the folder has it, in whichever Unicode form; None where it has not."""
    if os.path.exists(os.path.join(folder, name)):
        return name
    if name.isascii():
        return None
    found = ""
    for part in name.split("/"):
        forms = dict.fromkeys((part, *(unicodedata.normalize(form, part) for form in _FORMS)))
        part = next((form for form in forms if os.path.exists(os.path.join(folder, found, form))), None)
        if part is None:
            return None
        found = os.path.join(found, part)
    return found


def _form(name: str) -> str:
    """Which Unicode form a name has, where the forms differ, for messages: on the screen they look the same."""
    forms = [form for form in _FORMS if unicodedata.is_normalized(form, name)]
    if len(forms) == len(_FORMS):
        return ""
    return f" (in Unicode form {' '.join(forms) or 'neither NFC nor NFD'}; no other form is there)"


def _outside(name: str) -> str | None:
    """What is wrong with a path that does not lie in the folder of the images; None where nothing is."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        return f"must be a path relative to the folder of the images, not {name[:200]}"
    return None


def _texts(row: Row, columns: CaptionColumns) -> tuple[tuple[str, ...], str | None, dict[str, list[str]]]:
    """Captions, problem, and captions by name of an item."""
    try:
        captions, named = texts_of(row, columns)
        return captions, None, named
    except DecodeError as error:
        return (), str(error), {}


def _values(named: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Captions by name as values of a sample's json: a text, or a list of several."""
    return {name: [*texts] if len(texts) > 1 else texts[0] for name, texts in named.items()}


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _stat(path: str) -> str:
    try:
        about = os.stat(path)
    except OSError:
        return "-"
    return f"{about.st_size} {about.st_mtime_ns}"


def _caption_files(src: Path, file: str) -> tuple[str | None, str | None]:
    """The text file and the .json with the captions of an image: of its name without the extension, or with it."""
    return _file_beside(src, file, TEXT_SUFFIXES), _file_beside(src, file, (".json",))


def _file_beside(src: Path, file: str, endings: Sequence[str]) -> str | None:
    """The first that there is of the files with these endings and the name of an image, without its extension or with it."""
    names = (os.path.splitext(file)[0], file)
    candidates = (name + case for name in names for ending in endings for case in (ending, ending.upper()))
    there = next(filter(None, (existing_name(src, candidate) for candidate in candidates)), None)
    return None if there is None else os.path.join(src, there)


def _captions_in(text: str | None, about: str | None) -> Sequence[str]:
    """The captions in the files beside an image. A text file needs no sound .json."""
    data = None if text is None else _read(text, MAX_TEXT_BYTES)
    if data is not None and _suffix(text or "") == ".tags":
        data = b", ".join(data.split(b"\n"))
    try:
        return captions_of(data, None if about is None else _read(about, MAX_SAMPLE_JSON_BYTES))
    except DecodeError:
        if data is None or about is None:
            raise
        return captions_of(data, None)


def _read(path: str, limit: int) -> bytes:
    what = os.path.splitext(path)[1] or "it"
    if not os.path.isfile(path):
        raise DecodeError(f"{what} is not a regular file")
    try:
        return read_bytes(path, limit)
    except LdmError as error:
        raise DecodeError(f"{what} {str(error).removeprefix(printable(path)).strip().rpartition('; ')[0]}") from None
