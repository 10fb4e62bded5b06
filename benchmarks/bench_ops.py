"""The one benchmark test: a row for each case and provider, replayed to pytest-benchmark."""

from __future__ import annotations

import pytest

from benchmarks.conftest import Record
from benchmarks.harness.selection import selected, taking_part
from benchmarks.harness.timing import CLOCK
from benchmarks.ops.case import Case
from benchmarks.peers import Provider

_ROWS = [
    pytest.param(case, provider, id=f"{case.name.replace(' ', '-')}-{provider.name}")
    for case in selected()
    for provider in taking_part(case)
]


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize(("case", "provider"), _ROWS)
def test_op(case: Case, provider: Provider, record: Record) -> None:
    record(case, provider)
