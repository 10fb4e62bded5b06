"""torchrl's GAE: vectorised, and its loop. Next values and flags, which its collectors keep,
are given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from benchmarks.ops.case import Case
from benchmarks.peers.base import Bound, Named, Provider, needs
from benchmarks.peers.layout import Flat, SequenceRows
from ppo_fast.testing import Call

_MISSING = needs("torchrl.objectives.value", "torchrl==0.14.1")
# The vectorised one drops the terms of its series below 1e-7: of the largest delta
# 1e-7 / (1 − γλ) = 1.7e-6.
_DROPPED = 1.7e-6 * 2**23
# Nine operations a step.
_MOST_STEPS = 16384


def of(case: Case) -> Iterator[Provider]:
    """Both for `gae`; the loop only where its steps are few enough to be timed."""
    if case.op != "gae" or case.is_call:
        return

    def too_long() -> str | None:
        steps = case.shape.dims[1]
        if steps > _MOST_STEPS:
            return f"a loop over {steps:,} steps takes too long to be timed"
        return _MISSING()

    less = "no moments"
    yield Provider("torchrl", _vectorised, _MISSING, roundings=_DROPPED, computes=less)
    yield Provider("torchrl-loop", _loop, too_long, computes=less)


def _vectorised(case: Case, call: Call) -> Bound:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    # Padding, flagged as ended, would be as many trajectories of one step.
    rows = Flat(call) if "cu_seqlens" in call.tensors else SequenceRows(call)
    return _bind(call, rows, vec_generalized_advantage_estimate)


def _loop(case: Case, call: Call) -> Bound:
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    return _bind(call, SequenceRows(call), generalized_advantage_estimate)


def _bind(call: Call, rows: SequenceRows, function: Any) -> Bound:
    rewards, values, after, done = (
        x.unsqueeze(-1) for x in (rows.rewards, rows.values, rows.next_values(), rows.last())
    )
    gamma, lam = call.options["gamma"], call.options["lam"]

    def run() -> tuple[Tensor, Tensor]:
        return function(gamma, lam, values, after, rewards, done, done)

    def named(out: tuple[Tensor, Tensor]) -> Named:
        return rows.named("advantages", "returns")(x[..., 0] for x in out)

    return Bound(run, named)
