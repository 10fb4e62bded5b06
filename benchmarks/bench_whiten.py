"""`whiten` over a mask."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.harness.selection import rows
from benchmarks.ops.case import Case
from benchmarks.peers import Provider


@rows("whiten")
def test_whiten(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
