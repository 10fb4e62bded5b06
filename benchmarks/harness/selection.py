"""Parametrisation: a test row per case and provider of an op."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from benchmarks.harness.timing import CLOCK
from benchmarks.ops.case import Case
from benchmarks.ops.cases import CASES
from benchmarks.peers import Provider, providers_of


class Chosen:
    """What this process collects: every case that has its device, unless `choose` was called."""

    cases: tuple[Case, ...] = CASES
    peers: frozenset[str] | None = None


def choose(cases: Iterable[Case], peers: frozenset[str] | None) -> None:
    """Collect these cases only, and of the peers only these."""
    Chosen.cases, Chosen.peers = tuple(cases), peers


def runs_here(case: Case) -> bool:
    """A GPU's cases are collected where there is one, and by a dry run."""
    return case.device == "cpu" or torch.cuda.is_available() or bool(os.environ.get("DRY_RUN"))


def taking_part(case: Case) -> list[Provider]:
    """This library's backends, the ceilings, and the peers that were chosen."""
    peers = Chosen.peers
    return [p for p in providers_of(case) if peers is None or not is_peer(p) or p.name in peers]


def is_peer(provider: Provider) -> bool:
    """Neither ours nor a ceiling."""
    return not provider.ceiling and not provider.name.startswith("ppo_fast-")


def rows(*ops: str, calls: bool = False) -> Callable[[Any], Any]:
    """One row per provider of each of the ops' cases, timed by the replayed clock.

    `calls` takes the cases that measure the cost of a call, whatever the op.
    """
    marks = pytest.mark.benchmark(timer=CLOCK.read)
    params = [
        pytest.param(case, provider, id=f"{case.name.replace(' ', '-')}-{provider.name}")
        for case in Chosen.cases
        if runs_here(case) and (case.is_call if calls else case.op in ops and not case.is_call)
        for provider in taking_part(case)
    ]

    def decorate(test: Any) -> Any:
        if not params:  # None is not collected; an empty parametrisation would be, and skipped
            return None
        return marks(pytest.mark.parametrize(("case", "provider"), params)(test))

    return decorate
