"""The gradient of divergence.py, and of log-probability and entropy beside it, by the logits.

The two kernels are those of logprobs_grad.py with the teacher's row beside the student's. But for
the label, dz_j = p_j (slope ln p_j + own ln(p_j/q_j) + offset) + other (p_j - q_j), with m_j in
place of q_j for jsd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .codes import DIVERGENCE_FORWARD, DIVERGENCE_MIXED, DIVERGENCE_REVERSE
from .common import (
    LAUNCH,
    Strided,
    flag_bytes,
    load_f32,
    load_flag,
    on_device,
    row_blocks,
    row_offset,
)
from .divergence_pair import (
    GRADS,
    PER_ROW,
    RUNTIME,
    SAVED,
    Pair,
    at_least,
    check_rows,
    log_probabilities,
    log_ratios,
    row_value,
)
from .logprobs_grad import ZERO_ROW
from .softmax import (
    LOG2E,
    ZERO_EXP,
    alignment,
    bf16_rows,
    grad_columns,
    inverse_temperature,
    row_start,
    zero_columns,
)

# ln q of a q that is 0, in a gradient: p times it is 0 where p is 0. Elsewhere kl is infinite, and
# the gradient without a number whatever stands here.
FAINT = tl.constexpr(-1e30)
N_TERMS = tl.constexpr(
    11
)  # a Pair's up to teacher_inv_temperature, then a PairGradient's from offset on
NO_LABEL = tl.constexpr(-2)  # in place of the label's column, of a label that has none here


class PairGradient(NamedTuple):
    """The terms of a row's gradient inside a kernel."""

    pair: Any
    label: Any  # int32 column
    offset: Any
    slope: Any
    own: Any
    other: Any
    at_label: Any  # dz of the label


@triton.jit
def pair_grad(x, y, row, KIND: tl.constexpr):
    """dz of a column that is not the label's, from a PairGradient."""
    pair = row.pair
    log_p, log_q = log_probabilities(x, y, pair)
    p = tl.exp2(log_p * LOG2E)
    inner = tl.fma(row.slope, tl.maximum(log_p, ZERO_EXP), row.offset)
    if KIND != DIVERGENCE_FORWARD:
        of_student, _ = log_ratios(log_p, at_least(log_q, FAINT), pair, KIND)
        inner = tl.fma(row.own, of_student, inner)
    dz = p * inner
    if (KIND == DIVERGENCE_FORWARD) | (KIND == DIVERGENCE_MIXED):
        dz = tl.fma(row.other, p - tl.exp2(log_q * LOG2E), dz)
    return dz


@triton.jit
def kind_slopes(slope, beta, rest, KIND: tl.constexpr):
    """(own, other) of a PairGradient, from the slope by the divergence."""
    none = tl.zeros_like(slope)
    if KIND == DIVERGENCE_REVERSE:
        return slope, none
    elif KIND == DIVERGENCE_FORWARD:
        return none, slope
    elif KIND == DIVERGENCE_MIXED:
        return slope * beta, slope * rest
    else:
        return slope * rest, none


