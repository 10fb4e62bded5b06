"""`gae` with returns and moments: in every layout, beside loops, scans and compiled peers."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.harness.selection import rows
from benchmarks.ops.case import Case
from benchmarks.peers import Provider


@rows("gae")
def test_gae(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
