"""`divergence`: two sets of logits → the mean divergence and the student's gradient."""

from __future__ import annotations

from benchmarks.ops import teacher
from benchmarks.ops.case import BOTH, FORWARD, Case
from benchmarks.ops.op import Op
from benchmarks.ops.sizes import GPT2, QWEN_R1

NAME = "divergence"
DIVERGENCE_BOTH = {kind: Case(NAME, BOTH, teacher.of_kind(GPT2, kind)) for kind in teacher.KINDS}
CASES = (
    Case(NAME, FORWARD, teacher.of_kind(GPT2, teacher.REVERSE)),
    *DIVERGENCE_BOTH.values(),
    *(
        Case(NAME, BOTH, teacher.of_kind(QWEN_R1, kind), "bf16", device="cuda")
        for kind in (teacher.REVERSE, teacher.JSD)
    ),
)

OP = Op(NAME, 11, CASES, teacher.inputs, teacher.cost, gradient_mb=teacher.gradient_mb)
