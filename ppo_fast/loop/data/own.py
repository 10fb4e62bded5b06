"""Prompts of a user's own: a file or a data set, each row checked before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ppo_fast.loop.config import OptionError
from ppo_fast.loop.data.prompts import Row, as_row
from ppo_fast.loop.data.tables import READERS, TableError, dataset_rows
from ppo_fast.loop.values import shown


class DataError(OptionError):
    """Data of a user's own from which no prompt can be taken."""


def read_prompts(
    data: str,
    field: str = "prompt",
    split: str = "train",
    report: Callable[[str], None] = print,
) -> list[Row]:
    """The rows of `data`: a .jsonl, .csv or .parquet, or a data set that `datasets` loads.

    `field` is the prompt, a text or messages; every other field is a column. A bad row is left out
    and named to `report` by file and line (of parquet and data sets: the row, from 1).

    Raises:
        DataError: no such file, no row at all, or no good one.
        ModuleNotFoundError: parquet without pyarrow, a data set without datasets.
    """
    path = Path(data)
    reader = READERS.get(path.suffix)
    if reader is not None and not path.is_file():
        what = ", no regular file" if path.exists() else ""
        raise DataError(f"data must be a file that exists, got {data}{what}")
    rows, faults = [], []
    try:
        for line, value in dataset_rows(data, split) if reader is None else reader(path):
            where = f"{data}:{line}"
            try:
                rows.append(as_row(where, _fields(where, value), field))
            except ValueError as error:
                faults.append(str(error))
    except TableError as error:
        raise DataError(f"data {error}") from error
    if not rows:
        n = len(faults)
        why = f"all {n} rows are bad, the first: {faults[0]}" if faults else "no rows"
        raise DataError(f"data {data}: {why}")
    for fault in faults:
        report(f"dropped {fault}")
    report(f"{data}: {len(rows)} prompts, {len(faults)} bad rows left out")
    return rows


def _fields(where: str, value: object) -> dict[str, object]:
    """A row's fields; otherwise a ValueError with its place."""
    if isinstance(value, ValueError):
        raise ValueError(f"{where}: {value}")
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a row must be an object with fields, got {shown(value)}")
    return value
