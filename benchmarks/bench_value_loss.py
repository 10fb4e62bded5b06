"""`value_loss` with its statistics, forward and backward."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.harness.selection import rows
from benchmarks.ops.case import Case
from benchmarks.peers import Provider


@rows("value_loss")
def test_value_loss(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
