"""`value_loss` with its statistics, forward and backward."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.providers import Provider
from benchmarks.rows import rows
from benchmarks.shapes import Case


@rows("value_loss")
def test_value_loss(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
