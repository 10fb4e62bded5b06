"""`ppo_loss` with a k3 term, an entropy bonus and every statistic, forward and backward."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.harness.selection import rows
from benchmarks.ops.case import Case
from benchmarks.peers import Provider


@rows("ppo_loss")
def test_ppo_loss(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
