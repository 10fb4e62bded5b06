"""`token_logprobs` with entropy: forward, and with its backward, also on huge pages."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.providers import Provider
from benchmarks.rows import rows
from benchmarks.shapes import Case


@rows("token_logprobs")
def test_logprobs(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
