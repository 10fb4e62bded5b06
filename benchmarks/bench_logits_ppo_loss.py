"""Logits → loss, statistics and the logits' gradient."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.linear import LOGITS_LOSS
from benchmarks.providers import Provider
from benchmarks.rows import rows
from benchmarks.shapes import Case


@rows(LOGITS_LOSS)
def test_logits_loss(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
