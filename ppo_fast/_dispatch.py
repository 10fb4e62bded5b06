"""Automatic choice between Triton and CUDA C++ on a GPU, by op and regime of shapes, as data.

Triton is the default. Until there are measurements, `REGIMES` says where counted work speaks for
CUDA C++ (docs/backends.md has the counts); a measurement of that op, regime, GPU and dtype in
`MEASURED` decides over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Work(NamedTuple):
    """One call: the op, and the size of its main tensor; sequences where the op walks them."""

    op: str
    elements: int
    sequences: int = 0
    time_major: bool = False

    @property
    def steps(self) -> int:
        """Steps of a sequence, in the mean."""
        return self.elements // max(self.sequences, 1)


class Regime(NamedTuple):
    """Shapes of some ops for which CUDA C++ is the default."""

    name: str
    ops: tuple[str, ...]
    holds: Callable[[Work], bool]
    reason: str
    least: tuple[int, int] = (0, 0)  # compute capability from which on it holds


class Case(NamedTuple):
    """Op, regime, GPU and dtype of a measurement; "" is every shape outside of the regimes."""

    op: str
    regime: str
    capability: tuple[int, int]
    dtype: torch.dtype


class Measured(NamedTuple):
    """The faster of the two at every measured shape of a case, and its file of results."""

    backend: str
    results: str


_WALKS = ("gae", "rlhf_advantages")
_TOKENS = ("ppo_loss", "value_loss", "whiten")
_ROWS = ("token_logprobs", "logits_ppo_loss")
# Twice the multiprocessors of an H100 or H200.
_FEW_SEQUENCES = 2 * 132
_LONG, _SHORT = 1024, 64
# Work of a few microseconds, less than the host's for a launch from Python.
_SMALL_TOKENS, _SMALL_LOGITS = 1 << 16, 1 << 24

REGIMES = (
    Regime("time-major", _WALKS, lambda w: w.time_major, "lanes lie along sequences"),
    Regime(
        "few long sequences",
        _WALKS,
        lambda w: w.sequences < _FEW_SEQUENCES and w.steps > _LONG,
        "a sequence is shared by the blocks of its chunks",
    ),
    Regime("short rows", _WALKS, lambda w: w.steps <= _SHORT, "a thread takes four steps"),
    Regime(
        "small",
        (*_WALKS, *_TOKENS),
        lambda w: w.elements <= _SMALL_TOKENS,
        "one dispatcher call, no launch from Python",
    ),
    Regime(
        "small",
        _ROWS,
        lambda w: w.elements <= _SMALL_LOGITS,
        "one dispatcher call, no launch from Python",
    ),
    Regime(
        "any", ("ppo_loss",), lambda w: True, "Triton's many operands leave it one resident block"
    ),
    Regime(
        "any",
        ("logits_ppo_loss", "linear_ppo_loss"),
        lambda w: True,
        "a cluster of blocks reads a row once",
        least=(9, 0),
    ),
)

# Empty: nothing has been measured yet.
MEASURED: dict[Case, Measured] = {}


def regime_of(work: Work, capability: tuple[int, int]) -> Regime | None:
    """The first regime that holds."""
    return next(
        (r for r in REGIMES if work.op in r.ops and capability >= r.least and r.holds(work)), None
    )


def provider(work: Work, capability: tuple[int, int], dtype: torch.dtype) -> str:
    """ "triton" or "cuda": the default for this work on a GPU of which both can be used."""
    regime = regime_of(work, capability)
    name = "" if regime is None else regime.name
    measured = MEASURED.get(Case(work.op, name, capability, dtype))
    if measured is not None:
        return measured.backend
    return "triton" if regime is None else "cuda"
