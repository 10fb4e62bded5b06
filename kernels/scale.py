"""Gradients times the number that a backward brings, in place where that is allowed.

Every program loads the factor first. In place it returns at once where the factor is exactly 1, as
it is for a loss that is itself the root of the backward: then nothing is read or written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import LAUNCH, RowBlock, Strided, coefficient, on_device, row_blocks
from .softmax import alignment, rounded, row_start

BLOCK, WARPS = config.SCALE
GEOMETRY = ["x_outer", "x_inner", "out_outer", "out_inner"]
SIZES = ["inner", "n_rows", "n_cols", "n_tiles"]


@triton.jit(do_not_specialize=[*GEOMETRY, *SIZES])
def scale_kernel(
    x_ptr,  # (n_rows, n_cols)
    x_outer: tl.int64,
    x_inner: tl.int64,
    out_ptr,  # the same shape: x itself in place
    out_outer: tl.int64,
    out_inner: tl.int64,
    factor_ptr,  # 0-d fp32, as the next
    scale_ptr,
    inner,
    n_rows: tl.int64,
    n_cols: tl.int64,
    n_tiles: tl.int64,  # of a row
    BLOCK: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ALIGN: tl.constexpr,  # every row starts at a multiple of this many elements
):
    factor = tl.load(factor_ptr).to(tl.float32) * coefficient(scale_ptr, 1.0)
    xs = Strided(x_ptr, x_outer, x_inner)
    outs = Strided(out_ptr, out_outer, out_inner)
    tasks = n_rows * n_tiles
    if IN_PLACE:
        tasks = tl.where(factor == 1.0, 0, tasks)
    for task in range(tl.program_id(0).to(tl.int64), tasks, tl.num_programs(0)):
        row = task // n_tiles
        first = (task - row * n_tiles) * BLOCK
        from_ptr = row_start(xs, row, inner, ALIGN) + first
        to_ptr = row_start(outs, row, inner, ALIGN) + first
        i = tl.arange(0, BLOCK)
        if first + BLOCK <= n_cols:  # no mask: whole vectors
            y = tl.load(from_ptr + i).to(tl.float32) * factor
            tl.store(to_ptr + i, rounded(y, to_ptr.dtype.element_ty))
        else:
            inside = first + i < n_cols
            y = tl.load(from_ptr + i, mask=inside, other=0.0).to(tl.float32) * factor
            tl.store(to_ptr + i, rounded(y, to_ptr.dtype.element_ty), mask=inside)


def _blocks(x: Tensor, out: Tensor) -> Iterator[tuple[RowBlock, int]]:
    """Rows and their width: one row of all elements where both tensors are contiguous."""
    flat = x.is_contiguous() and out.is_contiguous()
    lead = () if flat else x.shape[:-1]
    width = x.numel() if flat else x.shape[-1]
    for block in row_blocks(lead, x, out):
        yield block, width


def _write(out: Tensor, x: Tensor, factor: Tensor, scale: Tensor | None) -> None:
    """The launches. Fill `out`: the gradients themselves, or like them."""
    if x.numel() == 0:
        return
    with on_device(x):
        for block, width in _blocks(x, out):
            n_rows, tiles = block.outer * block.inner, triton.cdiv(width, BLOCK)
            scale_kernel[(min(n_rows * tiles, config.SCALE_PROGRAMS),)](
                *(*block.args, factor, scale, block.inner, n_rows, width, tiles),
                BLOCK=BLOCK,
                IN_PLACE=out is x,
                ALIGN=min(alignment(*block.args[:3]), alignment(*block.args[3:])),
                num_warps=WARPS,
                **LAUNCH,
            )


def scaled(grads: Tensor, factor: Tensor, scale: Tensor | None) -> Tensor:
    """The op of ppo_fast/_boundary/schema.py: contiguous, in the gradients' dtype."""
    out = torch.empty(grads.shape, dtype=grads.dtype, device=grads.device)
    _write(out, grads, factor, scale)
    return out


def scaled_(grads: Tensor, factor: Tensor, scale: Tensor | None) -> None:
    """The same over the gradients."""
    _write(grads, grads, factor, scale)
