"""Divergences of rows of logits from a teacher's.

`divergence_kernel` reads both rows once, a program per (row, segment) with the segments fixed by
V. It sums p ln(p/q) and q ln(q/p), for jsd p ln(p/m) and q ln(q/m), per lane; the last of a row's
programs adds its segments in a fixed tree. The gradient is in divergence_grad.py. Bits: as of
logprobs.py, a row's own.
"""

from __future__ import annotations

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
    is_last_of,
    load_flag,
    on_device,
    pair_sum,
    row_blocks,
    row_counters,
    row_offset,
)
from .divergence_grad import divergence_bwd, divergence_bwd_, divergence_bwd_bf16_
from .divergence_pair import (
    RUNTIME,
    STATES,
    Pair,
    check_rows,
    log_probabilities,
    log_ratios,
    row_value,
)
from .softmax import LOG2E, SEGMENTS, alignment, inverse_temperature, pair_sums, row_start, widened

__all__ = ["divergence_bwd", "divergence_bwd_", "divergence_bwd_bf16_", "divergence_fwd"]

# What a probability counts as that is not 0 and underflows: beside a probability of 0 its term is
# infinite, which 0 times it would not be; beside others it stays as good as 0.
LEAST = tl.constexpr(1.4e-45)


@triton.jit
def weighted(total, log_weight, ratio):
    """The sum with e^log_weight * ratio more: nothing where the weight is exactly 0."""
    weight = tl.exp2(log_weight * LOG2E)
    weight = tl.where(weight == 0.0, LEAST, weight)
    return tl.fma(weight, tl.where(log_weight == float("-inf"), 0.0, ratio), total)


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
    check_rows(logits, teacher_logits, dict(zip(STATES, states, strict=True)))
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
