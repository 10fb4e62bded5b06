"""Foundation of the kernel files: launches, strided tensors, helpers, moments, last block."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Every launch passes **LAUNCH. Contraction is written out (tl.fma) where it is wanted: the default
# differs between Triton versions, and with it the bits would.
LAUNCH = {"enable_fp_fusion": False}
# For kernels with many operands: all the registers that a thread may have. Left alone, ptxas stops
# at an occupancy of its own choosing and spills the rest. AMD's compiler has no such option.
MAX_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}
MERGE_BLOCK = 1024  # partial moments per step of their merge
COUNTERS = 4096  # arrival counters per device: one per stream, and one per captured launch
# int32 between counters: pointers are specialised on 16-byte alignment, and a launch that finds no
# kernel for its counter would compile one, under capture too, where nothing can be loaded.
COUNTER_STEP = 4
# Counters of launches that merge each row by itself: one a row, for as many rows as this; the sets
# of a device.
ROW_COUNTERS, ROW_SETS = 1024, 256


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context that launches on x's device; Triton takes that device's current stream."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def flag_bytes(flags: Tensor | None) -> Tensor | None:
    """bool, uint8 and int8 flags as one type, uncopied: one specialisation instead of three."""
    return None if flags is None else flags.view(torch.uint8)


class Strided(NamedTuple):
    """A tensor inside a kernel: its pointer, None where it is absent, and two strides.

    Its dimensions are the (outer, inner) of a RowBlock, the (sequence, step) of the advantages or
    the (row, column) of a loss. Launchers pass the three as arguments of their own, because Triton
    would specialise the members of a tuple.
    """

    ptr: Any
    outer: Any
    inner: Any


def strided(x: Tensor | None, time_major: bool = False) -> tuple[Tensor | None, int, int]:
    """The arguments behind a `Strided` of two dimensions; a flat tensor is one row."""
    if x is None:
        return None, 0, 0
    if x.dim() == 1:
        return x, 0, x.stride(0)
    return (x, x.stride(1), x.stride(0)) if time_major else (x, x.stride(0), x.stride(1))


def unspecialised(
    tensors: tuple[str, ...] = (),
    dims: tuple[str, ...] = (),
    pointers: tuple[str, ...] = (),
    integers: tuple[str, ...] = (),
) -> dict[str, list[str]]:
    """Options of `triton.jit` under which no argument named here specialises the kernel.

    Triton compiles anew for an integer that is 1 or divisible by 16, annotated or not, and for an
    address divisible by 16. `tensors` have a stride for each of `dims`. Not listed: tensors fresh
    from the allocator, whose addresses are always divisible.
    """
    return {
        "do_not_specialize": [f"{x}_{dim}" for x in tensors for dim in dims] + list(integers),
        "do_not_specialize_on_alignment": [f"{x}_ptr" for x in (*tensors, *pointers)],
    }


class RowBlock(NamedTuple):
    """Rows r in [0, outer * inner) of a view: row r is (r // inner, r % inner).

    `args` holds the arguments behind each tensor's `Strided`, flattened; (None, 0, 0) for None.
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
def row_offset(x, row, inner):
    """int64 offset in `x` of a row (scalar or vector) of a RowBlock."""
    outer = row // inner
    return outer.to(tl.int64) * x.outer + (row - outer * inner).to(tl.int64) * x.inner


@triton.jit
def load_flag(ptr, offsets, inside):
    """True where the flag byte is set and `inside`; `inside` itself without flags."""
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
def coefficient(ptr, number):
    """A coefficient on the device; `number` where there is none."""
    if ptr is None:
        return number
    else:
        return tl.load(ptr).to(tl.float32)


@triton.jit
def clamp(x, low, high):
    """torch.clamp: a NaN passes, so that it shows."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


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
    """Sum of a (..., N) tensor over its last dimension, neighbours first; N is a power of two.

    Every step adds two numbers, so the bits do not depend on the layout the compiler chose, and
    with it on alignment or on the number of warps, as those of `tl.sum` do.
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


# Moments of a stream. Each lane sums x - pivot, where its pivot is its first live element: equal
# elements give exactly no deviation, and a large common mean costs no digits.
@triton.jit
def add_to_moments(n, pivot, total, squares, x, live):
    """Sums of the lanes with a block more: int32 counts, fp32 pivots, float64 sums."""
    pivot = tl.where(live & (n == 0), x, pivot)
    d = tl.where(live, x.to(tl.float64) - pivot.to(tl.float64), 0.0)
    return n + live.to(tl.int32), pivot, total + d, tl.fma(d, d, squares)


@triton.jit
def moments_of(n, pivot, total, squares):
    """float64 (count, mean, M2) of all lanes: Chan, Golub and LeVeque 1979."""
    n = n.to(tl.float64)
    shift = total / tl.maximum(n, 1.0)
    own = squares - total * shift
    lane_mean = pivot + shift
    n_all = tl.sum(n)
    mean = tl.sum(n * lane_mean) / tl.maximum(n_all, 1.0)
    d = lane_mean - mean
    return n_all, mean, tl.sum(tl.where(own < 0, 0.0, own) + n * d * d)


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


# Single-launch reduction (the "last block" pattern). Every program writes its partial results and
# counts itself. The last one to do so finds them all, merges them in index order, so that the
# result does not depend on which is last, and resets the counter. A counter belongs to one stream,
# whose launches run one after the other. A launch under CUDA graph capture takes a counter of its
# own, as graphs may be replayed on any stream.
class _Counters:
    """The zeroed counters of one device; they live as long as the process."""

    def __init__(self, device: torch.device) -> None:
        zeros = torch.zeros(COUNTERS * COUNTER_STEP, dtype=torch.int32, device=device)
        self.free = list(zeros.split(COUNTER_STEP))
        rows = torch.zeros(ROW_SETS * ROW_COUNTERS, dtype=torch.int32, device=device)
        self.free_rows = list(rows.split(ROW_COUNTERS))
        self.ready = torch.cuda.Event()
        self.ready.record()
        self.of_stream: dict[tuple[int, bool], Tensor] = {}


_LOCK = threading.Lock()
_DEVICES: dict[int, _Counters] = {}


def counter(like: Tensor) -> Tensor:
    """A zero int32 for one launch on `like`'s device and current stream. Call it `on_device`."""
    found = _found(like, False) if like.is_cuda else None
    return torch.zeros(1, dtype=torch.int32, device=like.device) if found is None else found


def row_counters(like: Tensor, rows: int) -> Tensor:
    """Zero int32, at least one a row, as `counter`; for many rows a memset is nothing."""
    found = _found(like, True) if like.is_cuda and rows <= ROW_COUNTERS else None
    return torch.zeros(rows, dtype=torch.int32, device=like.device) if found is None else found


def _found(like: Tensor, rows: bool) -> Tensor | None:
    """The stream's, or a captured launch's own. None where none is left, and in a capture before
    any call: a memset node more in the graph."""
    capturing = torch.cuda.is_current_stream_capturing()
    with _LOCK:
        counters = _DEVICES.get(like.device.index)
        if counters is None and not capturing:
            counters = _DEVICES[like.device.index] = _Counters(like.device)
        if counters is not None:
            stream = torch.cuda.current_stream()
            key = (stream.cuda_stream, rows)
            found = None if capturing else counters.of_stream.get(key)
            free = counters.free_rows if rows else counters.free
            if found is None and free:
                found = free.pop()
                if not capturing:
                    counters.of_stream[key] = found
                    stream.wait_event(counters.ready)
            return found
    return None


@triton.jit
def is_last(counter_ptr):
    """True in the last program to arrive here, to which all others' stores are visible."""
    return is_last_of(counter_ptr, tl.num_programs(0))


@triton.jit
def is_last_of(counter_ptr, arrivals):
    """The same of the `arrivals` programs that share a counter."""
    tl.debug_barrier()  # all threads' stores precede the count
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def reduce_moments(parts_ptr, out_ptr, counter_ptr, n, mean, m2, BLOCK: tl.constexpr):
    """Last-block reduction of the programs' float64 moments, (3, programs) in `parts`, to (3,)."""
    programs = tl.num_programs(0)
    part = parts_ptr + tl.program_id(0)
    tl.store(part, n)
    tl.store(part + programs, mean)
    tl.store(part + 2 * programs, m2)
    if is_last(counter_ptr):
        merge_parts(parts_ptr, out_ptr, programs, BLOCK)