# fmt: off
@triton.jit(**RUNTIME)
def divergence_terms_kernel(
    logits_ptr, logits_outer: tl.int64, logits_inner: tl.int64,  # (rows, V)
    teacher_ptr, teacher_outer: tl.int64, teacher_inner: tl.int64,  # (rows, V) of the same type
    tokens_ptr, tokens_outer: tl.int64, tokens_inner: tl.int64,  # (rows,), as the next twelve
    mask_ptr, mask_outer: tl.int64, mask_inner: tl.int64,
    temperature_ptr, temperature_outer: tl.int64, temperature_inner: tl.int64,
    teacher_temperature_ptr,
    teacher_temperature_outer: tl.int64, teacher_temperature_inner: tl.int64,
    row_max_ptr, row_max_outer: tl.int64, row_max_inner: tl.int64,
    log_sum_ptr, log_sum_outer: tl.int64, log_sum_inner: tl.int64,
    teacher_max_ptr, teacher_max_outer: tl.int64, teacher_max_inner: tl.int64,
    teacher_log_sum_ptr, teacher_log_sum_outer: tl.int64, teacher_log_sum_inner: tl.int64,
    grad_logprobs_ptr, grad_logprobs_outer: tl.int64, grad_logprobs_inner: tl.int64,
    grad_entropy_ptr, grad_entropy_outer: tl.int64, grad_entropy_inner: tl.int64,
    grad_divergence_ptr, grad_divergence_outer: tl.int64, grad_divergence_inner: tl.int64,
    entropy_ptr, entropy_outer: tl.int64, entropy_inner: tl.int64,
    kl_ptr, kl_outer: tl.int64, kl_inner: tl.int64,
    terms_ptr, labels_ptr,  # (N_TERMS, rows) fp32, (rows,) int32
    inner, V, n_rows: tl.int64,
    inv_temperature, teacher_inv_temperature, beta, rest,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
):
    # fmt: on
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n_rows
    mask = Strided(mask_ptr, mask_outer, mask_inner)
    tokens = Strided(tokens_ptr, tokens_outer, tokens_inner)
    student = Strided(logits_ptr, logits_outer, logits_inner)
    teacher = Strided(teacher_ptr, teacher_outer, teacher_inner)
    temperature = Strided(temperature_ptr, temperature_outer, temperature_inner)
    of_teacher = Strided(
        teacher_temperature_ptr, teacher_temperature_outer, teacher_temperature_inner
    )
    live = load_flag(mask_ptr, row_offset(mask, rows, inner), inside)
    label = tl.load(tokens_ptr + row_offset(tokens, rows, inner), mask=live, other=-1)
    here = (label >= 0) & (label < V)
    x = load_f32(logits_ptr, row_offset(student, rows, inner) + label, here, 0.0)
    y = load_f32(teacher_ptr, row_offset(teacher, rows, inner) + label, here, 0.0)
    row_max = row_value(row_max_ptr, row_max_outer, row_max_inner, rows, inner, live)
    log_sum = row_value(log_sum_ptr, log_sum_outer, log_sum_inner, rows, inner, live)
    inv_temp = inverse_temperature(temperature, rows, inner, live, inv_temperature)
    teacher_max = row_value(
        teacher_max_ptr, teacher_max_outer, teacher_max_inner, rows, inner, live
    )
    teacher_log_sum = row_value(
        *(teacher_log_sum_ptr, teacher_log_sum_outer, teacher_log_sum_inner), *(rows, inner, live)
    )
    other_inv_temp = inverse_temperature(of_teacher, rows, inner, live, teacher_inv_temperature)
    states = (row_max, log_sum, inv_temp, teacher_max, teacher_log_sum, other_inv_temp)
    pair = Pair(*states, beta, rest)
    g = row_value(grad_logprobs_ptr, grad_logprobs_outer, grad_logprobs_inner, rows, inner, live)
    h = row_value(grad_entropy_ptr, grad_entropy_outer, grad_entropy_inner, rows, inner, live)
    c = row_value(
        grad_divergence_ptr, grad_divergence_outer, grad_divergence_inner, rows, inner, live
    )
    entropy = row_value(entropy_ptr, entropy_outer, entropy_inner, rows, inner, live)
    kl = row_value(kl_ptr, kl_outer, kl_inner, rows, inner, live)

    # A label at -inf stays impossible: no gradient through its log-probability.
    g = tl.where(here & (tl.fma(x, inv_temp, -row_max) == float("-inf")), 0.0, g)
    own, other = kind_slopes(c * inv_temp, beta, rest, KIND)
    offset = -tl.fma(h, entropy, g) * inv_temp
    offset = tl.where(own == 0.0, offset, tl.fma(-own, kl, offset))  # 0 times an infinite kl too
    slope = -h * inv_temp
    gradient = PairGradient(pair, label, offset, slope, own, other, 0.0)
    at_label = pair_grad(x, y, gradient, KIND) + g * inv_temp
    terms = states + (offset, slope, own, other, at_label)
    for i in tl.static_range(N_TERMS):
        tl.store(terms_ptr + i * n_rows + rows, terms[i], mask=inside)
    column = tl.where(here, label, NO_LABEL).to(tl.int32)
    zero = (g == 0.0) & (h == 0.0) & (c == 0.0)
    tl.store(labels_ptr + rows, tl.where(zero, ZERO_ROW, column), mask=inside)


