"""What a call costs on tensors too small to matter, without and with a gradient recorded."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.providers import Provider
from benchmarks.rows import rows
from benchmarks.shapes import Case


@rows(calls=True)
def test_overhead(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
