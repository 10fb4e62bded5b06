"""Sequences of the per-token losses: which one a token is in, its tokens, its mean log-ratio."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import LAUNCH, flag_bytes, load_f32, load_flag, pair_sum
from .kl import clamp


def strided(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """(tensor, row stride, column stride)."""
    if x is None:
        return None, 0, 0
    return (x, 0, x.stride(0)) if x.dim() == 1 else (x, x.stride(0), x.stride(1))


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
@triton.jit
def sequence_kernel(
    main_ptr, main_row: tl.int64, main_col: tl.int64,
    old_ptr, old_row: tl.int64, old_col: tl.int64,
    mask_ptr, mask_row: tl.int64, mask_col: tl.int64,
    cu_ptr,  # (S + 1,)
    counts_ptr,  # (S,) int32
    means_ptr,  # (S,) fp32, the mean clamped log-ratio; None: not asked for
    n_cols: tl.int64,
    log_min, log_max,
    BLOCK: tl.constexpr,
):
    # fmt: on
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
        keep = load_flag(mask_ptr, seq * mask_row + col * mask_col, col < end)
        count += keep.to(tl.int32)
        if means_ptr is not None and old_ptr is not None:
            d = load_f32(main_ptr, seq * main_row + col * main_col, keep, 0.0)
            d -= load_f32(old_ptr, seq * old_row + col * old_col, keep, 0.0)
            total += tl.where(keep, clamp(d, log_min, log_max), 0.0)
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
    bounds: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(S,) tokens and, with `bounds`, mean clamped main − old. Launch inside `on_device`."""
    n_rows, n_cols = main.shape if main.dim() == 2 else (1, main.shape[0])
    n_seqs = n_rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    counts = torch.empty(n_seqs, dtype=torch.int32, device=main.device)
    means = None if bounds is None else torch.empty_like(counts, dtype=torch.float32)
    if n_seqs:
        sequence_kernel[(n_seqs,)](
            *strided(main), *strided(old), *strided(flag_bytes(mask)), cu_seqlens,
            counts, means, n_cols, *(bounds or (0.0, 0.0)),
            BLOCK=config.TOKENS.block, num_warps=config.TOKENS.warps, **LAUNCH,
        )  # fmt: skip
    return counts, means
