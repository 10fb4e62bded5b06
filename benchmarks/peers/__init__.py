"""Providers: this library's backends, PyTorch, ceilings, and the peers' packages.

Every module knows what its package offers for a case; each provider is imported when it is bound.
"""

from __future__ import annotations

from benchmarks.ops.adapter import is_adapted
from benchmarks.ops.case import Case
from benchmarks.ops.support import kept
from benchmarks.peers import (
    adapter,
    cross_entropy,
    liger,
    ours,
    pytorch,
    scans,
    support,
    tianshou,
    torchrl,
    trl,
    verl,
)
from benchmarks.peers.base import Provider

__all__ = ["Provider", "providers_of"]

_MODULES = (ours, pytorch, trl, verl, torchrl, tianshou, scans, liger, cross_entropy)

# The others have no support and no adapter, and would compute something else.
_OF_SUPPORT = (ours, support)
_OF_ADAPTER = (ours, adapter)


def providers_of(case: Case) -> tuple[Provider, ...]:
    """Providers of a case; an absent one carries its reason."""
    modules = _OF_SUPPORT if kept(case) else _OF_ADAPTER if is_adapted(case) else _MODULES
    return tuple(provider for module in modules for provider in module.of(case))
