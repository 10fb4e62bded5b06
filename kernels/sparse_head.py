"""Products of hidden states with the kept rows of the head's weight, and their gradients.

`pair_logits_kernel` takes a few pairs a program, of whichever rows: it finds the row of each by
bisection of the offsets, so that no row's length matters to the balance. The two gradients are
one sum, dz[i] times the vector of pair i, over a row's pairs for the hidden states' and over an
id's for the weight's. `pair_sums_kernel` takes an output row a program and writes it once. Of
more than SEGMENT pairs it adds the first; the others are shares of `pair_parts_kernel`, launched
before it, and are added in order. So a program's work is bounded: a few ids are kept by almost
every row, and a row of flat probabilities keeps thousands.

Bits: lanes, segments and the order of the sums are fixed by the hidden size and counted from an
output row's own first pair; they depend on no other row, nor on strides and alignment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import LAUNCH, flag_bytes, on_device, pair_sum, unspecialised
from .softmax import aligned, alignment, rounded, widened
from .support import pairs_of, row_arguments

ABSENT = tl.constexpr(-1)  # an id that is none
SUM_LANES = 128  # of the sum of an id's dz
STRIDES = ("hidden_stride", "weight_stride", "x_stride", "parts_stride", "out_stride")
SIZES = ("n_pairs", "n_rows", "n_source", "width", "steps")
RUNTIME = unspecialised(
    ("mask",), ("stride",), ("ids", "index", "offsets", "grads"), (*STRIDES, *SIZES)
)


@triton.jit
def row_of(offsets_ptr, pair, n_rows, steps):
    """Row r of a pair, or of a vector of pairs: offsets[r] <= pair < offsets[r + 1]."""
    low = pair * 0
    high = low + n_rows
    for _ in range(steps):  # high - low > 1 needs ceil(log2(n_rows)) of them
        middle = (low + high) // 2
        below = tl.load(offsets_ptr + middle) <= pair
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def columns_of(column, width, LANES: tl.constexpr, ALIGN: tl.constexpr):
    """Columns [column, column + LANES), and True for those inside, for whole vectors of ALIGN.

    ALIGN divides the width: spelled so that the compiler sees it, a masked access is as wide as
    one without a mask.
    """
    lanes = tl.arange(0, LANES)
    return column + lanes, column + lanes // ALIGN * ALIGN < width


@triton.jit
def vectors(x_ptr, starts, columns, inside, reads):
    """fp32 columns of the vectors from `starts` on, (pairs, columns); 0 of those not read."""
    at = x_ptr + starts[:, None] + columns[None, :]
    return widened(tl.load(at, mask=reads[:, None] & inside[None, :], other=0.0))


@triton.jit(**RUNTIME)
def pair_logits_kernel(
    hidden_ptr,  # (rows, width)
    hidden_stride: tl.int64,
    weight_ptr,  # (source, width)
    weight_stride: tl.int64,
    ids_ptr,  # (pairs,) int32
    offsets_ptr,  # (rows + 1,) int64
    mask_ptr,  # (rows,) bytes
    mask_stride: tl.int64,
    out_ptr,  # (pairs,) fp32
    n_pairs: tl.int64,
    n_rows: tl.int64,
    n_source: tl.int64,
    width,
    steps,
    PAIRS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,  # every vector starts and ends at a multiple of this many elements
):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < n_pairs
    pair = tl.minimum(pair, n_pairs - 1)
    row = row_of(offsets_ptr, pair, n_rows, steps)
    live = inside & (tl.load(mask_ptr + row * mask_stride) != 0)
    if tl.max(live.to(tl.int32), axis=0) != 0:
        ids = tl.load(ids_ptr + pair, mask=live, other=ABSENT).to(tl.int64)
        reads = (ids >= 0) & (ids < n_source)
        x_starts = aligned(row * hidden_stride, ALIGN)
        w_starts = aligned(ids * weight_stride, ALIGN)
        total = tl.zeros([PAIRS, LANES], tl.float32)
        for column in tl.range(0, width, LANES):
            columns, within = columns_of(column, width, LANES, ALIGN)
            x = vectors(hidden_ptr, x_starts, columns, within, reads)
            w = vectors(weight_ptr, w_starts, columns, within, reads)
            total = tl.fma(x, w, total)
        missing = tl.where(ids == ABSENT, float("-inf"), float("nan"))
        tl.store(out_ptr + pair, tl.where(reads, pair_sum(total, LANES), missing), mask=live)


@triton.jit
def summed(
    grads_ptr,
    index_ptr,
    x_ptr,
    x_stride,
    first,
    last,
    n_source,
    columns,
    within,
    PAIRS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Columns of the sum of dz · vector over the pairs [first, last), fp32.

    A pair whose dz is 0 takes no part, whatever its vector holds, nor one without a vector: but
    its dz is NaN where its row is, and so is the sum.
    """
    total = tl.zeros([PAIRS, LANES], tl.float32)
    for pair in tl.range(first, last, PAIRS):
        pairs = pair + tl.arange(0, PAIRS)
        dz = tl.load(grads_ptr + pairs, mask=pairs < last, other=0.0)
        index = tl.load(index_ptr + pairs, mask=pairs < last, other=0).to(tl.int64)
        reads = (dz != 0.0) & (index >= 0) & (index < n_source)
        x = vectors(x_ptr, aligned(index * x_stride, ALIGN), columns, within, reads)
        total = tl.fma(tl.broadcast_to(dz[:, None], [PAIRS, LANES]), x, total)
    return pair_sum(tl.trans(total), PAIRS)


