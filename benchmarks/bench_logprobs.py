"""`token_logprobs` with entropy: forward, and with its backward, also on huge pages."""

from __future__ import annotations

from benchmarks import shapes
from benchmarks.conftest import Record
from benchmarks.providers import Provider
from benchmarks.rows import rows


@rows(shapes.LOGPROBS_FORWARD, shapes.LOGPROBS_BOTH, shapes.LOGPROBS_BOTH_THP)
def test_logprobs(case: shapes.Case, provider: Provider, record: Record) -> None:
    record(case, provider)
