"""`rlhf_advantages`: KL-shaped rewards, advantages, returns and moments."""

from __future__ import annotations

from benchmarks.ops.case import CALL, DTYPES, FORWARD, Case
from benchmarks.ops.inputs import GAE_OPTIONS, responses
from benchmarks.ops.op import Cost, Op, call_time
from benchmarks.ops.sizes import RLHF_512X8K, RLHF_LONG, TINY
from ppo_fast.testing import Call, rlhf_call

NAME = "rlhf_advantages"
RLHF_CALL = Case(NAME, CALL, TINY)
CASES = (
    Case(NAME, FORWARD, RLHF_LONG),
    RLHF_CALL,
    Case(NAME, FORWARD, RLHF_512X8K, device="cuda"),
)
GOALS = (call_time(RLHF_CALL),)


def inputs(case: Case) -> Call:
    """Right-padded responses that end at their EOS: nothing is bootstrapped."""
    dims = case.shape.dims
    call = rlhf_call(dims, dtype=DTYPES[case.dtype], bootstrap=False, **GAE_OPTIONS)
    return call.replace(mask=responses(dims))


def cost(case: Case) -> Cost:
    """Three floats and a mask byte in; advantages, returns, rewards and KL out."""
    n = case.shape.numel
    return Cost(n * (3 * DTYPES[case.dtype].itemsize + 1 + 16), 14 * n)


OP = Op(NAME, 8, CASES, inputs, cost, GOALS)
