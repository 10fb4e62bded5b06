"""`linear_token_logprobs`: hidden states × head → log-probabilities and entropies."""

from __future__ import annotations

from benchmarks.ops import support
from benchmarks.ops.case import BOTH, DTYPES, FORWARD, Case, Shape
from benchmarks.ops.inputs import logprobs_inputs
from benchmarks.ops.op import CPU, Cost, Goal, Op, device_time
from benchmarks.ops.sizes import QWEN_R2
from ppo_fast.testing import Call

NAME = "linear_token_logprobs"
SMOLLM2_HEAD = Shape("smollm2-head", (512, 49152, 576))

BF16_FORWARD = Case(NAME, FORWARD, SMOLLM2_HEAD, "bf16")
GPU_LINEAR_FORWARD = Case(NAME, FORWARD, QWEN_R2, "bf16", device="cuda")
GPU_OF_SUPPORT = {
    n: Case(NAME, BOTH, shape, "bf16", device="cuda") for n, shape in support.GPU_SHAPES.items()
}
CASES = (
    Case(NAME, FORWARD, SMOLLM2_HEAD),
    BF16_FORWARD,
    Case(NAME, FORWARD, support.SHAPES[support.K128]),
    GPU_LINEAR_FORWARD,
    *GPU_OF_SUPPORT.values(),
)
GOALS = (
    Goal(BF16_FORWARD, CPU, f"{CPU}-fp32-operands", 1.5, 1.9),
    device_time(GPU_LINEAR_FORWARD, 16500, 13700),
    # 8 KB of every pair in each of three products, and the weight's gradient once.
    device_time(GPU_OF_SUPPORT[20], 2600, 1700, "triton"),
    device_time(GPU_OF_SUPPORT[128], 12000, 8000, "triton"),
    device_time(GPU_OF_SUPPORT[512], 47000, 30000, "triton"),
)


def inputs(case: Case) -> Call:
    """The rows over the whole vocabulary, or over a support."""
    return support.inputs(case, logprobs_inputs) if support.kept(case) else logprobs_inputs(case)


def cost(case: Case) -> Cost:
    """Hidden states and head once, tokens and results; the product and the softmax of it.

    Backward: both gradients, the logits' product again, and two more products.
    """
    if support.kept(case):
        return support.cost(case)
    n, (rows, vocab, width) = case.shape.numel, case.shape.dims
    moved, both = (rows + vocab) * width * DTYPES[case.dtype].itemsize, case.direction == BOTH
    products, softmax = (4, 13) if both else (1, 5)
    return Cost((2 if both else 1) * moved + rows * 32, products * 2 * n * width + softmax * n)


OP = Op(NAME, 2, CASES, inputs, cost, GOALS)
