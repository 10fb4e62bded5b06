"""Masked moments and whitening of tensors the size of a batch of tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import (
    LAUNCH,
    MERGE_BLOCK,
    RowBlock,
    Strided,
    block_moments,
    flag_bytes,
    load_flag,
    merge_parts,
    on_device,
    row_blocks,
    row_offset,
)

GEOMETRY = ["x_outer", "x_inner", "mask_outer", "mask_inner", "inner", "n"]
BLOCK, WARPS = config.TOKENS
CONSTANTS = {"BLOCK": BLOCK, "num_warps": WARPS} | LAUNCH


@triton.jit
def kept_elements(x, mask, inner, n, BLOCK: tl.constexpr, DENSE: tl.constexpr):
    """This program's elements: index, value as loaded, and whether the mask keeps each.

    Nothing is compared in a full dense block, so that a thread's accesses are as wide as they go.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    live = i < n
    if DENSE:
        if start + BLOCK <= n:
            if mask.ptr is not None:
                live = tl.load(mask.ptr + i) != 0
            value = tl.load(x.ptr + i)
        else:
            live = load_flag(mask.ptr, i, live)
            value = tl.load(x.ptr + i, mask=live, other=0.0)
    else:
        live = load_flag(mask.ptr, row_offset(mask, i, inner), live)
        value = tl.load(x.ptr + row_offset(x, i, inner), mask=live, other=0.0)
    return i, value, live


@triton.jit(do_not_specialize=[*GEOMETRY, "n_parts"])
def moments_kernel(
    x_ptr,  # (outer, inner), as the mask
    x_outer: tl.int64,
    x_inner: tl.int64,
    mask_ptr,
    mask_outer: tl.int64,
    mask_inner: tl.int64,
    parts_ptr,  # (3, n_parts) float64: counts, means, M2s
    inner: tl.int64,
    n: tl.int64,  # outer * inner
    n_parts: tl.int64,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr,  # x and the mask are contiguous
):
    xs = Strided(x_ptr, x_outer, x_inner)
    mask = Strided(mask_ptr, mask_outer, mask_inner)
    _, x, live = kept_elements(xs, mask, inner, n, BLOCK, DENSE)
    count, mean, m2 = block_moments(x, live)
    part = parts_ptr + tl.program_id(0)
    tl.store(part, count)
    tl.store(part + n_parts, mean)
    tl.store(part + 2 * n_parts, m2)


@triton.jit(do_not_specialize=["n_parts"])
def merge_moments_kernel(parts_ptr, out_ptr, n_parts, BLOCK: tl.constexpr):
    merge_parts(parts_ptr, out_ptr, n_parts, BLOCK)


@triton.jit(do_not_specialize=[*GEOMETRY, "shift_mean", "unbiased", "eps_at_std", "eps"])
def whiten_kernel(
    x_ptr,  # (outer, inner), as the mask
    x_outer: tl.int64,
    x_inner: tl.int64,
    mask_ptr,
    mask_outer: tl.int64,
    mask_inner: tl.int64,
    moments_ptr,  # (3,) float64: count, mean, M2
    out_ptr,  # (n,) fp32
    inner: tl.int64,
    n: tl.int64,  # outer * inner
    shift_mean,
    unbiased,
    eps_at_std,
    eps,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr,  # x and the mask are contiguous
):
    xs = Strided(x_ptr, x_outer, x_inner)
    mask = Strided(mask_ptr, mask_outer, mask_inner)
    i, x, live = kept_elements(xs, mask, inner, n, BLOCK, DENSE)
    mean = tl.load(moments_ptr + 1)
    free = tl.load(moments_ptr) - tl.where(unbiased != 0, 1.0, 0.0)
    var = tl.where(free > 0, tl.load(moments_ptr + 2) / tl.maximum(free, 1.0), 0.0)
    varies = var != 0  # NaN passes, so that it shows
    var = tl.where(varies, var, 1.0)
    spread = tl.where(eps_at_std != 0, tl.sqrt(var) + eps, tl.sqrt(var + eps))
    scale = (1.0 / spread).to(tl.float32)

    # The mean as two fp32 numbers: the subtraction keeps a small deviation from a large mean.
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    y = tl.where(varies, ((x.to(tl.float32) - high) - low) * scale, 0.0)
    y = tl.where(shift_mean != 0, y, (y + low) + high)
    y = tl.where(live, y, 0.0)
    if (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= n:
        tl.store(out_ptr + i, y)
    else:
        tl.store(out_ptr + i, y, mask=i < n)


def _dense(block: RowBlock) -> bool:
    """True if the block's tensors are contiguous: unit inner strides in one row."""
    x_inner, mask, mask_inner = block.args[2], block.args[3], block.args[5]
    return block.outer == 1 and x_inner == 1 and (mask is None or mask_inner == 1)


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """(3,) float64: count, mean and M2 of the unmasked elements."""
    with on_device(x):
        blocks = [b for b in row_blocks(x.shape, x, flag_bytes(mask)) if b.outer * b.inner]
        counts = [triton.cdiv(b.outer * b.inner, BLOCK) for b in blocks]
        parts = x.new_empty(3, sum(counts), dtype=torch.float64)
        for k, block in enumerate(blocks):
            moments_kernel[(counts[k],)](
                *(*block.args, parts.view(-1)[sum(counts[:k]) :]),
                *(block.inner, block.outer * block.inner, parts.shape[1]),
                DENSE=_dense(block),
                **CONSTANTS,
            )
        out = parts.new_empty(3)
        merge_moments_kernel[(1,)](parts, out, parts.shape[1], BLOCK=MERGE_BLOCK, **LAUNCH)
        return out


def whiten(
    x: Tensor,
    mask: Tensor | None,
    moments: Tensor,
    shift_mean: bool,
    unbiased: bool,
    eps_at_std: bool,
    eps: float,
) -> Tensor:
    """The op of ppo_fast/_boundary/schema.py: fp32, contiguous, shaped as x."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    with on_device(x):
        for block in row_blocks(x.shape, x, flag_bytes(mask)):
            n = block.outer * block.inner
            if n == 0:
                break
            whiten_kernel[(triton.cdiv(n, BLOCK),)](
                *(*block.args, moments, out.view(-1)[block.start :], block.inner, n),
                *(int(shift_mean), int(unbiased), int(eps_at_std), eps),
                DENSE=_dense(block),
                **CONSTANTS,
            )
    return out