# fmt: off
@triton.jit(**RUNTIME)
def divergence_grad_kernel(
    logits_ptr, logits_outer: tl.int64, logits_inner: tl.int64,  # (rows, V)
    teacher_ptr, teacher_outer: tl.int64, teacher_inner: tl.int64,  # (rows, V) of the same type
    out_ptr, out_outer: tl.int64, out_inner: tl.int64,  # (rows, V): in place, the logits' memory
    terms_ptr, labels_ptr,  # (N_TERMS, rows) fp32, (rows,) int32
    inner, V, n_rows: tl.int64, n_segments, beta, rest,
    KIND: tl.constexpr,
    LANES: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr,  # every row starts at a multiple of this many elements
):
    # fmt: on
    part = tl.program_id(0)
    row = part // n_segments
    row_ptr = row_start(Strided(logits_ptr, logits_outer, logits_inner), row, inner, ALIGN)
    beside = row_start(Strided(teacher_ptr, teacher_outer, teacher_inner), row, inner, ALIGN)
    to_ptr = row_start(Strided(out_ptr, out_outer, out_inner), row, inner, ALIGN)
    start = (part - row * n_segments) * SEGMENT
    end = tl.where(n_segments == 1, V, tl.minimum(start + SEGMENT, V))
    label = tl.load(labels_ptr + row)
    if label == ZERO_ROW:
        zero_columns(to_ptr, start, end, V, LANES * UNROLL)
    else:
        x = ()
        for i in tl.static_range(N_TERMS):
            x = x + (tl.load(terms_ptr + i * n_rows + row),)
        pair = Pair(x[0], x[1], x[2], x[3], x[4], x[5], beta, rest)
        gradient = PairGradient(pair, label, x[6], x[7], x[8], x[9], x[10])
        grad_columns(
            *(row_ptr, beside, to_ptr, start, end, V, gradient, pair_grad, KIND),
            *(LANES, UNROLL, STAGES, ""),
        )


def _write(out: Tensor, *args: Any) -> None:
    """The launches. Fill `out`: (part of) the logits, or like them; `args` are the schema's."""
    *grads, logits, teacher_logits, tokens, mask, of_student, of_teacher, entropy = args[:10]
    *states, kl, temperature, teacher_temperature, kind, beta = args[10:]
    vocab = logits.shape[-1]
    tiling = config.pair_tiling(vocab)
    # A row whose gradient overlaps other columns is one program's: see softmax.grad_step.
    segments = triton.cdiv(vocab, tiling.segment) if out.dtype == logits.dtype else 1
    per_row = (tokens, flag_bytes(mask), of_student, of_teacher, *states, *grads, entropy, kl)
    names = ("tokens", *PER_ROW, *GRADS, *SAVED)
    check_rows(logits, teacher_logits, dict(zip(names, per_row, strict=True)))
    weights = (beta, 1.0 - beta)
    with on_device(logits):
        for block in row_blocks(logits.shape[:-1], logits, teacher_logits, *per_row, out):
            n_rows = block.outer * block.inner
            if n_rows == 0 or vocab == 0:
                break
            terms = logits.new_empty(N_TERMS.value, n_rows, dtype=torch.float32)
            labels = logits.new_empty(n_rows, dtype=torch.int32)
            divergence_terms_kernel[(triton.cdiv(n_rows, config.ROW_SCALARS.block),)](
                *(*block.args[:-3], terms, labels),
                *(block.inner, vocab, n_rows),
                *(1.0 / temperature, 1.0 / teacher_temperature, *weights),
                KIND=kind,
                ROWS=config.ROW_SCALARS.block,
                num_warps=config.ROW_SCALARS.warps,
                **LAUNCH,
            )
            rows = (block.args[:3], block.args[3:6], block.args[-3:])
            divergence_grad_kernel[(n_rows * segments,)](
                *(*rows[0], *rows[1], *rows[2], terms, labels),
                *(block.inner, vocab, n_rows, segments, *weights),
                KIND=kind,
                ALIGN=min(alignment(*x) for x in rows),
                **tiling.constants(),
                **LAUNCH,
            )


def divergence_bwd(*args: Any) -> Tensor:
    """The op of ppo_fast/_boundary/schema.py: dlogits, contiguous, in the dtype of the logits."""
    logits = args[3]
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write(out, *args)
    return out


def divergence_bwd_(*args: Any) -> None:
    """The same, written over the logits."""
    _write(args[3], *args)


def divergence_bwd_bf16_(*args: Any) -> None:
    """The same over fp32 logits, in bf16: each row of dlogits starts where the row does."""
    _write(bf16_rows(args[3]), *args)
