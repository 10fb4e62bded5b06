"""Hidden states × head → log-probabilities and entropy."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.linear import LINEAR
from benchmarks.providers import Provider
from benchmarks.rows import rows
from benchmarks.shapes import Case


@rows(LINEAR)
def test_linear(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
