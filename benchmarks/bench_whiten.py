"""`whiten` over a mask."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.providers import Provider
from benchmarks.rows import rows
from benchmarks.shapes import Case


@rows("whiten")
def test_whiten(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
