"""`rollout_weights`: weights and rejections of another policy's samples, on the CPU alone."""

from __future__ import annotations

import torch

from benchmarks.ops.case import CALL, DTYPES, FORWARD, Case
from benchmarks.ops.inputs import responses
from benchmarks.ops.op import CPU, Cost, Goal, Op, call_time
from benchmarks.ops.sizes import RLHF_256K, TINY
from ppo_fast import Correction
from ppo_fast.testing import Call

NAME = "rollout_weights"
ROLLOUT_WEIGHTS = Case(NAME, FORWARD, RLHF_256K)
ROLLOUT_CALL = Case(NAME, CALL, TINY)
GOALS = (
    Goal(ROLLOUT_WEIGHTS, CPU, "eager", 10, 20),
    Goal(ROLLOUT_WEIGHTS, CPU, "compile", 3, None),
    call_time(ROLLOUT_CALL),
)

# Every statistic is bounded. Some tokens and some sequences are rejected.
REJECT = {
    "token-ratio": (0.85, 1.2),
    "token-k1": (0.85, 1.2),
    "token-k2": 0.012,
    "token-k3": 0.012,
    "seq-sum-ratio": (0.01, 100.0),
    "seq-sum-k1": (0.01, 100.0),
    "seq-sum-k2": 2.0,
    "seq-sum-k3": 2.0,
    "seq-mean-ratio": (0.997, 1.003),
    "seq-mean-k1": (0.997, 1.003),
    "seq-mean-k2": 2e-3,
    "seq-mean-k3": 2e-3,
    "seq-min-ratio": (0.8, 1.0),
    "seq-min-k1": (0.8, 1.0),
    "seq-min-k2": 1e-6,
    "seq-min-k3": 1e-6,
    "seq-max-ratio": (1.0, 1.25),
    "seq-max-k1": (1.0, 1.25),
    "seq-max-k2": 0.03,
    "seq-max-k3": 0.03,
}
CORRECTION = Correction("token", high=1.1, reject=REJECT)


def inputs(case: Case) -> Call:
    """Right-padded responses that a sampler in bf16 scored: x has a deviation of 0.05.

    x is a multiple of 2^-9 and a half: none is within a rounding of a token's bound.
    """
    torch.manual_seed(0)
    dims, dtype = case.shape.dims, DTYPES[case.dtype]
    steps = (0.05 * torch.randn(dims) * 512).round() + 0.5
    rollout = (-3 * torch.rand(dims) * 512).round()
    tensors = {
        "old_logprobs": ((rollout + steps) / 512).to(dtype),
        "rollout_logprobs": (rollout / 512).to(dtype),
        "mask": responses(dims),
    }
    return Call(NAME, tensors, {"correction": CORRECTION}, {})


def cost(case: Case) -> Cost:
    """Two floats and a mask byte in, a float and a mask byte out; exponential, sums, bounds."""
    n = case.shape.numel
    return Cost(n * (2 * DTYPES[case.dtype].itemsize + 1 + 4 + 1), 40 * n)


OP = Op(NAME, 10, (ROLLOUT_WEIGHTS, ROLLOUT_CALL), inputs, cost, GOALS)