@triton.jit
def pairs_to_add(offsets_ptr, mask_ptr, mask_stride, row):
    """First pair of an output row and the number of those to add, none of a masked one."""
    start, count = pairs_of(offsets_ptr, row)
    if mask_ptr is None:
        return start, count
    else:
        live = tl.load(mask_ptr + row.to(tl.int64) * mask_stride) != 0
        return start, tl.where(live, count, 0)


@triton.jit(**RUNTIME)
def pair_parts_kernel(
    grads_ptr,  # (pairs,) fp32
    index_ptr,  # (pairs,): the vector of each
    offsets_ptr,  # (rows + 1,) int64
    mask_ptr,  # (rows,) bytes
    mask_stride: tl.int64,
    x_ptr,  # (source, width): the vectors
    x_stride: tl.int64,
    parts_ptr,  # (programs, width) fp32
    parts_stride: tl.int64,
    n_rows: tl.int64,
    n_source: tl.int64,
    width,
    steps,
    PAIRS: tl.constexpr,
    LANES: tl.constexpr,
    SEGMENT: tl.constexpr,
    ALIGN: tl.constexpr,  # every vector starts and ends at a multiple of this many elements
):
    # Part p is of the row that holds pair (p + 1) SEGMENT - 1, if of any. The rows' parts follow
    # one another and are no more than the programs, as floor(a + b) >= floor(a) + floor(b). Pairs
    # before the first row's are nobody's.
    part = tl.program_id(0).to(tl.int64)
    row = row_of(offsets_ptr, (part + 1) * SEGMENT - 1, n_rows, steps)
    start, count = pairs_to_add(offsets_ptr, mask_ptr, mask_stride, row)
    first = (part - start // SEGMENT + 1) * SEGMENT
    if (first > 0) & (first < count):
        last = start + tl.minimum(first + SEGMENT, count)
        to_ptr = parts_ptr + aligned(part * parts_stride, ALIGN)
        for column in tl.range(0, width, LANES):
            columns, within = columns_of(column, width, LANES, ALIGN)
            total = summed(
                *(grads_ptr, index_ptr, x_ptr, x_stride, start + first, last, n_source),
                *(columns, within, PAIRS, LANES, ALIGN),
            )
            tl.store(to_ptr + columns, total, mask=within)


@triton.jit(**RUNTIME)
def pair_sums_kernel(
    grads_ptr,  # (pairs,) fp32
    index_ptr,  # (pairs,): the vector of each
    offsets_ptr,  # (rows + 1,) int64
    mask_ptr,  # (rows,) bytes
    mask_stride: tl.int64,
    x_ptr,  # (source, width): the vectors
    x_stride: tl.int64,
    parts_ptr,  # (pairs // SEGMENT, width) fp32
    parts_stride: tl.int64,
    out_ptr,  # (rows, width)
    out_stride: tl.int64,
    sums_ptr,  # (rows,) fp32 sums of dz, or None
    n_source: tl.int64,
    width,
    PAIRS: tl.constexpr,
    LANES: tl.constexpr,
    SEGMENT: tl.constexpr,
    SUM_LANES: tl.constexpr,
    ALIGN: tl.constexpr,  # as above, of the output's too
):
    row = tl.program_id(0)
    start, count = pairs_to_add(offsets_ptr, mask_ptr, mask_stride, row)
    last = start + tl.minimum(count, SEGMENT)
    to_ptr = out_ptr + aligned(row.to(tl.int64) * out_stride, ALIGN)
    part = start // SEGMENT
    parts_end = part + tl.maximum(count - 1, 0) // SEGMENT
    for column in tl.range(0, width, LANES):
        columns, within = columns_of(column, width, LANES, ALIGN)
        total = tl.zeros([LANES], tl.float32)
        if count > 0:
            total = summed(
                *(grads_ptr, index_ptr, x_ptr, x_stride, start, last, n_source),
                *(columns, within, PAIRS, LANES, ALIGN),
            )
            for p in tl.range(part, parts_end):
                at = parts_ptr + aligned(p * parts_stride, ALIGN) + columns
                total += tl.load(at, mask=within, other=0.0)
        tl.store(to_ptr + columns, rounded(total, to_ptr.dtype.element_ty), mask=within)
    if sums_ptr is not None:
        sums = tl.zeros([SUM_LANES], tl.float32)
        for pair in tl.range(start, start + count, SUM_LANES):
            pairs = pair + tl.arange(0, SUM_LANES)
            sums += tl.load(grads_ptr + pairs, mask=pairs < start + count, other=0.0)
        tl.store(sums_ptr + row, pair_sum(sums, SUM_LANES))


class Addends(NamedTuple):
    """Pairs of output rows: the vector of each, where each row's begin, and its flag."""

    index: Tensor  # (pairs,)
    offsets: Tensor  # (rows + 1,) int64
    mask: Tensor | None  # (rows,) bytes


def steps_for(rows: int) -> int:
    """Steps of `row_of` among so many rows."""
    return (rows - 1).bit_length()


def _sums(grads: Tensor, pairs: Addends, x: Tensor, out: Tensor, sums: Tensor | None) -> None:
    """The launches. Fill `out` and `sums`, from the rows of `x`."""
    rows, width = out.shape
    source = x.shape[0]
    tile = config.pair_sum_tile(width)
    segment = config.PAIR_SEGMENT
    n_parts = grads.numel() // segment if width else 0
    parts = x.new_empty(n_parts, width, dtype=torch.float32)
    arguments = (grads, pairs.index, pairs.offsets, *row_arguments(pairs.mask, x, parts))
    align = min(alignment(y, y.stride(0), width) for y in (x, out))
    alike = {"SEGMENT": segment, "ALIGN": align, **tile.constants(), **LAUNCH}
    with on_device(x):
        if n_parts:
            pair_parts_kernel[(n_parts,)](
                *(*arguments, rows, source, width, steps_for(rows)),
                **alike,
            )
        pair_sums_kernel[(rows,)](
            *(*arguments, out, out.stride(0), sums, source, width),
            SUM_LANES=SUM_LANES,
            **alike,
        )


def sparse_logits(
    hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, mask: Tensor
) -> Tensor:
    """The op of ppo_fast/_boundary/schema.py: (M,) fp32."""
    out = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
    tile = config.PAIR_PRODUCTS
    pairs, (rows, width) = ids.numel(), hidden.shape
    if pairs and rows:
        with on_device(hidden):
            pair_logits_kernel[(triton.cdiv(pairs, tile.pairs),)](
                *(*row_arguments(hidden, weight), ids, offsets),
                *(*row_arguments(flag_bytes(mask)), out),
                *(pairs, rows, weight.shape[0], width, steps_for(rows)),
                ALIGN=min(alignment(x, x.stride(0), width) for x in (hidden, weight)),
                **tile.constants(),
                **LAUNCH,
            )
    return out


def sparse_hidden_grad(
    grad_logits: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, mask: Tensor
) -> Tensor:
    """The op of ppo_fast/_boundary/schema.py: (N, H) in the weight's dtype."""
    out = weight.new_empty(mask.shape[0], weight.shape[1])
    if out.numel():
        _sums(grad_logits, Addends(ids, offsets, flag_bytes(mask)), weight, out, None)
    return out


def sparse_weight_grad(
    grad_logits: Tensor, rows: Tensor, starts: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """The op of ppo_fast/_boundary/schema.py: (V, H) in the hidden states' dtype, (V,) fp32."""
    out = hidden.new_empty(starts.shape[0] - 1, hidden.shape[1])
    sums = torch.empty(out.shape[0], dtype=torch.float32, device=hidden.device)
    if sums.numel():
        _sums(grad_logits, Addends(rows, starts, None), hidden, out, sums)
    return out, sums
