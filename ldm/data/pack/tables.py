"""Caption files: rows of a CSV, JSONL or Parquet table, one after another, and the captions in a row's cells."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import UsageError, first_line

Row = dict[str, Any]

_ROWS_AT_ONCE = 1000


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """The rows, each with its number from 1 on and at least these columns; lazily.

    Raises :class:`UsageError` for a missing or unreadable file, another kind of file and missing columns.
    """
    if not path.is_file():
        raise UsageError(f"caption file {path} does not exist; give a CSV, JSONL or Parquet file")
    rows = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(path.suffix.lower())
    if rows is None:
        raise UsageError(f"caption file {path} must end in .csv, .jsonl or .parquet")
    columns = list(dict.fromkeys(columns))
    try:
        yield from rows(path, columns)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"caption file {path} cannot be read ({error}); write it as UTF-8 text") from None


def texts_of(row: Row, columns: Sequence[str], where: str) -> tuple[str, ...]:
    """The captions in a row's cells, each a text, a list of texts or empty; ``where`` names the row in errors."""
    captions: list[str] = []
    for column in columns:
        cell = row[column]
        texts = cell if isinstance(cell, list) else [] if cell is None else [cell]
        if not all(isinstance(text, str) for text in texts):
            raise UsageError(f'{where}: "{column}" must be a text or a list of texts, not {cell!r}')
        captions += texts
    return tuple(captions)


def _require_columns(path: Path, wanted: list[str], columns: Sequence[str], where: str = "") -> None:
    lacking = [column for column in wanted if column not in columns]
    if lacking:
        raise UsageError(
            f"{path}{where} lacks the column {' and '.join(lacking)} (found: {', '.join(map(str, columns)) or 'none'}); "
            "give the right names as image_column and caption_columns"
        )


def _csv_rows(path: Path, wanted: list[str]) -> Iterator[tuple[int, Row]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _require_columns(path, wanted, list(reader.fieldnames or ()))
        for number, row in enumerate(reader, start=1):
            # the first is the file's name, the others are captions
            yield number, row | {column: _several(row[column]) for column in wanted[1:]}


def _several(cell: str | None) -> str | list[str] | None:
    """A CSV cell that holds a JSON list of texts => the list; any other text may start with a bracket too."""
    if cell is not None and cell.lstrip().startswith("["):
        try:
            value = json.loads(cell)
        except (json.JSONDecodeError, RecursionError):
            return cell
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            return value
    return cell


def _jsonl_rows(path: Path, wanted: list[str]) -> Iterator[tuple[int, Row]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UsageError(f"{path}, row {number} is not JSON ({error}); write one object to a line") from None
            if not isinstance(row, dict):
                raise UsageError(f"{path}, row {number} is not a JSON object; write file and caption to each line")
            _require_columns(path, wanted, list(row), f", row {number}")
            yield number, row


def _parquet_rows(path: Path, wanted: list[str]) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"reading {path} needs pyarrow; run `pip install pyarrow`, or give a CSV file") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_columns(path, wanted, list(file.schema_arrow.names))
            number = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"caption file {path} is not readable Parquet ({first_line(error)})") from None
