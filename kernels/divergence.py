"""Divergences of rows of logits from a teacher's, and their gradients.

The state of each row's softmax is given, the student's and the teacher's: a column's ln p and
ln q come from them. `divergence_kernel` reads both rows once, a program per (row, segment) with
the segments fixed by V. It sums p ln(p/q) and q ln(q/p), for jsd p ln(p/m) and q ln(q/m), per
lane; the last of a row's programs adds its segments in a fixed tree. `divergence_terms_kernel`
and `divergence_grad_kernel` are the two of logprobs_grad.py with the teacher's row beside the
student's. But for the label, dz_j = p_j (slope ln p_j + own ln(p_j/q_j) + offset)
+ other (p_j - q_j), with m_j in place of q_j for jsd.

Where p and q are equal to the bit, the divergence is 0 and so is its gradient. Bits: as of
logprobs.py, a row's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .codes import DIVERGENCE_FORWARD, DIVERGENCE_JSD, DIVERGENCE_MIXED, DIVERGENCE_REVERSE
from .common import (
    LAUNCH,
    Strided,
    flag_bytes,
    is_last_of,
    load_f32,
    load_flag,
    on_device,
    pair_sum,
    row_blocks,
    row_counters,
    row_offset,
    unspecialised,
)
from .logprobs_grad import ZERO_ROW
from .softmax import (
    LOG2E,
    SEGMENTS,
    ZERO_EXP,
    alignment,
    bf16_rows,
    grad_columns,
    inverse_temperature,
    log_probability,
    pair_sums,
    row_start,
    widened,
    zero_columns,
)

# What a probability counts as that is not 0 and underflows: beside a probability of 0 its term is
# infinite, which 0 times it would not be; beside others it stays as good as 0.
LEAST = tl.constexpr(1.4e-45)
# ln q of a q that is 0, in a gradient: p times it is 0 where p is 0. Elsewhere kl is infinite, and
# the gradient without a number whatever stands here.
FAINT = tl.constexpr(-1e30)
N_TERMS = tl.constexpr(
    11
)  # a Pair's up to teacher_inv_temperature, then a PairGradient's from offset on
NO_LABEL = tl.constexpr(-2)  # in place of the label's column, of a label that has none here

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
def weighted(total, log_weight, ratio):
    """The sum with e^log_weight * ratio more: nothing where the weight is exactly 0."""
    weight = tl.exp2(log_weight * LOG2E)
    weight = tl.where(weight == 0.0, LEAST, weight)
    return tl.fma(weight, tl.where(log_weight == float("-inf"), 0.0, ratio), total)


@triton.jit
def row_value(ptr, outer, level, rows, inner, live):
    """fp32 of a tensor with a number a row; 0 where it is absent, and of rows not live."""
    return load_f32(ptr, row_offset(Strided(ptr, outer, level), rows, inner), live, 0.0)


@triton.jit
def divergence_step(
    row_ptr,
    teacher_ptr,
    col,
    end,
    own,
    other,
    pair,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    MASKED: tl.constexpr,
    KIND: tl.constexpr,
):
    """The lanes' sums, the student's own and the other's, with UNROLL columns a lane more."""
    lanes = tl.arange(0, LANES)
    xs = ()
    ys = ()
    for u in tl.static_range(UNROLL):
        at = col + u * LANES + lanes
        if MASKED:
            x = tl.load(row_ptr + at, mask=at < end, other=float("-inf"))
            y = tl.load(teacher_ptr + at, mask=at < end, other=float("-inf"))
        else:
            x = tl.load(row_ptr + at)
            y = tl.load(teacher_ptr + at)
        xs = xs + (widened(x),)
        ys = ys + (widened(y),)
    for u in tl.static_range(UNROLL):
        log_p, log_q = log_probabilities(xs[u], ys[u], pair)
        of_student, of_teacher = log_ratios(log_p, log_q, pair, KIND)
        if KIND != DIVERGENCE_FORWARD:
            own = weighted(own, log_p, of_student)
        if KIND != DIVERGENCE_REVERSE:
            other = weighted(other, log_q, of_teacher)
    return own, other


