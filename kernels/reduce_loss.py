"""What the per-token losses share: tiles over tokens, sums in one order, the divisor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import LAUNCH, ROOMY
from .options import (
    N_STATS,
    REDUCTION_SEQ_MEAN_TOKEN_MEAN,
    REDUCTION_SEQ_MEAN_TOKEN_SUM_NORM,
    REDUCTION_TOKEN_MEAN,
    REDUCTION_TOKEN_SUM,
)
from .sequences import count_sequences

PARTS_STEP = tl.constexpr(128)  # parts and counts a step of the merge
COUNTS_STEP = tl.constexpr(1024)
PIECES_STEP = tl.constexpr(64)


@triton.jit
def token_slots(tile, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """int64 row and column of a tile's ROWS * COLS slots, and which of them exist.

    Compiled, `tile` is int64; the interpreter's loops make Python numbers of it.
    One dimension: with two, Triton chooses which of them a warp spans, not always the columns.
    """
    across = tl.cdiv(n_cols, COLS)
    slot = tl.arange(0, ROWS * COLS)
    row = ((tile // across) * ROWS + slot // COLS).to(tl.int64)
    col = ((tile % across) * COLS + slot % COLS).to(tl.int64)
    return row, col, (row < n_rows) & (col < n_cols)


@triton.jit
def live_rows(keep, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows of a tile with an unmasked token."""
    return tl.sum(tl.max(tl.reshape(keep.to(tl.int32), [ROWS, COLS]), axis=1))


