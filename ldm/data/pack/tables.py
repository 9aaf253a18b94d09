"""Tables of captions: rows of a CSV, TSV, JSONL or Parquet file, one after another, and the captions in a row's cells.

Parsing is strict. A malformed row is given with its line number and the reason, and the rows after it are read as if it were
not there: an unclosed quote swallows no row.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from ldm.data.decode import DecodeError, joined_tags
from ldm.errors import LdmError, UsageError, first_line
from ldm.files import open_regular
from ldm.terminal import printable

Row = dict[str, Any]
# the columns of captions, or which column holds the captions of a name
CaptionColumns = Sequence[str] | Mapping[str, str]

FILE_COLUMNS = ("file", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "tags")
KINDS = (".csv", ".tsv", ".jsonl", ".parquet")

_ROWS_AT_ONCE = 1000
# a line may hold many captions; a file without line breaks must not fill the memory
_MAX_LINE = 2**22
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Columns:
    """Which columns hold an image's file and its captions; None and (): the first of the usual ones.

    Attributes:
        file: a path.
        captions: of several, all captions.
        needs_captions: False: a table need not have any.
        all_names: of captions with names, all columns must be there; False: one of them.
    """

    file: str | None = None
    captions: CaptionColumns = ()
    needs_captions: bool = True
    all_names: bool = True

    def of(self, found: Sequence[str]) -> tuple[str, CaptionColumns]:
        """The columns of a table that has those ``found``. Raises :class:`DecodeError` where one is missing or there twice."""
        file = self.file or next((name for name in FILE_COLUMNS if name in found), FILE_COLUMNS[0])
        captions = self.captions or [name for name in CAPTION_COLUMNS if name in found][:1]
        if isinstance(captions, Mapping) and not self.all_names:
            captions = {name: column for name, column in captions.items() if column in found} or captions
        wanted = [file, *(columns_in(captions) or CAPTION_COLUMNS[:1])] if self.needs_captions else [file]
        if lacking := [name for name in wanted if name not in found]:
            raise _LacksColumn(
                f"lacks the column {' and '.join(lacking)} (found: {', '.join(map(str, found)) or 'none'}); give the right "
                "names as image_column and caption_columns"
            )
        if twice := [name for name in wanted if list(found).count(name) > 1]:
            raise DecodeError(f"has the column {twice[0]} twice; rename one of them")
        return file, captions if self.needs_captions else []


def columns_in(captions: CaptionColumns) -> list[str]:
    """The columns, each once."""
    return list(dict.fromkeys(captions.values() if isinstance(captions, Mapping) else captions))


class MissingColumnError(UsageError):
    """A table without the columns that are wanted."""


class _LacksColumn(DecodeError):
    """A row without them."""


@dataclass(frozen=True)
class TableRow:
    """One row: where it is (``captions.csv, line 3``), and its file and captions, or why it cannot be used.

    ``named``: the captions by name, where they have names. ``lacks_column``: because it has none of the columns for these.
    """

    where: str
    file: str = ""
    captions: tuple[str, ...] = ()
    named: Mapping[str, list[str]] = field(default_factory=dict)
    problem: str | None = None
    lacks_column: bool = False


def read_table(path: Path, columns: Columns, names_image: Callable[[str], bool] = lambda name: False) -> Iterator[TableRow]:
    """The rows, lazily. ``names_image`` tells whether a text is the path of an image: a cell must not swallow its row.

    Raises :class:`UsageError` for a missing or unreadable file, another kind of file, text that is not UTF-8, and for columns
    that a CSV, TSV or Parquet file lacks.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise UsageError(f"caption file {printable(path)} must end in {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    try:
        # for Parquet, which is opened by its reader, this is the check alone
        with open_regular(path, f"give a table of captions ({', '.join(KINDS)})") as file:
            if kind == ".parquet":
                rows = parquet_rows(path, _parquet_columns(path, columns))
            elif kind == ".jsonl":
                rows = _jsonl_rows(_lines(file, path))
            else:
                rows = _csv_rows(_lines(file, path), path, "\t" if kind == ".tsv" else ",", columns, names_image)
            unit = "row" if kind == ".parquet" else "line"
            by_row = replace(columns, all_names=False)  # a line of JSON may leave a column out
            for number, row in rows:
                yield _table_row(f"{path.name}, {unit} {number}", row, by_row)
    except UsageError:
        raise
    except LdmError as error:
        raise UsageError(f"caption file {error}") from None


def _table_row(where: str, row: Row | DecodeError, columns: Columns) -> TableRow:
    try:
        if isinstance(row, DecodeError):
            raise row
        file_column, caption_columns = columns.of(list(row))
        file = row[file_column]
        if not isinstance(file, str) or not file.strip():
            raise DecodeError(f'"{file_column}" must be the path of an image')
        try:
            file.encode()
        except UnicodeEncodeError:
            raise DecodeError(f'"{file_column}" holds half a surrogate pair') from None
        return TableRow(where, file.strip(), *texts_of(row, caption_columns))
    except DecodeError as error:
        return TableRow(where, problem=str(error), lacks_column=isinstance(error, _LacksColumn))


def texts_of(row: Row, columns: CaptionColumns) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """The captions in a row's cells, and those of each name, where they have names.

    A cell is a text, a list of texts or empty; a list in ``tags`` is one caption, and a caption with a name may be a whole
    number (a class). Raises :class:`DecodeError` for other values.
    """
    by_name = isinstance(columns, Mapping)
    named: dict[str, list[str]] = {}
    for name, column in columns.items() if by_name else ((column, column) for column in columns_in(columns)):
        cell = row[column]
        if column == "tags" and isinstance(cell, list):
            cell = joined_tags(cell) or cell
        texts = cell if isinstance(cell, list) else [] if cell is None else [cell]
        texts = [str(text) if by_name and type(text) is int else text for text in texts]
        if not all(isinstance(text, str) for text in texts):
            raise DecodeError(f'"{column}" must be a text or a list of texts, not {repr(cell)[:60]}')
        named[name] = texts
    captions = tuple(text for texts in named.values() for text in texts)
    return captions, {name: texts for name, texts in named.items() if any(map(str.strip, texts))} if by_name else {}


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, numbered from 1, with their ends."""
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    for number, line in enumerate(iter(partial(text.readline, _MAX_LINE), ""), start=1):
        if not line.isascii() and _NOT_UTF8.search(line):
            raise UsageError(
                f"caption file {printable(path)}, line {number}, cannot be read (not UTF-8); save it as UTF-8 text"
            )
        if len(line) == _MAX_LINE:
            raise UsageError(f"caption file {printable(path)}, line {number}, has more than {_MAX_LINE} characters; split it")
        yield number, line


def _csv_rows(
    lines: Iterator[tuple[int, str]], path: Path, delimiter: str, columns: Columns, names_image: Callable[[str], bool]
) -> Iterator[tuple[int, Row | DecodeError]]:
    header: list[str] | None = None
    captions: CaptionColumns = ()
    file_at, doubtful = 0, 0  # lines up to this one were inside a quote that should have been closed
    waiting: deque[tuple[int, str]] = deque()
    while True:
        taken: list[tuple[int, str]] = []
        reader = csv.reader(_taking(waiting, lines, taken), delimiter=delimiter, strict=True)
        try:
            cells = next(reader, None)
            if cells is None:
                break
            if not cells:  # an empty line
                continue
            problem = None
            if header is not None:
                problem = _swallowed(taken[1:], delimiter, file_at, names_image)
                if taken[0][0] <= doubtful and taken[0][1].count('"') % 2:
                    problem = "has a quote without its partner"
        except csv.Error as error:
            cells, problem = [], f"is not a row of a table ({error}); check its quotes"
        number = taken[0][0]
        if problem is not None:
            waiting.extendleft(reversed(taken[1:]))
            doubtful = max(doubtful, taken[-1][0])
        elif header is not None and len(cells) != len(header):
            problem = f"has {len(cells)} cells, the header has {len(header)}; put a caption with a {delimiter!r} in quotes"
        if header is None:
            header = cells
            try:
                if problem is not None:
                    raise DecodeError(problem)
                file, captions = columns.of(header)
            except DecodeError as error:
                raise MissingColumnError(f"{printable(path)} {error}") from None
            file_at = header.index(file)
        elif problem is not None:
            yield number, DecodeError(problem)
        else:
            row = dict(zip(header, cells, strict=True))
            yield number, row | {column: _several(row[column]) for column in columns_in(captions)}
    if header is None:
        raise MissingColumnError(f"{printable(path)} lacks the column {FILE_COLUMNS[0]} and {CAPTION_COLUMNS[0]} (found: none)")


def _taking(waiting: deque[tuple[int, str]], lines: Iterator[tuple[int, str]], taken: list[tuple[int, str]]) -> Iterator[str]:
    """The lines that wait, then the others; each is recorded in ``taken``."""
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        taken.append(line)
        yield line[1]


def _swallowed(
    inside: Sequence[tuple[int, str]], delimiter: str, file_at: int, names_image: Callable[[str], bool]
) -> str | None:
    """A caption may have several lines; but one of them that is a row of its own shows that a quote was not closed."""
    for number, line in inside:
        with contextlib.suppress(csv.Error):
            row = next(csv.reader([line], delimiter=delimiter), [])
            if len(row) > max(file_at, 1) and names_image(row[file_at].strip()):
                return f"has a quote that is not closed before line {number}, the row of {row[file_at].strip()}"
    return None


def _several(cell: str) -> str | list[str]:
    """A CSV cell that holds a JSON list of texts => the list; any other text may start with a bracket too."""
    if cell.lstrip().startswith("["):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            return value
    return cell


def _jsonl_rows(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Row | DecodeError]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            yield number, DecodeError(f"is not JSON ({first_line(error)[:200]}); write one object to a line")
            continue
        yield number, row if isinstance(row, dict) else DecodeError("is not a JSON object; write file and caption to each line")


def _without_repeats(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key comes twice")
    return row


def _parquet_columns(path: Path, columns: Columns) -> list[str]:
    try:
        file, captions = columns.of(parquet_schema(path).names)
    except DecodeError as error:
        raise MissingColumnError(f"{printable(path)} {error}") from None
    return [file, *columns_in(captions)]


def parquet_schema(path: Path) -> Any:
    """The ``pyarrow.Schema`` of a Parquet file. Raises :class:`UsageError` as :func:`parquet_rows` does."""
    with _parquet(path) as file:
        return file.schema_arrow


def parquet_rows(path: Path, columns: Sequence[str], at_once: int = _ROWS_AT_ONCE) -> Iterator[tuple[int, Row]]:
    """The rows of a Parquet file, numbered from 1, with these columns; so many of them are in memory.

    Raises :class:`UsageError` where it cannot be read, or pyarrow is not installed.
    """
    number = 0
    with _parquet(path) as file:
        for batch in file.iter_batches(at_once, columns=list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield number, row


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"reading {printable(path)} needs pyarrow; run `pip install pyarrow`, or give a CSV file") from None
    try:
        with open_regular(path), pyarrow.parquet.ParquetFile(path) as file:  # which would wait for the writer of a named pipe
            yield file
    except LdmError as error:
        raise UsageError(str(error)) from None
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UsageError(f"{printable(path)} is not readable Parquet ({printable(first_line(error))})") from None
