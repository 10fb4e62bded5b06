"""`linear_token_stats`: hidden states × head → six statistics of every token's distribution."""

from __future__ import annotations

from benchmarks.ops.case import DTYPES, FORWARD, Case
from benchmarks.ops.inputs import logprobs_inputs
from benchmarks.ops.linear_token_logprobs import SMOLLM2_HEAD
from benchmarks.ops.op import Cost, Op
from benchmarks.ops.sizes import QWEN_R2

NAME = "linear_token_stats"
CASES = (
    Case(NAME, FORWARD, SMOLLM2_HEAD),
    Case(NAME, FORWARD, QWEN_R2, "bf16", device="cuda"),
)


def cost(case: Case) -> Cost:
    """Hidden states and head once, tokens and results; the product, the softmax and three more
    operations a logit: the square's addition, the mean's, the comparison."""
    n, (rows, vocab, width) = case.shape.numel, case.shape.dims
    moved = (rows + vocab) * width * DTYPES[case.dtype].itemsize
    return Cost(moved + rows * (8 + 5 * 4 + 1), 2 * n * width + 8 * n)


OP = Op(NAME, 14, CASES, logprobs_inputs, cost)
