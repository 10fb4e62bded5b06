"""Rows of files: .jsonl, .csv and .parquet, with the line of each, and data sets of `datasets`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ppo_fast.loop.values import shown

Numbered = Iterator[tuple[int, Any]]
"""(line number from 1, value or the ValueError of reading it)."""


class TableError(ValueError):
    """A file or data set of which no row can be read."""


def json_rows(path: Path) -> Numbered:
    """The values of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, ValueError(f"not a line of JSON: {error}")


def csv_rows(path: Path) -> Numbered:
    """The records under a first line of names; a number is that of a record's last line."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                # Where the next record begins is not known: what follows would be left out.
                raise TableError(
                    f"{path}:{reader.reader.line_num}: not a record of CSV: {error}"
                ) from None
            names = reader.fieldnames or []
            if None in row or None in row.values():
                n = sum(value is not None for value in row.values())
                n += len(row.get(None) or []) - (None in row)
                wrong = ValueError(f"must have the {len(names)} fields of the first line, got {n}")
                yield reader.line_num, wrong
            else:
                yield reader.line_num, row


def parquet_rows(path: Path, known: tuple[str, ...] | None = None) -> Numbered:
    """The rows, their `known` columns only (default: all); a number is that of a row."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; reading {path} needs: pip install 'ppo_fast[transitions]'"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = [n for n in file.schema_arrow.names if known is None or n in known]
            for batch in file.iter_batches(columns=names):
                for i in range(len(batch)):
                    number += 1
                    yield number, _parquet_row(batch, i)
    except ArrowException as error:
        raise TableError(f"{path}: not a parquet file: {error}") from None


def _parquet_row(batch: Any, i: int) -> Any:
    """Row `i` of a record batch, or a ValueError with the field that is no UTF-8."""
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[i].as_py()
        except UnicodeDecodeError as error:
            return ValueError(f"{name} must be UTF-8, got {shown(error.object)}")
    return row


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}


def dataset_rows(name: str, split: str) -> Numbered:
    """The rows of a data set that `datasets` loads: a folder that it saved, or a name of a hub.

    No code of the data set's own is run. A number is that of a row.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: data {name!r} is none of {', '.join(READERS)}, and a data set needs:"
            " pip install datasets"
        ) from None
    folder = Path(name)
    saved = folder.is_dir() and any(
        (folder / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")
    )
    try:
        found: Any = (
            datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
        )
        if isinstance(found, dict):
            found = found[split]
    except Exception as error:  # the library's own, of many kinds
        raise TableError(f"data {name!r}, split {split!r}: {error}") from error
    yield from enumerate(found, 1)
