"""Token statistics of rows of fp32 logits: softmax numbers, Σp², mean and largest column.

`token_stats_kernel` reads each row once, a program per (row, segment) with the segments fixed by
V. It keeps softmax.py's state per lane as logprobs.py does, to the bit, beside it Σ 2^2d, the
row's mean and the step in which a lane met its maximum: the first of those steps is read again
for the column. The last of a row's programs folds its segments in a fixed tree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import (
    LAUNCH,
    Strided,
    flag_bytes,
    is_last_of,
    on_device,
    pair_sum,
    row_blocks,
    row_counters,
)
from .softmax import (
    HUGE,
    LOG2E,
    LOWEST,
    RUNTIME,
    SEGMENTS,
    ZERO_EXP,
    alignment,
    huge_sums,
    label_rows,
    merged,
    pair_sums,
    row_results,
    row_start,
)


@triton.jit
def rescale_all(shift, total, dot, squares):
    """softmax.rescale, and the sum of squares with every d moved by `shift`."""
    shift = tl.maximum(shift, ZERO_EXP)
    factor = tl.exp2(shift)
    return total * factor, tl.fma(shift, total, dot) * factor, squares * factor * factor


@triton.jit
def stats_step(
    row_ptr,
    col,
    end,
    top,
    step,
    shift,
    total,
    dot,
    squares,
    mean,
    scale,
    share,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A step of the scan, as softmax.scan_step, with the lanes' other numbers."""
    lanes = tl.arange(0, LANES)
    xs = ()
    for u in tl.static_range(UNROLL):
        at = row_ptr + col + u * LANES + lanes
        if MASKED:
            x = tl.load(at, mask=col + u * LANES + lanes < end, other=float("-inf"))
        else:
            x = tl.load(at)
        xs = xs + (x,)
    best = top
    for u in tl.static_range(UNROLL):
        best = tl.maximum(best, xs[u])
    step = tl.where(best > top, col, step)
    moved = tl.maximum(best * scale, -HUGE)
    total, dot, squares = rescale_all(shift - moved, total, dot, squares)
    for u in tl.static_range(UNROLL):
        d = tl.fma(xs[u], scale, -moved)
        e = tl.exp2(d)
        total += e
        dot = tl.fma(e, tl.maximum(d, ZERO_EXP), dot)
        squares = tl.fma(e, e, squares)
        x = xs[u]
        if MASKED:
            x = tl.where(col + u * LANES + lanes < end, x, 0.0)
        mean = tl.fma(x, share, mean)
    return best, step, moved, total, dot, squares, mean


