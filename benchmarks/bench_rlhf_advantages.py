"""`rlhf_advantages`: KL-shaped rewards, advantages, returns and moments."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.harness.selection import rows
from benchmarks.ops.case import Case
from benchmarks.peers import Provider


@rows("rlhf_advantages")
def test_rlhf_advantages(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
