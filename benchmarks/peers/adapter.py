"""A head with an adapter as one dense matrix: weight + b·A, formed at every call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ppo_fast
from benchmarks.ops import adapter
from benchmarks.ops.case import Case
from benchmarks.peers.base import Bound, Named, Provider, leaves, timed
from ppo_fast.testing import Call, output

_APART = ("grad_hidden", "grad_a")  # of the hidden states' way through the adapter too


def of(case: Case) -> Iterator[Provider]:
    """The op on the dense sum."""
    if case.device == "cpu":
        yield Provider(
            "dense-sum",
            _dense,
            lambda: ppo_fast.backends()["cpu"],
            computes=(
                "weight + b·A, then the op without extra, and the gradients by hidden states, A"
                " and b: u = hidden·Aᵀ and its backward, small products, are in it, and the"
                " caller's where it is extra"
            ),
        )


def _dense(case: Case, call: Call) -> Bound:
    tensors, inputs = leaves(case, call)
    u, b = tensors.pop("extra_u"), tensors.pop("extra_b")
    a = adapter.a_of(case)
    inputs = {k: x for k, x in inputs.items() if x is not u} | {"a": a}
    a.requires_grad_(case.grad)
    weight = tensors.pop("weight")

    def run() -> Any:
        return ppo_fast.linear_ppo_loss(
            **tensors, weight=weight + b @ a, **call.options, backend="cpu"
        )

    bound = timed(case, call, run, inputs, output)

    def named(out: Any) -> Named:
        return {k: x for k, x in bound.named(out).items() if k not in _APART}

    return replace(bound, named=named)
