"""tianshou's numba recursion over the flat batch, and its returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.ops.case import Case
from benchmarks.peers.base import Bound, Named, Provider, needs
from benchmarks.peers.layout import Flat
from ppo_fast.testing import Call


def of(case: Case) -> Iterator[Provider]:
    """`gae` on the CPU, where its buffers live."""
    if case.op == "gae" and case.device == "cpu" and not case.is_call:
        missing = needs("tianshou.algorithm", "tianshou==2.0.1")
        yield Provider("tianshou", _bind, missing, computes="no moments")


def _bind(case: Case, call: Call) -> Bound:
    from tianshou.algorithm.algorithm_base import _gae

    flat = Flat(call)
    # float64 rewards with float32 values: the mixture that its own warm-up compiles.
    rewards = flat.rewards[0].double().numpy()
    values, after, end = (x[0].numpy() for x in (flat.values, flat.next_values(), flat.last()))
    gamma, lam = call.options["gamma"], call.options["lam"]

    def run() -> tuple[Any, Any]:
        advantages = _gae(values, after, rewards, end, gamma, lam)
        return advantages, advantages + values

    def named(out: tuple[Any, Any]) -> Named:
        return flat.named("advantages", "returns")(torch.from_numpy(x).float()[None] for x in out)

    return Bound(run, named)
