"""Row geometry, flags, exact helpers and moments: what every kernel file shares."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MERGE_BLOCK = 1024  # partial moments a step of the merge
# Every launch passes **LAUNCH. Contraction is written out (tl.fma) where it is wanted: the default
# differs between Triton versions, and with it the bits would.
LAUNCH = {"enable_fp_fusion": False}
# For kernels with many operands: all the registers that a thread may have. Left alone, ptxas stops
# at an occupancy of its own choosing and spills the rest. AMD's compiler has no such option.
ROOMY = {} if torch.version.hip else {"maxnreg": 255}


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on x's device; Triton takes that device's current stream."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def flag_bytes(flags: Tensor | None) -> Tensor | None:
    """bool, uint8 and int8 flags as one type, uncopied: one specialisation instead of three."""
    return None if flags is None else flags.view(torch.uint8)


class RowBlock(NamedTuple):
    """Rows r in [0, outer * inner) of a view: row r is (r // inner, r % inner).

    `args` holds (base, outer stride, inner stride) per tensor, flattened; (None, 0, 0) for None.
    `start` is the first row's flat index, for contiguous outputs.
    """

    start: int
    outer: int
    inner: int
    args: tuple[Any, ...]


def row_blocks(lead: tuple[int, ...], *tensors: Tensor | None) -> Iterator[RowBlock]:
    """Blocks of rows with two strides per tensor that together cover the leading shape `lead`.

    Each tensor's first dimensions are `lead`, of any strides. Dimensions are merged where every
    tensor allows it: one block, unless more than two dimensions remain.
    """
    dims: list[tuple[int, list[int]]] = []
    for i, size in enumerate(lead):
        strides = [0 if t is None else t.stride(i) for t in tensors]
        if size == 1:
            continue
        if dims and all(a == b * size for a, b in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        else:
            dims.append((size, strides))
    while len(dims) < 2:
        dims.insert(0, (1, [0] * len(tensors)))
    (outer, outer_strides), (inner, inner_strides) = dims[-2:]
    for k, index in enumerate(itertools.product(*(range(size) for size, _ in dims[:-2]))):
        args: list[Any] = []
        for j, t in enumerate(tensors):
            if t is not None and index:
                shift = sum(i * dims[d][1][j] for d, i in enumerate(index))
                t = t.as_strided((1,), (1,), t.storage_offset() + shift)
            args += (t, outer_strides[j], inner_strides[j])
        yield RowBlock(k * outer * inner, outer, inner, tuple(args))


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner):
    """int64 offset of a row (scalar or tensor) of a RowBlock."""
    outer = row // inner
    return outer.to(tl.int64) * stride_outer + (row - outer * inner).to(tl.int64) * stride_inner


@triton.jit
def load_flag(ptr, offsets, inside):
    """Whether the flag byte is set; `inside` where there are no flags, False outside."""
    if ptr is None:
        return inside
    else:
        return tl.load(ptr + offsets, mask=inside, other=0) != 0


@triton.jit
def load_f32(ptr, offsets, inside, default):
    """The value as fp32; `default` outside, and everywhere where the tensor is absent."""
    if ptr is None:
        return tl.where(inside, default, default).to(tl.float32)
    else:
        x = tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        return tl.where(inside, x, default)


@triton.jit
def expm1_minus(x):
    """exp(x) - 1 - x in fp32 to a few ulp, near 0 too (libdevice is not in the interpreter)."""
    p = 1.0 / 39916800.0
    p = p * x + 1.0 / 3628800.0
    p = p * x + 1.0 / 362880.0
    p = p * x + 1.0 / 40320.0
    p = p * x + 1.0 / 5040.0
    p = p * x + 1.0 / 720.0
    p = p * x + 1.0 / 120.0
    p = p * x + 1.0 / 24.0
    p = p * x + 1.0 / 6.0
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 0.75, p * x * x, tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """exp(x) - 1 in fp32 to a few ulp, near 0 too."""
    return tl.where(tl.abs(x) < 0.75, x + expm1_minus(x), tl.exp(x) - 1.0)


@triton.jit
def pair_sum(x, N: tl.constexpr):
    """Sum of a (..., N) tensor over its last dimension, neighbours first.

    Every step adds two numbers, so the bits do not depend on the layout the compiler chose, and
    with it on alignment or on the number of warps, as those of `tl.sum` do. N is a power of two.
    """
    if N > 1:
        halves = tl.sum(tl.reshape(x, x.shape[:-1] + [N // 2, 2]), axis=-1)
        return pair_sum(halves, N // 2)
    else:
        return tl.sum(x, axis=-1)


@triton.jit
def block_moments(x, live):
    """float64 (count, mean, M2) of the live elements of a block; x may hold anything elsewhere."""
    x = tl.where(live, x.to(tl.float64), 0.0)
    n = tl.sum(tl.ravel(live.to(tl.float64)))
    mean = tl.sum(tl.ravel(x)) / tl.maximum(n, 1.0)
    d = tl.where(live, x - mean, 0.0)
    return n, mean, tl.sum(tl.ravel(d * d))


@triton.jit
def merge_parts(parts_ptr, out_ptr, n_parts, BLOCK: tl.constexpr):
    """(3, n_parts) float64 counts, means, M2s -> (3,), by one program in a fixed order."""
    i = tl.arange(0, BLOCK)
    n = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n_parts, BLOCK):
        inside = start + i < n_parts
        count = tl.load(parts_ptr + start + i, mask=inside, other=0.0)
        n += count
        total += count * tl.load(parts_ptr + n_parts + start + i, mask=inside, other=0.0)
    n_all = tl.sum(n)
    mean = tl.sum(total) / tl.maximum(n_all, 1.0)
    m2 = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n_parts, BLOCK):
        inside = start + i < n_parts
        count = tl.load(parts_ptr + start + i, mask=inside, other=0.0)
        d = tl.load(parts_ptr + n_parts + start + i, mask=inside, other=0.0) - mean
        m2 += tl.load(parts_ptr + 2 * n_parts + start + i, mask=inside, other=0.0) + count * d * d
    tl.store(out_ptr, n_all)
    tl.store(out_ptr + 1, mean)
    tl.store(out_ptr + 2, tl.sum(m2))


@triton.jit(do_not_specialize=["n_parts"])
def merge_moments_kernel(parts_ptr, out_ptr, n_parts, BLOCK: tl.constexpr):
    merge_parts(parts_ptr, out_ptr, n_parts, BLOCK)


def merge_moments(parts: Tensor) -> Tensor:
    """(3, P) float64 block moments, rows count, mean, M2 -> (3,). Launch inside `on_device`."""
    out = parts.new_empty(3)
    merge_moments_kernel[(1,)](parts, out, parts.shape[1], BLOCK=MERGE_BLOCK, **LAUNCH)
    return out
