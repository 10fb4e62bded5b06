"""`token_logprobs` with entropy: forward, and with its backward, also on huge pages."""

from __future__ import annotations

import torch

from benchmarks.ops.case import BACKWARD, BOTH, CALL, CALL_GRAD, DTYPES, FORWARD, THP, Case, Shape
from benchmarks.ops.op import (
    CPU,
    CPU_INPLACE,
    Cost,
    Goal,
    Op,
    call_time,
    device_time,
)
from benchmarks.ops.sizes import GPT2, QWEN_R1, TINY
from ppo_fast.testing import Call

NAME = "token_logprobs"
LLAMA3 = Shape("llama3", (8192, 128256))
SMOLLM2 = Shape("smollm2", (2048, 49152))
# Few rows: the tokens of one decoding step.
QWEN_M64 = Shape("qwen-m64", (64, 151936))
QWEN_M512 = Shape("qwen-m512", (512, 151936))

LOGPROBS_FORWARD = Case(NAME, FORWARD, GPT2)
LOGPROBS_BOTH = Case(NAME, BOTH, GPT2)
LOGPROBS_BOTH_THP = Case(NAME, BOTH, GPT2, env=THP)
LOGPROBS_CALL = Case(NAME, CALL, TINY)
LOGPROBS_CALL_GRAD = Case(NAME, CALL_GRAD, TINY)
GPU_LOGPROBS_FORWARD = Case(NAME, FORWARD, QWEN_R1, "bf16", device="cuda")
GPU_LOGPROBS_BACKWARD = Case(NAME, BACKWARD, QWEN_R1, "bf16", device="cuda")
GPU_LOGPROBS_M64 = Case(NAME, FORWARD, QWEN_M64, "bf16", device="cuda")
GPU_LOGPROBS_M512 = Case(NAME, FORWARD, QWEN_M512, "bf16", device="cuda")
CASES = (
    LOGPROBS_FORWARD,
    LOGPROBS_BOTH,
    LOGPROBS_BOTH_THP,
    *(Case(NAME, FORWARD, shape) for shape in (SMOLLM2, LLAMA3, QWEN_R1)),
    LOGPROBS_CALL,
    LOGPROBS_CALL_GRAD,
    GPU_LOGPROBS_FORWARD,
    GPU_LOGPROBS_BACKWARD,
    GPU_LOGPROBS_M64,
    GPU_LOGPROBS_M512,
    Case(NAME, BOTH, QWEN_R1, "bf16", device="cuda"),
)

GOALS = (
    Goal(LOGPROBS_FORWARD, CPU, "eager", 16, 24),
    Goal(LOGPROBS_FORWARD, CPU, "compile", 2.2, 3.5),
    Goal(LOGPROBS_FORWARD, CPU, "read", None, 2, faster=False),
    Goal(LOGPROBS_BOTH, CPU, "eager", 8, None),
    Goal(LOGPROBS_BOTH, CPU, "compile", 3, None),
    Goal(LOGPROBS_BOTH, CPU_INPLACE, "eager", None, 15),
    Goal(LOGPROBS_BOTH, CPU_INPLACE, "compile", None, None),
    Goal(LOGPROBS_BOTH_THP, CPU, "eager", 5, None),
    Goal(LOGPROBS_BOTH_THP, CPU, "compile", None, None),
    Goal(LOGPROBS_BOTH_THP, CPU_INPLACE, "eager", None, 15),
    call_time(LOGPROBS_CALL),
    call_time(LOGPROBS_CALL_GRAD),
    device_time(GPU_LOGPROBS_FORWARD, 640, 580),
    device_time(GPU_LOGPROBS_BACKWARD, 1290, 1190, inplace=True),
    device_time(GPU_LOGPROBS_M64, 9, 7),
    device_time(GPU_LOGPROBS_M512, 45, 40),  # 80 and 90 % of the bandwidth
)


def inputs(case: Case) -> Call:
    """Logits are drawn where they stay: a GPU's would take a CPU ten seconds."""
    torch.manual_seed(0)
    (rows, vocab), device = case.shape.dims, case.device
    logits = torch.randn(rows, vocab, device=device).mul_(3.0).to(DTYPES[case.dtype])
    tokens = torch.randint(vocab, (rows,), device=device)
    cotangents = {name: torch.randn(rows, device=device) for name in ("logprobs", "entropy")}
    tensors = {"logits": logits, "tokens": tokens}
    return Call(NAME, tensors, {"temperature": 1.0}, cotangents)


def cost(case: Case) -> Cost:
    """Forward: the logits, 8 bytes of token and 8 of results a row; subtract, exp, add, multiply,
    add. Backward: the logits again and their gradient; 8 more operations.
    """
    n, rows, wide = case.shape.numel, case.shape.dims[0], DTYPES[case.dtype].itemsize
    forward = Cost(n * wide + rows * 16, 5 * n)
    backward = Cost(2 * n * wide + rows * 24, 8 * n)
    if case.direction == BACKWARD:
        return backward
    if case.direction == BOTH:
        return Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return forward


OP = Op(NAME, 1, CASES, inputs, cost, GOALS, inplace="inplace_backward")
