"""`linear_divergence`: two heads → the mean divergence and the student's gradients."""

from __future__ import annotations

from benchmarks.ops import teacher
from benchmarks.ops.case import BOTH, Case
from benchmarks.ops.linear_ppo_loss import SMOLLM2_HEAD_2K
from benchmarks.ops.op import CPU, Goal, Op, device_time
from benchmarks.ops.sizes import QWEN_R2

NAME = "linear_divergence"
# Four chunks of rows on a CPU: what memory is compared at, too.
HEADS_BOTH = {
    kind: Case(NAME, BOTH, teacher.of_kind(SMOLLM2_HEAD_2K, kind)) for kind in teacher.KINDS
}
GPU_HEADS_BOTH = {
    kind: Case(NAME, BOTH, teacher.of_kind(QWEN_R2, kind), "bf16", device="cuda")
    for kind in (teacher.REVERSE, teacher.JSD)
}
CASES = (*HEADS_BOTH.values(), *GPU_HEADS_BOTH.values())
GOALS = (
    *(
        goal
        for case in HEADS_BOTH.values()
        for goal in (
            Goal(case, CPU, "gemms", 1.2, 1.08, faster=False),
            Goal(case, CPU, "trl", 1.5, None),
            Goal(case, CPU, "liger", 1.5, None),
            Goal(case, CPU, "eager", 6, 15, memory=True),
        )
    ),
    # 1.2 and 1.08 times four products, 40.8 TFLOP at 790 TFLOP/s.
    *(device_time(case, 62000, 55800, "triton") for case in GPU_HEADS_BOTH.values()),
)

OP = Op(NAME, 12, CASES, teacher.inputs, teacher.cost, GOALS, gradient_mb=teacher.gradient_mb)
