"""`whiten` over a mask."""

from __future__ import annotations

from benchmarks.ops.case import CALL, DTYPES, FORWARD, Case
from benchmarks.ops.inputs import responses
from benchmarks.ops.op import Cost, Op, call_time
from benchmarks.ops.sizes import RLHF_512X8K, RLHF_LONG, TINY
from ppo_fast.testing import Call, whiten_call

NAME = "whiten"
WHITEN_CALL = Case(NAME, CALL, TINY)
CASES = (
    Case(NAME, FORWARD, RLHF_LONG),
    WHITEN_CALL,
    Case(NAME, FORWARD, RLHF_512X8K, device="cuda"),
)
GOALS = (call_time(WHITEN_CALL),)


def inputs(case: Case) -> Call:
    """Advantages of right-padded responses."""
    dims = case.shape.dims
    return whiten_call(dims, dtype=DTYPES[case.dtype], mask=None).replace(mask=responses(dims))


def cost(case: Case) -> Cost:
    """A float and a mask byte in, a float out."""
    n = case.shape.numel
    return Cost(n * (DTYPES[case.dtype].itemsize + 1 + 4), 3 * n)


OP = Op(NAME, 9, CASES, inputs, cost, GOALS)
