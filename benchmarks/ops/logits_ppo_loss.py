"""`logits_ppo_loss`: logits → the loss, its statistics and the logits' gradient."""

from __future__ import annotations

from benchmarks.ops.case import BOTH, DTYPES, Case
from benchmarks.ops.inputs import policy_loss_inputs
from benchmarks.ops.op import Cost, Op, device_time
from benchmarks.ops.sizes import GPT2, QWEN_R1

NAME = "logits_ppo_loss"
GPU_LOGITS_LOSS = Case(NAME, BOTH, QWEN_R1, "bf16", device="cuda")
CASES = (Case(NAME, BOTH, GPT2), GPU_LOGITS_LOSS)
GOALS = (
    device_time(GPU_LOGITS_LOSS, 1400, 1220, "cuda", inplace=True),
    device_time(GPU_LOGITS_LOSS, 1740, 1220, "triton", inplace=True),  # reads each row twice
)


def cost(case: Case) -> Cost:
    """The logits and their gradient once; softmax and gradient."""
    n, wide, both = case.shape.numel, DTYPES[case.dtype].itemsize, case.direction == BOTH
    moved = (2 if both else 1) * n * wide + case.shape.dims[0] * 32
    return Cost(moved, (13 if both else 5) * n)


OP = Op(NAME, 5, CASES, policy_loss_inputs, cost, GOALS, inplace="inplace")
