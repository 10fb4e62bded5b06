"""Value loss, gradient and statistics: one launch, one read; see ppo_loss for the sequences."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .codes import FORM_CLIPPED, FORM_MAX, N_SUMS, ValueCodes, ValueParams
from .common import (
    Strided,
    clamp,
    counter,
    flag_bytes,
    is_last,
    on_device,
    strided,
    unspecialised,
)
from .loss_tiles import (
    DIMS,
    SHARED_INTEGERS,
    SHARED_POINTERS,
    Counts,
    Divisor,
    empty_outputs,
    live_rows,
    load_token,
    load_token_flag,
    merge_loss,
    plan,
    sequence_of,
    stack8,
    token_slots,
)

# The sums are STATS_FIELDS[16:24]; the divisor is formed at the end.
FIRST = tl.constexpr(16)
WIDTH = tl.constexpr(8)
LOSS = tl.constexpr(1)
LOSS_DENOM = tl.constexpr(2)
# Tensors of tokens, as the kernel's arguments name them.
TOKENS = ("values", "old", "ret", "mask")


@triton.jit
def squared_error(value, target, old, clip, scale, form):
    """The token's loss, its derivative, and whether the clip is active.

    Comparisons and minima pass over a NaN, so one in the old value is put where it shows.
    """
    error = value - target
    plain = error * error
    bounded = clamp(value, old - clip, old + clip)
    bounded_error = bounded - target
    clipped = bounded_error * bounded_error
    outside = (value < old - clip) | (value > old + clip)
    by_max = form == FORM_MAX
    by_clip = form == FORM_CLIPPED
    larger = clipped > plain
    term = tl.where(by_max, tl.where(larger, clipped, plain), tl.where(by_clip, clipped, plain))
    slope = tl.where(by_max, tl.where(larger, 0.0, error), error)
    slope = tl.where(by_clip, tl.where(outside, 0.0, bounded_error), slope)
    never = outside & (outside == 0)
    known = (old - clip <= old + clip) | ((by_max | by_clip) == 0)
    term = tl.where(known, term, old)
    slope = tl.where(known, slope, old)
    active = tl.where(by_max, larger, tl.where(by_clip, outside, never))
    return scale * term, 2.0 * scale * slope, active


@triton.jit
def store_stats(stats_ptr, sums, own):
    i = tl.arange(0, WIDTH)
    j = tl.arange(0, FIRST)
    tl.store(stats_ptr + j, tl.zeros([FIRST], tl.float64))
    tl.store(stats_ptr + FIRST + i, tl.where(i == LOSS_DENOM, own, sums))
    rest = FIRST + WIDTH + i
    tl.store(stats_ptr + rest, tl.zeros([WIDTH], tl.float64), mask=rest < N_SUMS)
    tl.store(stats_ptr + N_SUMS, float("inf"))
    tl.store(stats_ptr + N_SUMS + 1, float("-inf"))


# fmt: off
@triton.jit(**unspecialised(TOKENS, DIMS, SHARED_POINTERS, (*SHARED_INTEGERS, "form")))
def value_kernel(
    values_ptr, values_row: tl.int64, values_col: tl.int64,
    old_ptr, old_row: tl.int64, old_col: tl.int64,
    ret_ptr, ret_row: tl.int64, ret_col: tl.int64,
    mask_ptr, mask_row: tl.int64, mask_col: tl.int64,
    cu_ptr,  # (S + 1,)
    counts_ptr,  # int32, see Counts
    denom_ptr, grad_ptr, loss_ptr, scale_ptr, stats_ptr,
    parts_ptr,  # (programs, 8) float64
    counter_ptr,
    n_rows: tl.int64, n_cols: tl.int64, n_tiles: tl.int32, n_counts: tl.int32, n_pieces: tl.int32,
    n_seqs: tl.int64,
    form: tl.int32, reduction: tl.int32,
    clip, factor, denom,
    PER_SEQUENCE: tl.constexpr,  # counts holds the tokens of each sequence
    LOOK_UP: tl.constexpr,  # and tokens need them
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    # fmt: on
    values = Strided(values_ptr, values_row, values_col)
    old_values = Strided(old_ptr, old_row, old_col)
    returns = Strided(ret_ptr, ret_row, ret_col)
    mask = Strided(mask_ptr, mask_row, mask_col)
    acc = tl.zeros([WIDTH], tl.float64)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        row, col, inside = token_slots(tile, n_rows, n_cols, ROWS, COLS)
        keep = load_token_flag(mask, row, col, inside)
        value = load_token(values, row, col, keep, 0.0)
        target = load_token(returns, row, col, keep, 0.0)
        old = value
        if old_ptr is not None:
            old = load_token(old_values, row, col, keep, 0.0)
        term, slope, active = squared_error(value, target, old, clip, factor, form)
        weight = 1.0
        if LOOK_UP:
            seq = sequence_of(cu_ptr, n_seqs, row, col)
            count = tl.load(counts_ptr + seq, mask=keep, other=1).to(tl.float32)
            weight = tl.div_rn(1.0, count)
        if grad_ptr is not None:
            to_ptr = grad_ptr + row * n_cols + col
            tl.store(to_ptr, tl.where(keep, weight * slope, 0.0), mask=inside)
        wide = tl.where(keep, target, 0.0).to(tl.float64)
        error = tl.where(keep, wide - old, 0.0)
        sums = stack8(
            tl.where(keep, 1.0, 0.0).to(tl.float64),
            tl.where(keep, weight * term, 0.0).to(tl.float64),
            wide * 0.0,
            tl.where(keep & active, 1.0, 0.0).to(tl.float64),
            wide,
            wide * wide,
            error,
            error * error,
        )
        acc += tl.sum(tl.reshape(sums, [ROWS * COLS, WIDTH]), axis=0)
        if not PER_SEQUENCE:
            tl.store(counts_ptr + tile, live_rows(keep, ROWS, COLS))
    tl.store(parts_ptr + tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), acc)
    if is_last(counter_ptr):
        counts = Counts(counts_ptr, n_counts, n_pieces)
        divisor = Divisor(reduction, denom_ptr, denom)
        sums, _, own = merge_loss(
            parts_ptr, counts, divisor, n_cols, loss_ptr, scale_ptr, LOSS, WIDTH, PER_SEQUENCE
        )
        store_stats(stats_ptr, sums, own)


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    denom_tensor: Tensor | None,
    codes: list[int],
    params: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of ppo_fast/_boundary/schema.py: (loss, stats, scale, grads)."""
    c, p = ValueCodes(*codes), ValueParams(*params)
    loss, stats, scale, grads = outputs = empty_outputs(values, c.n_grads)
    tensors = (values, old_values, returns, flag_bytes(mask))
    with on_device(values):
        tiles = plan(values, None, mask, cu_seqlens, c.reduction)
        parts = stats.new_empty(tiles.programs, WIDTH.value)
        value_kernel[(tiles.programs,)](
            *(arg for x in tensors for arg in strided(x)),
            *(cu_seqlens, tiles.counts, denom_tensor),
            *(*grads, *[None] * (1 - c.n_grads), loss, scale, stats, parts, counter(values)),
            *(*tiles.sizes, c.form, c.reduction, p.clip, p.scale, p.denom),
            **tiles.constants,
        )
    return outputs
