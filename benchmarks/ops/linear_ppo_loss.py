"""`linear_ppo_loss`: hidden states × head → the loss, its statistics and both gradients."""

from __future__ import annotations

import torch

from benchmarks.ops import adapter, support, teacher
from benchmarks.ops.case import BOTH, DTYPES, Case, Shape
from benchmarks.ops.inputs import policy_loss_inputs
from benchmarks.ops.op import CPU, Cost, Goal, Op, device_time
from benchmarks.ops.sizes import QWEN_R2
from ppo_fast.testing import Call

NAME = "linear_ppo_loss"
SMOLLM2_HEAD_2K = Shape("smollm2-head-2k", (2048, 49152, 576))
# A small head at many lengths: what memory grows with.
LENGTHS = tuple(Shape(f"head-{n}k", (1024 * n, 8192, 64)) for n in (1, 4, 16, 64))

# 40 % of the rows masked, and half of the others without an advantage in a loss of the policy term
# alone: the caller masks them all and names the rest by `row_index`.
CHOSEN_R2 = Shape("qwen-r2-3-rows-of-10", QWEN_R2.dims)

LINEAR_LOSS_BOTH = Case(NAME, BOTH, SMOLLM2_HEAD_2K)
BF16_BOTH = Case(NAME, BOTH, SMOLLM2_HEAD_2K, "bf16")
WITH_TEACHER = Case(NAME, BOTH, teacher.taught(SMOLLM2_HEAD_2K))
WITH_ADAPTER = Case(NAME, BOTH, adapter.SHAPE)
OF_SUPPORT = {name: Case(NAME, BOTH, shape) for name, shape in support.SHAPES.items()}
GPU_LINEAR_LOSS = Case(NAME, BOTH, QWEN_R2, "bf16", device="cuda")
GPU_CHOSEN_ROWS = Case(NAME, BOTH, CHOSEN_R2, "bf16", device="cuda")
GPU_WITH_TEACHER = Case(NAME, BOTH, teacher.taught(QWEN_R2), "bf16", device="cuda")
CASES = (
    LINEAR_LOSS_BOTH,
    BF16_BOTH,
    *(Case(NAME, BOTH, shape) for shape in LENGTHS),
    WITH_TEACHER,
    *OF_SUPPORT.values(),
    WITH_ADAPTER,
    GPU_LINEAR_LOSS,
    GPU_CHOSEN_ROWS,
    GPU_WITH_TEACHER,
)
GOALS = (
    Goal(LINEAR_LOSS_BOTH, CPU, "gemms", 1.15, 1.05, faster=False),
    Goal(LINEAR_LOSS_BOTH, CPU, "eager", 4, 10, memory=True),
    Goal(LINEAR_LOSS_BOTH, f"{CPU}-surrogate", CPU, 1.05, 1.02, faster=False),
    Goal(BF16_BOTH, CPU, f"{CPU}-fp32-operands", 1.5, 1.9),
    *(
        Goal(OF_SUPPORT[name], CPU, "dense-head", times, None)
        for name, times in (
            (support.K20, 5),
            (support.K128, 5),
            (support.K512, 1),
            (support.FROZEN, 20),
            (support.UNIFORM, 5),
        )
    ),
    device_time(GPU_LINEAR_LOSS, 47000, 40000),
    device_time(GPU_CHOSEN_ROWS, 22000, 17000),
)


def _chosen(case: Case) -> bool:
    return case.shape.name.startswith(CHOSEN_R2.name)


def _rows(case: Case) -> int:
    """Rows that a case computes."""
    rows = case.shape.dims[0]
    return -(-3 * rows // 10) if _chosen(case) else rows


def inputs(case: Case) -> Call:
    """The loss of all rows, or of three in ten, over a support, with a teacher or an adapter."""
    if support.kept(case):
        return support.inputs(case, policy_loss_inputs)
    call = policy_loss_inputs(case)
    if kind := teacher.kind_of(case):
        return teacher.with_teacher(call, kind, teacher.COEF)
    if adapter.is_adapted(case):
        return adapter.inputs(case, call)
    if not _chosen(case):
        return call
    index = torch.arange(_rows(case), device=case.device) * 10 // 3
    mask = torch.zeros_like(call.tensors["mask"]).index_fill_(0, index, True)
    options = call.options | {"entropy_coef": 0.0, "kl_coef": 0.0}
    return call.replace(mask=mask, row_index=index)._replace(options=options)


def cost(case: Case) -> Cost:
    """Hidden states and head once, tokens and results; the product and the softmax of it.

    Backward: both gradients, and two more products. A teacher's head is read beside it.
    """
    if support.kept(case):
        return support.cost(case)
    if teacher.kind_of(case):
        moved, operations = teacher.cost(case)
        return Cost(moved + case.shape.dims[0] * 32, operations)
    if adapter.is_adapted(case):
        return adapter.cost(case)
    rows, (_, vocab, width) = _rows(case), case.shape.dims
    n = rows * vocab
    moved, both = (rows + vocab) * width * DTYPES[case.dtype].itemsize, case.direction == BOTH
    products, softmax = (3, 13) if both else (1, 5)
    return Cost((2 if both else 1) * moved + rows * 32, products * 2 * n * width + softmax * n)


def gradient_mb(case: Case) -> float:
    """The gradients by hidden states and, if they are trained, weight or adapter."""
    if not case.differentiates:
        return 0.0
    rows, vocab, width = case.shape.dims
    if adapter.is_adapted(case):
        numbers = rows * width + (rows + vocab) * adapter.RANK
    else:
        numbers = (rows + (0 if support.is_frozen(case) else vocab)) * width
    return numbers * DTYPES[case.dtype].itemsize / 2**20


OP = Op(NAME, 4, CASES, inputs, cost, GOALS, gradient_mb=gradient_mb)