@triton.jit
def first_column(row_ptr, step, end, value, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """The first column of a step that holds the value; `end` where none does."""
    column = tl.zeros([LANES], tl.int32) + end
    for u in tl.static_range(UNROLL):
        at = step + u * LANES + tl.arange(0, LANES)
        x = tl.load(row_ptr + at, mask=at < end, other=float("nan"))
        column = tl.minimum(column, tl.where(x == value, at, end))
    return tl.min(column, axis=0)


@triton.jit
def huge_squares(row_ptr, start, end, maximum, scale, LANES: tl.constexpr):
    """As softmax.huge_sums, of the squares."""
    lanes = tl.arange(0, LANES)
    squares = tl.zeros([LANES], tl.float32)
    for col in tl.range(start, end, LANES):
        x = tl.load(row_ptr + col + lanes, mask=col + lanes < end, other=float("-inf"))
        e = tl.exp2((x - maximum) * scale)
        squares = tl.fma(e, e, squares)
    return pair_sum(squares, LANES)


@triton.jit
def scan_stats(
    row_ptr,
    start,
    end,
    V,
    inv_temperature,
    inv_vocab,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(max, sum, dot, squares, mean, first column of the max) of columns [start, end).

    `end` as in softmax.scan_columns. A maximum of -inf stays.
    """
    scale = inv_temperature * LOG2E
    share = inv_temperature * inv_vocab
    top = tl.full([LANES], float("-inf"), tl.float32)
    shift = tl.full([LANES], -HUGE, tl.float32)
    step = tl.zeros([LANES], tl.int32) + start
    total = tl.zeros([LANES], tl.float32)
    dot = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    mean = tl.zeros([LANES], tl.float32)
    STEP: tl.constexpr = LANES * UNROLL
    full_end = start + (end - start) // STEP * STEP
    for col in tl.range(start, full_end, STEP, num_stages=STAGES):
        top, step, shift, total, dot, squares, mean = stats_step(
            *(row_ptr, col, V, top, step, shift, total, dot, squares, mean, scale, share),
            *(LANES, UNROLL, False),
        )
    if full_end < end:
        top, step, shift, total, dot, squares, mean = stats_step(
            *(row_ptr, full_end, V, top, step, shift, total, dot, squares, mean, scale, share),
            *(LANES, UNROLL, True),
        )
    peak = tl.max(top, axis=0)
    first = tl.min(tl.where(top == peak, step, end), axis=0)
    column = tl.minimum(first_column(row_ptr, first, end, peak, LANES, UNROLL), V - 1)
    maximum = tl.maximum(peak, LOWEST)
    total, dot, squares = rescale_all(tl.fma(maximum, -scale, shift), total, dot, squares)
    part_sum, part_dot = pair_sums(total, dot, LANES)
    part_squares, part_mean = pair_sums(squares, mean, LANES)
    if tl.abs(maximum) * scale > HUGE:
        part_sum, part_dot = huge_sums(row_ptr, start, end, maximum, scale, LANES, "")
        part_squares = huge_squares(row_ptr, start, end, maximum, scale, LANES)
    return peak, part_sum, part_dot, part_squares, part_mean, column


@triton.jit
def merged_stats(
    part_ptr, tops_ptr, n_parts, n_segments, V, inv_temperature, SEGMENTS: tl.constexpr
):
    """The same of a row whose first segment's is at part_ptr."""
    segment = tl.arange(0, SEGMENTS)
    here = segment < n_segments
    peaks = tl.load(part_ptr + segment, mask=here, other=float("-inf"))
    sums = tl.load(part_ptr + n_parts + segment, mask=here, other=0.0)
    dots = tl.load(part_ptr + 2 * n_parts + segment, mask=here, other=0.0)
    squares = tl.load(part_ptr + 3 * n_parts + segment, mask=here, other=0.0)
    means = tl.load(part_ptr + 4 * n_parts + segment, mask=here, other=0.0)
    tops = tl.load(tops_ptr + segment, mask=here, other=0)
    peak = tl.max(peaks, axis=0)
    column = tl.min(tl.where(here & (peaks == peak), tops, V - 1), axis=0)
    maxima = tl.maximum(peaks, LOWEST)
    maximum, row_sum, row_dot = merged(maxima, sums, dots, inv_temperature, SEGMENTS)
    factor = tl.exp2(tl.maximum((maxima - maximum) * (inv_temperature * LOG2E), ZERO_EXP))
    row_squares, mean = pair_sums(squares * factor * factor, means, SEGMENTS)
    return maximum, row_sum, row_dot, row_squares, mean, column


# fmt: off
@triton.jit(do_not_specialize=RUNTIME)
def token_stats_kernel(
    logits_ptr, logits_outer: tl.int64, logits_inner: tl.int64,  # (rows, V) fp32
    tokens_ptr, tokens_outer: tl.int64, tokens_inner: tl.int64,  # (rows,), as the next two
    mask_ptr, mask_outer: tl.int64, mask_inner: tl.int64,
    temperature_ptr, temperature_outer: tl.int64, temperature_inner: tl.int64,
    parts_ptr,  # (5, rows, segments) fp32: scan_stats' numbers; None, as the next two, for one
    tops_ptr,  # (rows, segments) int32
    counters_ptr,  # (rows,) int32 zeros, and so again after the launch
    logprobs_ptr, entropy_ptr, row_max_ptr, log_sum_ptr,  # (rows,) fp32 contiguous, as the next
    log_sum_sq_ptr, mean_ptr,
    top_ptr,  # (rows,) int64
    inner, V, n_parts: tl.int64, n_segments,
    inv_temperature, inv_vocab,  # 1 / V
    ignore_index: tl.int64,
    LANES: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTS: tl.constexpr,  # a power of two >= n_segments
    ALIGN: tl.constexpr,  # every row starts at a multiple of this many elements
):
    # fmt: on
    logits = Strided(logits_ptr, logits_outer, logits_inner)
    tokens = Strided(tokens_ptr, tokens_outer, tokens_inner)
    mask = Strided(mask_ptr, mask_outer, mask_inner)
    temperature = Strided(temperature_ptr, temperature_outer, temperature_inner)
    part = tl.program_id(0)
    row = part // n_segments
    segment = part - row * n_segments
    live, legal, _label, label_logit, inv_temp = label_rows(
        row, row >= 0, inner, V, logits, tokens, mask, temperature, inv_temperature, ignore_index
    )
    if live:
        row_ptr = row_start(logits, row, inner, ALIGN)
        start = segment * SEGMENT
        end = tl.minimum(start + SEGMENT, V)
        row_max, row_sum, row_dot, squares, mean, top = scan_stats(
            row_ptr, start, end, V, inv_temp, inv_vocab, LANES, UNROLL, STAGES
        )
        completes = live
        if SEGMENTS > 1:
            tl.store(parts_ptr + part, row_max)
            tl.store(parts_ptr + n_parts + part, row_sum)
            tl.store(parts_ptr + 2 * n_parts + part, row_dot)
            tl.store(parts_ptr + 3 * n_parts + part, squares)
            tl.store(parts_ptr + 4 * n_parts + part, mean)
            tl.store(tops_ptr + part, top)
            completes = is_last_of(counters_ptr + row, n_segments)
        if completes:
            if SEGMENTS > 1:
                first = row.to(tl.int64) * n_segments
                row_max, row_sum, row_dot, squares, mean, top = merged_stats(
                    *(parts_ptr + first, tops_ptr + first, n_parts, n_segments, V, inv_temp),
                    SEGMENTS,
                )
            largest = row_max
            valid, row_max, log_sum, logprob, entropy = row_results(
                row_max, row_sum, row_dot, label_logit, inv_temp, legal
            )
            # Beside the rounded maximum, as log_sum is.
            log_sum_sq = tl.log(tl.maximum(squares, 1.0))
            log_sum_sq += 2.0 * tl.fma(largest, inv_temp, -row_max)
            tl.store(logprobs_ptr + row, logprob)
            tl.store(entropy_ptr + row, entropy)
            tl.store(row_max_ptr + row, row_max)
            tl.store(log_sum_ptr + row, log_sum)
            tl.store(log_sum_sq_ptr + row, tl.where(valid, log_sum_sq, float("nan")))
            tl.store(mean_ptr + row, mean)
            tl.store(top_ptr + row, top.to(tl.int64))
    elif segment == 0:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(row_max_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)
        tl.store(log_sum_sq_ptr + row, 0.0)
        tl.store(mean_ptr + row, 0.0)
        tl.store(top_ptr + row, 0)


def token_stats(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    """The op of ppo_fast/_boundary/schema.py: six of fp32 and one of int64, shaped as tokens."""
    if logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    types = (*[torch.float32] * 6, torch.int64)
    outs = tuple(torch.empty(tokens.shape, dtype=x, device=logits.device) for x in types)
    vocab = logits.shape[-1]
    tiling = config.forward_tiling(vocab)
    segments = max(1, triton.cdiv(vocab, tiling.segment))
    padded = 1 if segments == 1 else max(SEGMENTS, triton.next_power_of_2(segments))
    with on_device(logits):
        for block in row_blocks(
            tokens.shape, logits, tokens, flag_bytes(mask), temperature_tensor
        ):
            n_rows = block.outer * block.inner
            if n_rows == 0:
                break
            parts = tops = counters = None
            if segments > 1:
                parts = logits.new_empty(5, n_rows, segments)
                tops = logits.new_empty(n_rows, segments, dtype=torch.int32)
                counters = row_counters(logits, n_rows)
            token_stats_kernel[(n_rows * segments,)](
                *(*block.args, parts, tops, counters),
                *(x.view(-1)[block.start :] for x in outs),
                *(block.inner, vocab, n_rows * segments, segments),
                *(1.0 / temperature, 1.0 / vocab, ignore_index),
                ALIGN=alignment(*block.args[:3]),
                SEGMENTS=padded,
                **tiling.constants(),
                **LAUNCH,
            )
    return outs
