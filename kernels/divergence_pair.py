"""A student's and a teacher's row of logits, and what divergences are made of.

The state of each row's softmax is given: a column's ln p and ln q come from them. Where p and q
are equal to the bit, so is their ratio to 1, and the divergence and its gradient are 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .codes import DIVERGENCE_JSD
from .common import Strided, load_f32, row_offset, unspecialised
from .softmax import LOG2E, ZERO_EXP, log_probability

TENSORS = ("logits", "teacher", "out")
STATES = ("row_max", "log_sum", "teacher_max", "teacher_log_sum")
PER_ROW = ("mask", "temperature", "teacher_temperature", *STATES)
GRADS = ("grad_logprobs", "grad_entropy", "grad_divergence")
SAVED = ("entropy", "kl")
LEVELS = ("outer", "inner")
RUNTIME = unspecialised(
    ("tokens", *PER_ROW, *GRADS, *SAVED),
    LEVELS,
    (),
    (
        *(f"{x}_{level}" for x in TENSORS for level in LEVELS),
        *("inner", "V", "n_rows", "n_parts", "n_segments"),
        *("inv_temperature", "teacher_inv_temperature", "beta", "rest"),
    ),
)


class Pair(NamedTuple):
    """A student's and a teacher's row inside a kernel: the states of their softmax, and beta."""

    row_max: Any
    log_sum: Any
    inv_temperature: Any
    teacher_max: Any
    teacher_log_sum: Any
    teacher_inv_temperature: Any
    beta: Any
    rest: Any  # 1 - beta


@triton.jit
def log_probabilities(x, y, pair):
    """ln p and ln q of a column's logits."""
    log_p = log_probability(x, pair.inv_temperature, pair.row_max, pair.log_sum)
    of_teacher = (pair.teacher_inv_temperature, pair.teacher_max, pair.teacher_log_sum)
    return log_p, log_probability(y, *of_teacher)


@triton.jit
def at_least(x, low):
    """The larger of both; a NaN passes."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log_ratios(log_p, log_q, pair, KIND: tl.constexpr):
    """ln(p/q) and ln(q/p); for jsd ln(p/m) and ln(q/m), m = (1 - beta) p + beta q.

    Each belongs to a weight, p or q. Where that is 0, and so below e^-200, the ratio is any that
    is finite, or infinite where the other is 0 too. Of m the larger of p and q is taken out, so
    that what remains is neither 0 nor infinite.
    """
    own, other = at_least(log_p, ZERO_EXP), at_least(log_q, ZERO_EXP)
    if KIND == DIVERGENCE_JSD:
        gap = other - own
        up = gap > 0
        least = tl.exp2(-tl.abs(gap) * LOG2E)
        of_least = tl.where(up, pair.rest, pair.beta)
        beyond = tl.log(tl.fma(of_least, least, tl.where(up, pair.beta, pair.rest)))
        return tl.minimum(-gap, 0.0) - beyond, tl.minimum(gap, 0.0) - beyond
    else:
        return own - log_q, other - log_p


@triton.jit
def row_value(ptr, outer, level, rows, inner, live):
    """fp32 of a tensor with a number a row; 0 where it is absent, and of rows not live."""
    return load_f32(ptr, row_offset(Strided(ptr, outer, level), rows, inner), live, 0.0)


def check_rows(logits: Tensor, teacher_logits: Tensor, per_row: dict[str, Tensor | None]) -> None:
    """ValueError unless the tensors are as the schema has them; the kernels would read others."""
    if teacher_logits.dtype != logits.dtype or teacher_logits.shape != logits.shape:
        raise ValueError(
            f"divergence: teacher_logits must be {logits.dtype} of shape {tuple(logits.shape)},"
            f" got {teacher_logits.dtype} of {tuple(teacher_logits.shape)}"
        )
    for name, x in (("logits", logits), ("teacher_logits", teacher_logits)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"divergence: {name} must be contiguous in the last dimension, got strides"
                f" {x.stride()}"
            )
    for name, y in per_row.items():
        if y is not None and y.shape != logits.shape[:-1]:
            raise ValueError(
                f"divergence: {name} must have shape {tuple(logits.shape[:-1])}, got"
                f" {tuple(y.shape)}"
            )
