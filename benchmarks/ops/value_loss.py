"""`value_loss` with its statistics, forward and backward."""

from __future__ import annotations

from benchmarks.ops.case import BOTH, CALL, CALL_GRAD, DTYPES, Case
from benchmarks.ops.inputs import responses
from benchmarks.ops.op import Cost, Op, call_time
from benchmarks.ops.sizes import RLHF_256K, TINY
from ppo_fast.testing import Call, value_call

NAME = "value_loss"
VALUE_LOSS_CALL = Case(NAME, CALL, TINY)
VALUE_LOSS_CALL_GRAD = Case(NAME, CALL_GRAD, TINY)
CASES = (
    Case(NAME, BOTH, RLHF_256K),
    VALUE_LOSS_CALL,
    VALUE_LOSS_CALL_GRAD,
    Case(NAME, BOTH, RLHF_256K, device="cuda"),
)
GOALS = (call_time(VALUE_LOSS_CALL), call_time(VALUE_LOSS_CALL_GRAD))


def inputs(case: Case) -> Call:
    """Values, old values and returns of right-padded responses."""
    dims = case.shape.dims
    return value_call(dims, dtype=DTYPES[case.dtype], mask=None).replace(mask=responses(dims))


def cost(case: Case) -> Cost:
    """Three floats and a mask byte in, one gradient out."""
    n, wide = case.shape.numel, DTYPES[case.dtype].itemsize
    return Cost(n * (3 * wide + 1 + (4 if case.direction == BOTH else 0)), 20 * n)


OP = Op(NAME, 6, CASES, inputs, cost, GOALS)
