"""Hidden states × head → log-probabilities, and the whole loss with its gradients."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.harness.selection import rows
from benchmarks.ops.case import Case
from benchmarks.ops.linear import LINEAR, LINEAR_LOSS
from benchmarks.peers import Provider


@rows(LINEAR)
def test_linear(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)


@rows(LINEAR_LOSS)
def test_linear_loss(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
