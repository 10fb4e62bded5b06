"""`token_logprobs` with entropy: forward, and with its backward, also on huge pages."""

from __future__ import annotations

from benchmarks.conftest import Record
from benchmarks.harness.selection import rows
from benchmarks.ops.case import Case
from benchmarks.peers import Provider


@rows("token_logprobs")
def test_logprobs(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
