"""`rlhf_advantages`: KL-shaped rewards, advantages, returns and moments."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.providers import Provider
from benchmarks.rows import rows
from benchmarks.shapes import Case


@rows("rlhf_advantages")
def test_rlhf_advantages(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
