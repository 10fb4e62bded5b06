"""`gae` with returns and moments: in every layout, beside loops, scans and compiled peers."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.providers import Provider
from benchmarks.rows import rows
from benchmarks.shapes import Case


@rows("gae")
def test_gae(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
