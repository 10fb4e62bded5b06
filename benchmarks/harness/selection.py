"""The cases and peers that a run collects."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from benchmarks.ops.case import Case
from benchmarks.ops.registry import CASES
from benchmarks.peers import Provider, providers_of


class Chosen:
    """Cases of this process: every one whose device is here, unless `choose` was called."""

    cases: tuple[Case, ...] = CASES
    peers: frozenset[str] | None = None


def choose(cases: Iterable[Case], peers: frozenset[str] | None) -> None:
    """Collect these cases only, and of the peers only these."""
    Chosen.cases, Chosen.peers = tuple(cases), peers


def selected() -> list[Case]:
    """The chosen cases that run on this machine."""
    return [case for case in Chosen.cases if runs_here(case)]


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
