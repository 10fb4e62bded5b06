"""Who is measured: this library's backends, PyTorch and its ceilings, and the peers' packages.

Every module knows what its package offers for a case; each provider is imported when it is bound.
"""

from __future__ import annotations

from benchmarks.providers import (
    cross_entropy,
    liger,
    ours,
    plain,
    scans,
    tianshou,
    torchrl,
    trl,
    verl,
)
from benchmarks.providers.base import Provider
from benchmarks.shapes import Case

__all__ = ["Provider", "providers_of"]

_MODULES = (ours, plain, trl, verl, torchrl, tianshou, scans, liger, cross_entropy)


def providers_of(case: Case) -> tuple[Provider, ...]:
    """Who takes part in a case, absent ones too: they say why."""
    return tuple(provider for module in _MODULES for provider in module.of(case))
