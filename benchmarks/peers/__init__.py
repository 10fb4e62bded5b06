"""Providers: this library's backends, PyTorch, ceilings, and the peers' packages.

Every module knows what its package offers for a case; each provider is imported when it is bound.
"""

from __future__ import annotations

from benchmarks.ops.case import Case
from benchmarks.peers import (
    cross_entropy,
    liger,
    ours,
    pytorch,
    scans,
    tianshou,
    torchrl,
    trl,
    verl,
)
from benchmarks.peers.base import Provider

__all__ = ["Provider", "providers_of"]

_MODULES = (ours, pytorch, trl, verl, torchrl, tianshou, scans, liger, cross_entropy)


def providers_of(case: Case) -> tuple[Provider, ...]:
    """Providers of a case; an absent one carries its reason."""
    return tuple(provider for module in _MODULES for provider in module.of(case))
