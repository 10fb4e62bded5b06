"""What a call costs on tensors too small to matter, without and with a gradient recorded."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.harness.selection import rows
from benchmarks.ops.case import Case
from benchmarks.peers import Provider


@rows(calls=True)
def test_overhead(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
