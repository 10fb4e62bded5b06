"""Tiles over tokens for the per-token losses: sequences, sums in a fixed order, the divisor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .codes import (
    N_STATS,
    REDUCTION_SEQ_MEAN_TOKEN_MEAN,
    REDUCTION_SEQ_MEAN_TOKEN_SUM_NORM,
    REDUCTION_TOKEN_MEAN,
    REDUCTION_TOKEN_SUM,
)
from .common import (
    LAUNCH,
    Strided,
    flag_bytes,
    load_f32,
    load_flag,
    pair_sum,
    strided,
    unspecialised,
)

PARTS = tl.constexpr(config.LOSS_PROGRAMS)
COUNTS_STEP = tl.constexpr(1024)  # counts per step of the merge
# Registers with which two programs of 8 warps are resident on a multiprocessor, which has 65,536.
TWO_RESIDENT = {} if torch.version.hip else {"maxnreg": 128}
# Arguments of ppo_loss and value_loss that are no tensors of tokens, see `unspecialised`.
DIMS = ("row", "col")
SHARED_POINTERS = ("cu", "denom", "grad", "counter")
SHARED_INTEGERS = ("n_rows", "n_cols", "n_tiles", "n_counts", "n_pieces", "n_seqs", "reduction")


class Counts(NamedTuple):
    """(n,) int32 inside a kernel, from which the sequences with an unmasked token are found.

    The tokens of each sequence (PER_SEQUENCE), or the live rows of each tile. A tile is of one row
    where a row has more than one, `n_pieces` in order.
    """

    ptr: Any
    n: Any
    n_pieces: Any


class Divisor(NamedTuple):
    """Divisor of a loss: the reduction's own D, or the caller's number where there is one."""

    reduction: Any
    denom_ptr: Any  # None: the number
    denom: Any  # 0: none


@triton.jit
def token_slots(tile, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """int64 row and column of a tile's ROWS * COLS slots, and which of them exist.

    The row is a scalar if it is the only one. One dimension: with two, Triton chooses which of
    them a warp spans, not always the columns.
    """
    across = tl.cdiv(n_cols, COLS).to(tl.int32)
    down = tile // across
    slot = tl.arange(0, ROWS * COLS)
    col = ((tile - down * across) * COLS).to(tl.int64) + slot % COLS
    row = (down * ROWS).to(tl.int64)
    inside = col < n_cols
    if ROWS > 1:
        row += slot // COLS
        inside &= row < n_rows
    return row, col, inside


@triton.jit
def token_offset(x, row, col):
    """int64 offsets of tokens in `x`."""
    return row * x.outer + col * x.inner


@triton.jit
def load_token(x, row, col, keep, default):
    """`load_f32` of tokens."""
    return load_f32(x.ptr, token_offset(x, row, col), keep, default)


@triton.jit
def load_token_flag(x, row, col, inside):
    """`load_flag` of tokens."""
    return load_flag(x.ptr, token_offset(x, row, col), inside)


@triton.jit
def sequence_of(cu_ptr, n_seqs, row, col):
    """The sequence of each slot: its row, or the segment that holds its column."""
    if cu_ptr is None:
        return row + col * 0
    else:
        found = row * 0 + col * 0
        left = n_seqs
        while left > 1:  # the last segment that starts at or before the slot
            half = left // 2
            starts = tl.load(cu_ptr + found + half)
            found = tl.where(starts <= col, found + half, found)
            left -= half
        return found


# fmt: off
@triton.jit(**unspecialised(("main", "old", "mask"), DIMS, ("cu",), ("n_cols",)))
def sequence_kernel(
    main_ptr, main_row: tl.int64, main_col: tl.int64,
    old_ptr, old_row: tl.int64, old_col: tl.int64,
    mask_ptr, mask_row: tl.int64, mask_col: tl.int64,
    cu_ptr,  # (S + 1,)
    counts_ptr,  # (S,) int32
    means_ptr,  # (S,) fp32, the mean log-ratio; None: not asked for
    n_cols: tl.int64,
    BLOCK: tl.constexpr,
):
    # fmt: on
    main = Strided(main_ptr, main_row, main_col)
    old = Strided(old_ptr, old_row, old_col)
    mask = Strided(mask_ptr, mask_row, mask_col)
    seq = tl.program_id(0).to(tl.int64)
    start = seq * 0
    end = start + n_cols
    if cu_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + seq).to(tl.int64), 0), n_cols)
        end = tl.maximum(tl.minimum(tl.load(cu_ptr + seq + 1).to(tl.int64), n_cols), start)
    count = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(start, end, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        keep = load_token_flag(mask, seq, col, col < end)
        count += keep.to(tl.int32)
        if means_ptr is not None and old_ptr is not None:
            log_ratio = load_token(main, seq, col, keep, 0.0)
            log_ratio -= load_token(old, seq, col, keep, 0.0)
            total += tl.where(keep, log_ratio, 0.0)
    n = tl.sum(count)
    tl.store(counts_ptr + seq, n)
    if means_ptr is not None:
        mean = tl.div_rn(pair_sum(total, BLOCK), tl.maximum(n, 1).to(tl.float32))
        tl.store(means_ptr + seq, mean)


def count_sequences(
    main: Tensor,
    old: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    means: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(S,) tokens and, with `means`, mean main − old. Launch inside `on_device`."""
    n_rows, n_cols = main.shape if main.dim() == 2 else (1, main.shape[0])
    n_seqs = n_rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    counts = torch.empty(n_seqs, dtype=torch.int32, device=main.device)
    mean = torch.empty_like(counts, dtype=torch.float32) if means else None
    constants = {"BLOCK": config.TOKENS.block, "num_warps": config.TOKENS.warps} | LAUNCH
    if n_seqs:
        sequence_kernel[(n_seqs,)](
            *(*strided(main), *strided(old), *strided(flag_bytes(mask))),
            *(cu_seqlens, counts, mean, n_cols),
            **constants,
        )
    return counts, mean


