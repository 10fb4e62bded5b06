"""Parametrisation: a test row per case and provider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.providers import providers_of
from benchmarks.shapes import Case
from benchmarks.timing import CLOCK


def rows(*cases: Case) -> Callable[[Any], Any]:
    """One row per provider of each case, timed by the replayed clock."""
    marks = pytest.mark.benchmark(timer=CLOCK.read)
    params = [
        pytest.param(case, provider, id=f"{case.name.replace(' ', '-')}-{provider.name}")
        for case in cases
        for provider in providers_of(case)
    ]

    def decorate(test: Any) -> Any:
        return marks(pytest.mark.parametrize(("case", "provider"), params)(test))

    return decorate