@triton.jit
def divergence_columns(
    row_ptr,
    teacher_ptr,
    start,
    end,
    V,
    pair,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
):
    """The two sums over columns [start, end); `end` as in softmax.scan_columns."""
    own = tl.zeros([LANES], tl.float32)
    other = tl.zeros([LANES], tl.float32)
    STEP: tl.constexpr = LANES * UNROLL
    full_end = start + (end - start) // STEP * STEP
    for col in tl.range(start, full_end, STEP, num_stages=STAGES):
        own, other = divergence_step(
            row_ptr, teacher_ptr, col, V, own, other, pair, LANES, UNROLL, False, KIND
        )
    if full_end < end:
        own, other = divergence_step(
            row_ptr, teacher_ptr, full_end, V, own, other, pair, LANES, UNROLL, True, KIND
        )
    return pair_sums(own, other, LANES)


@triton.jit
def divergence_results(own, other, pair, KIND: tl.constexpr):
    """(divergence, kl) of a row from its sums."""
    if KIND == DIVERGENCE_REVERSE:
        return own, own
    elif KIND == DIVERGENCE_FORWARD:
        return other, own  # which nothing was added to
    elif KIND == DIVERGENCE_MIXED:
        return tl.fma(pair.beta, own, pair.rest * other), own
    else:
        return tl.fma(pair.beta, other, pair.rest * own), own


# fmt: off
@triton.jit(**RUNTIME)
def divergence_kernel(
    logits_ptr, logits_outer: tl.int64, logits_inner: tl.int64,  # (rows, V)
    teacher_ptr, teacher_outer: tl.int64, teacher_inner: tl.int64,  # (rows, V) of the same type
    mask_ptr, mask_outer: tl.int64, mask_inner: tl.int64,  # (rows,), as the next six
    temperature_ptr, temperature_outer: tl.int64, temperature_inner: tl.int64,
    teacher_temperature_ptr,
    teacher_temperature_outer: tl.int64, teacher_temperature_inner: tl.int64,
    row_max_ptr, row_max_outer: tl.int64, row_max_inner: tl.int64,
    log_sum_ptr, log_sum_outer: tl.int64, log_sum_inner: tl.int64,
    teacher_max_ptr, teacher_max_outer: tl.int64, teacher_max_inner: tl.int64,
    teacher_log_sum_ptr, teacher_log_sum_outer: tl.int64, teacher_log_sum_inner: tl.int64,
    parts_ptr,  # (2, rows, segments) fp32; None, as the next, for one segment
    counters_ptr,  # (rows,) int32 zeros, and so again after the launch
    divergence_ptr, kl_ptr,  # (rows,) fp32 contiguous
    inner, V, n_parts: tl.int64, n_segments,
    inv_temperature, teacher_inv_temperature, beta, rest,
    KIND: tl.constexpr,
    LANES: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTS: tl.constexpr,  # a power of two >= n_segments
    ALIGN: tl.constexpr,  # every row starts at a multiple of this many elements
):
    # fmt: on
    part = tl.program_id(0)
    row = part // n_segments
    segment = part - row * n_segments
    mask = Strided(mask_ptr, mask_outer, mask_inner)
    temperature = Strided(temperature_ptr, temperature_outer, temperature_inner)
    of_teacher = Strided(
        teacher_temperature_ptr, teacher_temperature_outer, teacher_temperature_inner
    )
    live = load_flag(mask_ptr, row_offset(mask, row, inner), row >= 0)
    if live:
        pair = Pair(
            row_value(row_max_ptr, row_max_outer, row_max_inner, row, inner, live),
            row_value(log_sum_ptr, log_sum_outer, log_sum_inner, row, inner, live),
            inverse_temperature(temperature, row, inner, live, inv_temperature),
            row_value(teacher_max_ptr, teacher_max_outer, teacher_max_inner, row, inner, live),
            row_value(
                *(teacher_log_sum_ptr, teacher_log_sum_outer, teacher_log_sum_inner),
                *(row, inner, live),
            ),
            inverse_temperature(of_teacher, row, inner, live, teacher_inv_temperature),
            *(beta, rest),
        )
        row_ptr = row_start(Strided(logits_ptr, logits_outer, logits_inner), row, inner, ALIGN)
        beside = row_start(Strided(teacher_ptr, teacher_outer, teacher_inner), row, inner, ALIGN)
        start = segment * SEGMENT
        end = tl.minimum(start + SEGMENT, V)
        own, other = divergence_columns(
            row_ptr, beside, start, end, V, pair, LANES, UNROLL, STAGES, KIND
        )
        completes = live
        if SEGMENTS > 1:
            tl.store(parts_ptr + part, own)
            tl.store(parts_ptr + n_parts + part, other)
            completes = is_last_of(counters_ptr + row, n_segments)
        if completes:
            if SEGMENTS > 1:
                each = tl.arange(0, SEGMENTS)
                parts = parts_ptr + row.to(tl.int64) * n_segments + each
                here = each < n_segments
                own = pair_sum(tl.load(parts, mask=here, other=0.0), SEGMENTS)
                other = pair_sum(tl.load(parts + n_parts, mask=here, other=0.0), SEGMENTS)
            divergence, kl = divergence_results(own, other, pair, KIND)
            tl.store(divergence_ptr + row, divergence)
            tl.store(kl_ptr + row, kl)
    elif segment == 0:
        tl.store(divergence_ptr + row, 0.0)
        tl.store(kl_ptr + row, 0.0)


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