@triton.jit
def live_rows(keep, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Number of a tile's rows with an unmasked token."""
    return tl.sum(tl.max(tl.reshape(keep.to(tl.int32), [ROWS, COLS]), axis=1))


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def live_sequences(counts, PER_SEQUENCE: tl.constexpr):
    """Number of sequences with an unmasked token, float64."""
    live = tl.zeros([COUNTS_STEP], tl.int32)
    if counts.n_pieces == 1:
        for start in range(0, counts.n, COUNTS_STEP):
            i = start + tl.arange(0, COUNTS_STEP)
            count = tl.load(counts.ptr + i, mask=i < counts.n, other=0)
            if PER_SEQUENCE:
                count = (count > 0).to(tl.int32)
            live += count
    else:  # a row is live if the last live piece up to its end is its own
        before = tl.full([], -1, tl.int32)
        for start in range(0, counts.n, COUNTS_STEP):
            i = start + tl.arange(0, COUNTS_STEP)
            count = tl.load(counts.ptr + i, mask=i < counts.n, other=0)
            last = tl.associative_scan(tl.where(count > 0, i, -1), 0, _larger)
            last = tl.maximum(last, before)
            first = i // counts.n_pieces * counts.n_pieces
            ends = (i - first == counts.n_pieces - 1) & (i < counts.n)
            live += (ends & (last >= first)).to(tl.int32)
            before = tl.max(last, axis=0)
    return tl.sum(live).to(tl.float64)


@triton.jit
def divide(total, n_tokens, n_seqs, n_cols, divisor):
    """The loss of a float64 sum, 1 / D and the reduction's own D (0 for token-sum)."""
    reduction = divisor.reduction
    own = tl.where(reduction == REDUCTION_TOKEN_MEAN, n_tokens, n_seqs)
    own = tl.where(reduction == REDUCTION_SEQ_MEAN_TOKEN_SUM_NORM, n_seqs * n_cols, own)
    denom = tl.where(reduction == REDUCTION_TOKEN_SUM, 1.0, own)
    own = tl.where(reduction == REDUCTION_TOKEN_SUM, 0.0, own)
    if divisor.denom_ptr is None:
        denom = tl.where(divisor.denom > 0, divisor.denom, denom)
    else:
        denom = tl.load(divisor.denom_ptr).to(tl.float64)
    nothing = denom <= 0  # NaN passes
    denom = tl.where(nothing, 1.0, denom)
    return tl.where(nothing, 0.0, total / denom), tl.where(nothing, 0.0, 1.0 / denom), own


@triton.jit
def stack8(x0, x1, x2, x3, x4, x5, x6, x7):
    """Eight tiles side by side, (..., 2, 2, 2) in order: one reduction sums them all."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.join(even, odd)


@triton.jit
def merge_loss(
    parts_ptr,
    counts,
    divisor,
    n_cols,
    loss_ptr,
    scale_ptr,
    TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
):
    """Merge of at most PARTS partial results by the last program, which stores loss and 1 / D.

    Gives sums, the number of sequences and the reduction's own D. The first of the WIDTH sums is
    the number of tokens, sum TOTAL that of the weighted losses.
    """
    part = tl.arange(0, PARTS)[:, None]
    i = tl.arange(0, WIDTH)
    # Every load is under way before the first is waited for.
    x = tl.load(parts_ptr + part * WIDTH + i[None, :], mask=part < tl.num_programs(0), other=0.0)
    n_seqs = live_sequences(counts, PER_SEQUENCE)
    sums = tl.sum(x, axis=0)
    n_tokens = tl.sum(tl.where(i == 0, sums, 0.0))
    total = tl.sum(tl.where(i == TOTAL, sums, 0.0))
    loss, scale, own = divide(total, n_tokens, n_seqs, n_cols, divisor)
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(scale_ptr, scale.to(tl.float32))
    return sums, n_seqs, own


def empty_outputs(main: Tensor, n_grads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats, scale, grads) of a loss whose tokens have the shape of `main`."""
    f32, f64 = ({"dtype": t, "device": main.device} for t in (torch.float32, torch.float64))
    loss, scale = torch.empty((), **f32), torch.empty((), **f32)
    grads = torch.empty((n_grads, *main.shape), **f32)
    return loss, torch.empty(N_STATS.value, **f64), scale, grads


class Plan(NamedTuple):
    """Launch of a loss: (B, T), or flat tokens as one row, in tiles within rows' ends."""

    programs: int
    counts: Tensor  # int32, see Counts
    means: Tensor | None  # (S,) fp32, mean log-ratios
    sizes: tuple[int, ...]  # n_rows, n_cols, n_tiles, n_counts, n_pieces, n_seqs
    constants: dict[str, Any]


def plan(
    main: Tensor,
    old: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: int,
    *,
    means: bool = False,
    weighted: bool = False,
) -> Plan:
    """The tiles, after the counting launch where one is needed. Call it `on_device`.

    It is needed where tokens look up their sequence (seq-mean-token-mean; `means`, its mean
    log-ratio; `weighted`, its own weight), and to know which packed sequences have tokens at all.
    """
    rows, cols = main.shape if main.dim() == 2 else (1, main.shape[0])
    tile = config.token_tile(cols)
    pieces = triton.cdiv(cols, tile.cols)
    tiles = triton.cdiv(rows, tile.rows) * pieces
    look_up = means or weighted or reduction == REDUCTION_SEQ_MEAN_TOKEN_MEAN.value
    per_sequence = look_up or cu_seqlens is not None
    mean = None
    if per_sequence:
        counts, mean = count_sequences(main, old, mask, cu_seqlens, means)
        pieces = 1
    else:
        counts = torch.empty(tiles, dtype=torch.int32, device=main.device)
    n_seqs = 0 if cu_seqlens is None else counts.shape[0]
    shape = {"ROWS": tile.rows, "COLS": tile.cols, "num_warps": tile.warps}
    kind = {"PER_SEQUENCE": per_sequence, "LOOK_UP": look_up}
    constants = LAUNCH | TWO_RESIDENT | kind | shape
    sizes = (rows, cols, tiles, counts.shape[0], pieces, n_seqs)
    return Plan(max(1, min(tiles, config.LOSS_PROGRAMS)), counts, mean, sizes, constants)