@triton.jit
def live_sequences(counts_ptr, n_rows, n_pieces, PER_SEQUENCE: tl.constexpr):
    """Sequences with an unmasked token.

    `counts`: (n_rows,) tokens of each sequence (PER_SEQUENCE) or live rows of each tile, or
    (n_rows, n_pieces) tokens of the pieces of each row.
    """
    live = tl.full([], 0, tl.int64)
    if n_pieces == 1:
        for start in range(0, n_rows, COUNTS_STEP):
            i = start + tl.arange(0, COUNTS_STEP)
            count = tl.load(counts_ptr + i, mask=i < n_rows, other=0)
            if PER_SEQUENCE:
                count = (count > 0).to(tl.int32)
            live += tl.sum(count)
    else:
        ROWS: tl.constexpr = COUNTS_STEP // PIECES_STEP
        for start in range(0, n_rows, ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            most = tl.zeros([ROWS], tl.int32)
            for piece in range(0, n_pieces, PIECES_STEP):
                i = piece + tl.arange(0, PIECES_STEP)[None, :]
                here = (row < n_rows) & (i < n_pieces)
                count = tl.load(counts_ptr + row * n_pieces + i, mask=here, other=0)
                most = tl.maximum(most, tl.max(count, axis=1))
            live += tl.sum((most > 0).to(tl.int32))
    return live.to(tl.float64)


@triton.jit
def divide(total, n_tokens, n_seqs, n_cols, reduction, denom_ptr, denom):
    """Of a float64 sum: the loss, 1 / D and the reduction's own D (0 for token-sum)."""
    own = tl.where(reduction == REDUCTION_TOKEN_MEAN, n_tokens, n_seqs)
    own = tl.where(reduction == REDUCTION_SEQ_MEAN_TOKEN_SUM_NORM, n_seqs * n_cols, own)
    divisor = tl.where(reduction == REDUCTION_TOKEN_SUM, 1.0, own)
    own = tl.where(reduction == REDUCTION_TOKEN_SUM, 0.0, own)
    if denom_ptr is None:
        divisor = tl.where(denom > 0, denom, divisor)
    else:
        divisor = tl.load(denom_ptr).to(tl.float64)
    nothing = divisor <= 0  # NaN passes
    divisor = tl.where(nothing, 1.0, divisor)
    return tl.where(nothing, 0.0, total / divisor), tl.where(nothing, 0.0, 1.0 / divisor), own


@triton.jit
def stack8(x0, x1, x2, x3, x4, x5, x6, x7):
    """Eight tiles side by side, (..., 2, 2, 2) in order: one reduction sums them all."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.join(even, odd)


@triton.jit
def sum_parts(parts_ptr, n_parts, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(n_parts, WIDTH) float64 -> sums, minima and maxima over the parts, in index order."""
    i = tl.arange(0, WIDTH)
    sums = tl.zeros([WIDTH], tl.float64)
    low = tl.full([WIDTH], float("inf"), tl.float64)
    high = tl.full([WIDTH], float("-inf"), tl.float64)
    for start in range(0, n_parts, BLOCK):
        row = start + tl.arange(0, BLOCK)[:, None]
        part = parts_ptr + row * WIDTH + i[None, :]
        x = tl.load(part, mask=row < n_parts, other=0.0)
        sums += tl.sum(x, axis=0)
        low = tl.minimum(low, tl.min(tl.where(row < n_parts, x, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(row < n_parts, x, float("-inf")), axis=0))
    return sums, low, high


@triton.jit
def merge_loss(
    parts_ptr, counts_ptr, n_counts, n_pieces, n_cols, reduction, denom_ptr, denom,
    loss_ptr, scale_ptr, TOTAL: tl.constexpr, WIDTH: tl.constexpr, PER_SEQUENCE: tl.constexpr,
):  # fmt: skip
    """By the last program: stores loss and 1 / D; sums, minima, maxima, sequences, own D.

    Of the WIDTH sums, 0 is the number of tokens and TOTAL that of the weighted losses.
    """
    sums, low, high = sum_parts(parts_ptr, tl.num_programs(0), WIDTH, PARTS_STEP)
    i = tl.arange(0, WIDTH)
    n_seqs = live_sequences(counts_ptr, n_counts, n_pieces, PER_SEQUENCE)
    n_tokens = tl.sum(tl.where(i == 0, sums, 0.0))
    total = tl.sum(tl.where(i == TOTAL, sums, 0.0))
    loss, scale, own = divide(total, n_tokens, n_seqs, n_cols, reduction, denom_ptr, denom)
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(scale_ptr, scale.to(tl.float32))
    return sums, low, high, n_seqs, own


def empty_outputs(main: Tensor, n_grads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats, scale, grads) of a loss whose tokens have the shape of `main`."""
    f32, f64 = ({"dtype": t, "device": main.device} for t in (torch.float32, torch.float64))
    loss, scale = torch.empty((), **f32), torch.empty((), **f32)
    grads = torch.empty((n_grads, *main.shape), **f32)
    return loss, torch.empty(N_STATS.value, **f64), scale, grads


class Plan(NamedTuple):
    """How a loss is launched: (B, T), or flat tokens as one row, in tiles within rows' ends."""

    programs: int
    counts: Tensor  # int32, see live_sequences
    means: Tensor | None  # (S,) fp32, gspo's mean log-ratios
    sizes: tuple[int, ...]  # n_rows, n_cols, n_tiles, n_counts, n_pieces, n_seqs
    options: dict[str, Any]


def plan(
    main: Tensor,
    old: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: int,
    bounds: tuple[float, float] | None = None,
) -> Plan:
    """The tiles, after the counting launch where one is needed. Call it `on_device`.

    It is needed where tokens look up their sequence (seq-mean-token-mean; gspo, which gives
    `bounds`), and to know which packed sequences have tokens at all.
    """
    rows, cols = main.shape if main.dim() == 2 else (1, main.shape[0])
    tile = config.token_tile(cols)
    pieces = triton.cdiv(cols, tile.cols)
    tiles = triton.cdiv(rows, tile.rows) * pieces
    look_up = bounds is not None or reduction == REDUCTION_SEQ_MEAN_TOKEN_MEAN.value
    per_sequence = look_up or cu_seqlens is not None
    means = None
    if per_sequence:
        counts, means = count_sequences(main, old, mask, cu_seqlens, bounds)
        n_counts, pieces = counts.shape[0], 1
    else:
        counts = torch.empty(tiles, dtype=torch.int32, device=main.device)
        n_counts = tiles if pieces == 1 else rows
    n_seqs = 0 if cu_seqlens is None else counts.shape[0]
    options = LAUNCH | ROOMY | {
        "PER_SEQUENCE": per_sequence, "LOOK_UP": look_up, "ROWS": tile.rows, "COLS": tile.cols,
        "num_warps": tile.warps,
    }  # fmt: skip
    sizes = (rows, cols, tiles, n_counts, pieces, n_seqs)
    return Plan(max(1, min(tiles, config.LOSS_PROGRAMS)), counts, means, sizes, options)
