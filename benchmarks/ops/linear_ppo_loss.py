"""`linear_ppo_loss`: hidden states × head → the loss, its statistics and both gradients."""

from __future__ import annotations

from benchmarks.ops.case import BOTH, DTYPES, Case, Shape
from benchmarks.ops.inputs import policy_loss_inputs
from benchmarks.ops.op import CPU, Cost, Goal, Op, device_time
from benchmarks.ops.sizes import QWEN_R2

NAME = "linear_ppo_loss"
SMOLLM2_HEAD_2K = Shape("smollm2-head-2k", (2048, 49152, 576))
# A small head at many lengths: what memory grows with.
LENGTHS = tuple(Shape(f"head-{n}k", (1024 * n, 8192, 64)) for n in (1, 4, 16, 64))

LINEAR_LOSS_BOTH = Case(NAME, BOTH, SMOLLM2_HEAD_2K)
GPU_LINEAR_LOSS = Case(NAME, BOTH, QWEN_R2, "bf16", device="cuda")
CASES = (LINEAR_LOSS_BOTH, *(Case(NAME, BOTH, shape) for shape in LENGTHS), GPU_LINEAR_LOSS)
GOALS = (
    Goal(LINEAR_LOSS_BOTH, CPU, "gemms", 1.15, 1.05, faster=False),
    Goal(LINEAR_LOSS_BOTH, CPU, "eager", 4, 10, memory=True),
    Goal(LINEAR_LOSS_BOTH, f"{CPU}-surrogate", CPU, 1.05, 1.02, faster=False),
    device_time(GPU_LINEAR_LOSS, 47000, 40000),
)


def cost(case: Case) -> Cost:
    """Hidden states and head once, tokens and results; the product and the softmax of it.

    Backward: both gradients, and two more products.
    """
    n, (rows, vocab, width) = case.shape.numel, case.shape.dims
    moved, both = (rows + vocab) * width * DTYPES[case.dtype].itemsize, case.direction == BOTH
    products, softmax = (3, 13) if both else (1, 5)
    return Cost((2 if both else 1) * moved + rows * 32, products * 2 * n * width + softmax * n)


def gradient_mb(case: Case) -> float:
    """The gradients by hidden states and weight."""
    if not case.differentiates:
        return 0.0
    rows, vocab, width = case.shape.dims
    return (rows + vocab) * width * DTYPES[case.dtype].itemsize / 2**20


OP = Op(NAME, 4, CASES, policy_loss_inputs, cost, GOALS, gradient_mb=gradient_mb)
