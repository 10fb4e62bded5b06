"""Rows of transitions, written in both formats, for the tests of reading and of learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow", reason="pyarrow writes the parquet that is read")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow writes the parquet that is read")

GOOD: dict[str, Any] = {"prompt": "ab", "tokens": [3, 4], "logprobs": [-0.5, -1.0], "reward": 2.0}


def jsonl(path: Path, rows: list[Any]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n")
    return path


def parquet(path: Path, rows: list[Any]) -> Path:
    names = {name for row in rows for name in row}  # else the first row's alone
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    pq.write_table(table, path, row_group_size=2)
    return path
