"""`gae` with returns and moments beside the loop and the vectorised and compiled peers."""

from __future__ import annotations

from benchmarks import shapes
from benchmarks.conftest import Record
from benchmarks.providers import Provider
from benchmarks.rows import rows


@rows(shapes.GAE)
def test_gae(case: shapes.Case, provider: Provider, record: Record) -> None:
    record(case, provider)
