"""`linear_token_divergence`: two heads → every token's divergence, and the student's gradients."""

from __future__ import annotations

from benchmarks.ops import teacher
from benchmarks.ops.case import BOTH, FORWARD, Case
from benchmarks.ops.linear_token_logprobs import SMOLLM2_HEAD
from benchmarks.ops.op import Op
from benchmarks.ops.sizes import QWEN_R2

NAME = "linear_token_divergence"
CASES = (
    *(
        Case(NAME, way, teacher.of_kind(SMOLLM2_HEAD, kind))
        for kind in (teacher.REVERSE, teacher.JSD)
        for way in (FORWARD, BOTH)
    ),
    Case(NAME, BOTH, teacher.of_kind(QWEN_R2, teacher.REVERSE), "bf16", device="cuda"),
)

OP = Op(NAME, 13, CASES, teacher.inputs, teacher.cost, gradient_mb=teacher.gradient_mb)
