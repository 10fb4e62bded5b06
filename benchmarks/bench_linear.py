"""Hidden states × head → log-probabilities, and the whole loss with its gradients."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.linear import LINEAR, LINEAR_LOSS
from benchmarks.providers import Provider
from benchmarks.rows import rows
from benchmarks.shapes import Case


@rows(LINEAR)
def test_linear(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)


@rows(LINEAR_LOSS)
def test_linear_loss(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
