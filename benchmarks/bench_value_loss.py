"""`value_loss` with its statistics, forward and backward."""

from __future__ import annotations

from benchmarks import shapes
from benchmarks.conftest import Record
from benchmarks.providers import Provider
from benchmarks.rows import rows


@rows(shapes.VALUE_LOSS_BOTH)
def test_value_loss(case: shapes.Case, provider: Provider, record: Record) -> None:
    record(case, provider)
