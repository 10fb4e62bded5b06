"""Logits → loss, statistics and the logits' gradient."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.harness.selection import rows
from benchmarks.ops.case import Case
from benchmarks.ops.linear import LOGITS_LOSS
from benchmarks.peers import Provider


@rows(LOGITS_LOSS)
def test_logits_loss(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