def _check(logits: Tensor, teacher_logits: Tensor, per_row: dict[str, Tensor | None]) -> None:
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


def divergence_fwd(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    teacher_temperature_tensor: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    teacher_max: Tensor,
    teacher_log_sum: Tensor,
    temperature: float,
    teacher_temperature: float,
    kind: int,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The op of ppo_fast/_boundary/schema.py: two of fp32, a number a row."""
    lead, vocab = logits.shape[:-1], logits.shape[-1]
    outs = tuple(torch.empty(lead, dtype=torch.float32, device=logits.device) for _ in range(2))
    tiling = config.pair_tiling(vocab)
    segments = max(1, triton.cdiv(vocab, tiling.segment))
    padded = 1 if segments == 1 else max(SEGMENTS, triton.next_power_of_2(segments))
    per_row = (flag_bytes(mask), temperature_tensor, teacher_temperature_tensor)
    states = (row_max, log_sum, teacher_max, teacher_log_sum)
    _check(logits, teacher_logits, dict(zip(STATES, states, strict=True)))
    with on_device(logits):
        for block in row_blocks(lead, logits, teacher_logits, *per_row, *states):
            n_rows = block.outer * block.inner
            if n_rows == 0:
                break
            parts = counters = None
            if segments > 1:
                parts = logits.new_empty(2, n_rows, segments, dtype=torch.float32)
                counters = row_counters(logits, n_rows)
            divergence_kernel[(n_rows * segments,)](
                *(*block.args, parts, counters),
                *(x.view(-1)[block.start :] for x in outs),
                *(block.inner, vocab, n_rows * segments, segments),
                *(1.0 / temperature, 1.0 / teacher_temperature, beta, 1.0 - beta),
                KIND=kind,
                ALIGN=min(alignment(*block.args[:3]), alignment(*block.args[3:6])),
                SEGMENTS=padded,
                **tiling.constants(),
                **LAUNCH,
            )
    return outs


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
    _check(logits, teacher_logits, dict(zip(names, per_row, strict=True)))
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
