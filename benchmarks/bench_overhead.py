"""What a call costs on tensors too small to matter, without and with a gradient recorded."""

from __future__ import annotations

from benchmarks import shapes
from benchmarks.conftest import Record
from benchmarks.providers import Provider
from benchmarks.rows import rows


@rows(*shapes.CALLS, *shapes.CALLS_WITH_GRAD)
def test_overhead(case: shapes.Case, provider: Provider, record: Record) -> None:
    record(case, provider)
