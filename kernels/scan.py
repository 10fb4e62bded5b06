"""The backward recurrence A_t = a_t·A_{t+1} + b_t in chunks, shared by gae and rlhf_advantages.

A program holds a tile of ROWS chunks of CHUNK steps: one chunk of each of ROWS sequences, or
(WIDE) ROWS consecutive chunks of one sequence. Chunks are anchored at their sequence's start.
Inside a chunk the steps are scanned as affine maps x -> a·x + b, last step first (reversed
addresses: Triton's `reverse=True` is wrong for maps that do not commute). From chunk to chunk a
state is carried, one after the other. So a sequence's bits depend on CHUNK alone, not on ROWS,
WIDE, padding or packing.

Tensors stay one-dimensional and are reshaped to (ROWS, CHUNK) only for the scan. Given
two-dimensional tensors, each Triton version maps warps to dimensions in its own way, which would
change the bits. Strides do not specialise the kernels, and addresses fall from slot to slot, so
that no thread is given neighbouring steps, not even if they are known to be neighbours in memory.
The scan's layout along the chunk, and with it its tree, is therefore the same for every input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    INTERPRETED,
    LAUNCH,
    MAX_REGISTERS,
    MERGE_BLOCK,
    load_f32,
    load_flag,
    strided,
    unspecialised,
)

NO_STEP = tl.constexpr(2147483647)  # no later step is live


class ChunkTiling(NamedTuple):
    """Tiling of a scan over time: `rows` chunks of `chunk` steps a program."""

    rows: int
    chunk: int
    warps: int


# One tile for all shapes, as the scan's layout, and with it a sequence's bits, follow from it.
# 4 * 128 over 4 warps: each warp has 32 neighbouring steps of every chunk, each thread one step of
# each chunk. The interpreter scans one element after the other: smaller.
CHUNKS = ChunkTiling(2, 16, 1) if INTERPRETED else ChunkTiling(4, 128, 4)
OFFSETS_BLOCK, OFFSETS_WARPS = 1024, 4  # the check of packed sequences' offsets
# Arguments of gae and rlhf_advantages that are no tensors of steps, see `unspecialised`.
SHARED_POINTERS = ("boot", "cu", "counter")
SHARED_INTEGERS = ("boot_seq", "out_seq", "out_step", "n_seqs", "length")


def tile_constants(wide: bool) -> dict[str, Any]:
    """A tile's constants."""
    shape = {"WIDE": wide, "ROWS": CHUNKS.rows, "CHUNK": CHUNKS.chunk, "num_warps": CHUNKS.warps}
    return shape | MAX_REGISTERS


class Grid(NamedTuple):
    """Distribution of sequences over programs."""

    n_seqs: int
    length: int  # steps of a row, or N when packed
    programs: int
    wide: bool

    def constants(self) -> dict[str, Any]:
        """The launch's constants."""
        return LAUNCH | tile_constants(self.wide) | {"MERGE": MERGE_BLOCK}


def grid_of(main: Tensor, cu_seqlens: Tensor | None, time_major: bool = False) -> Grid:
    """Batch and length of (B, T), (T, B) or packed (N,), and the programs for them.

    A tile is one sequence's where sequences are longer than a tile on average.
    """
    if cu_seqlens is None:
        length, n_seqs = main.shape if time_major else main.shape[::-1]
        mean_length = length
    else:
        length, n_seqs = main.shape[0], cu_seqlens.numel() - 1
        mean_length = length / max(n_seqs, 1)
    wide = mean_length > CHUNKS.rows * CHUNKS.chunk
    programs = n_seqs if wide else triton.cdiv(n_seqs, CHUNKS.rows)
    return Grid(n_seqs, length, programs, wide)


def unit_steps(tensors: Iterable[Tensor | None], time_major: bool = False) -> bool:
    """True if neighbouring steps are neighbours in memory in each of the tensors given."""
    return all(strided(x, time_major)[2] == 1 for x in tensors if x is not None)


@triton.jit(**unspecialised(pointers=("cu",), integers=("n_seqs", "length")))
def offsets_kernel(
    cu_ptr,  # (S + 1,)
    fails_ptr,  # (1,) int32
    n_seqs: tl.int64,
    length: tl.int64,
    BLOCK: tl.constexpr,
):
    fails = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, n_seqs, BLOCK):
        seq = begin + tl.arange(0, BLOCK)
        inside = seq < n_seqs
        first = tl.load(cu_ptr + seq, mask=inside, other=0).to(tl.int64)
        end = tl.load(cu_ptr + seq + 1, mask=inside, other=0).to(tl.int64)
        fails |= (end < first).to(tl.int32) | ((seq == 0) & (first != 0)).to(tl.int32)
        fails |= ((seq == n_seqs - 1) & (end != length)).to(tl.int32)
    tl.store(fails_ptr, tl.max(fails, axis=0))


def check_offsets(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """(1,) int32 on the device, not 0 where the offsets do not rise from 0 to `length`."""
    if cu_seqlens is None:
        return None
    fails = torch.empty(1, dtype=torch.int32, device=cu_seqlens.device)
    constants = {"BLOCK": OFFSETS_BLOCK, "num_warps": OFFSETS_WARPS} | LAUNCH
    offsets_kernel[(1,)](cu_seqlens, fails, cu_seqlens.numel() - 1, length, **constants)
    return fails


class Span(NamedTuple):
    """The sequence that a tile (WIDE: scalars) or each of its slots is in."""

    seq: Any  # int64
    first: Any  # int64, the sequence's first slot in packed tensors
    n_steps: Any  # int32


@triton.jit
def tile_span(
    cu_ptr, fails, n_seqs, length, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr
):
    """The program's Span; where the offsets fail, each sequence has an even share to poison."""
    seq = tl.program_id(0).to(tl.int64)
    if not WIDE:
        seq = seq * ROWS + tl.arange(0, ROWS * CHUNK) // CHUNK
    inside = seq < n_seqs
    if cu_ptr is None:
        first = seq * 0
        n_steps = tl.where(inside, length, 0).to(tl.int32)
    else:  # length is N here
        first = tl.load(cu_ptr + seq, mask=inside, other=0).to(tl.int64)
        end = tl.load(cu_ptr + seq + 1, mask=inside, other=0).to(tl.int64)
        share = tl.minimum(seq, n_seqs) * length // n_seqs
        first = tl.where(fails, share, first)
        end = tl.where(fails, tl.minimum(seq + 1, n_seqs) * length // n_seqs, end)
        n_steps = (end - first).to(tl.int32)
    return Span(seq, first, n_steps)


@triton.jit
def poisoned(x, fails):
    """NaN where the offsets fail."""
    if fails is None:
        return x
    else:
        return tl.where(fails, float("nan"), x)


@triton.jit
def tile_count(n_steps, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """Number of tiles of the longest row."""
    width = CHUNK
    longest = n_steps
    if WIDE:
        width = ROWS * CHUNK
    else:
        longest = tl.max(n_steps, axis=0)
    return tl.cdiv(longest, width)


@triton.jit
def tile_steps(tile, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """Step of each of a tile's ROWS * CHUNK slots, later ones first."""
    slot = tl.arange(0, ROWS * CHUNK)
    if WIDE:
        step = (tile + 1) * (ROWS * CHUNK) - 1 - slot
    else:
        step = (tile + 1) * CHUNK - 1 - slot % CHUNK
    return step


@triton.jit
def step_stride(stride, UNIT: tl.constexpr):
    """The stride between steps. Where it is known, one address serves all slots of a thread."""
    if UNIT:
        return tl.full([], 1, tl.int64)
    else:
        return stride


@triton.jit
def step_offset(x, span, step):
    """int64 offsets of the steps in `x`."""
    return (span.seq * x.outer + span.first * x.inner) + step.to(tl.int64) * x.inner


@triton.jit
def load_step(x, span, step, live, default):
    """`load_f32` of the steps."""
    return load_f32(x.ptr, step_offset(x, span, step), live, default)


@triton.jit
def load_step_flag(x, span, step, inside):
    """`load_flag` of the steps."""
    return load_flag(x.ptr, step_offset(x, span, step), inside)


@triton.jit
def tile_flags(mask, span, tile, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """True for the tile's live steps; there are none in a tile before the first."""
    step = tile_steps(tile, ROWS, CHUNK, WIDE)
    return load_step_flag(mask, span, step, (step >= 0) & (step < span.n_steps))


@triton.jit
def _affine(cut1, a1, b1, cut2, a2, b2):
    # A cut map forgets its argument by selection: 0·NaN would not.
    return cut1 | cut2, a1 * a2, tl.where(cut2 != 0, b2, tl.fma(a2, b1, b2))


@triton.jit
def _affine_uncut(a1, b1, a2, b2):
    return a1 * a2, tl.fma(a2, b1, b2)


@triton.jit
def _smaller(x, y):
    return tl.minimum(x, y)


@triton.jit
def recur(cut, a, b, state, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """A of every slot of the tile, and the state behind it, (ROWS,). `cut` may be None."""
    a = tl.reshape(a, [ROWS, CHUNK])
    b = tl.reshape(b, [ROWS, CHUNK])
    if cut is not None:
        cut = tl.reshape(cut, [ROWS, CHUNK])
    if cut is None:
        a, b = tl.associative_scan((a, b), 1, _affine_uncut)
    else:
        cut, a, b = tl.associative_scan((cut, a, b), 1, _affine)
    # The maps of whole chunks, (ROWS,): as integers, which a warp sums in one instruction.
    last = tl.arange(0, CHUNK)[None, :] == CHUNK - 1
    ends = tl.join(a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True))
    ends = tl.sum(tl.where(last[:, :, None], ends, 0), axis=1)
    a_end, b_end = tl.split(ends)
    if cut is not None:
        cut_end = tl.sum(tl.where(last, cut, 0), axis=1)
    enters = state
    if WIDE:
        row = tl.arange(0, ROWS)
        for q in tl.static_range(ROWS):
            enters = tl.where(row == q, state, enters)
            row_a = tl.sum(tl.where(row == q, a_end, 0), axis=0).to(tl.float32, bitcast=True)
            row_b = tl.sum(tl.where(row == q, b_end, 0), axis=0).to(tl.float32, bitcast=True)
            after = tl.fma(state, row_a, row_b)
            if cut is not None:
                row_cut = tl.sum(tl.where(row == q, cut_end, 0), axis=0)
                after = tl.where(row_cut != 0, row_b, after)
            state = after
    else:
        a_end, b_end = a_end.to(tl.float32, bitcast=True), b_end.to(tl.float32, bitcast=True)
        after = tl.fma(state, a_end, b_end)
        if cut is not None:
            after = tl.where(cut_end != 0, b_end, after)
        state = after
    adv = tl.fma(a, enters[:, None], b)
    if cut is not None:
        adv = tl.where(cut != 0, b, adv)
    return tl.reshape(adv, [ROWS * CHUNK]), state


@triton.jit
def next_live(
    live_next,
    step,
    tile,
    state,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The first live step after each step (NO_STEP: none), and the state behind the tile, (ROWS,).

    `live_next`: step + 1 exists and is live. Minima of integers: exact in any order.
    """
    if WIDE:
        following = step + 1
        if tl.min(live_next.to(tl.int32), axis=0) != 0:  # no holes, as in most tiles
            state = tl.full([ROWS], 1, tl.int32) + tile * (ROWS * CHUNK)
        else:
            following, state = scan_live(live_next, step, state, ROWS, CHUNK, WIDE)
        return following, state
    else:
        return scan_live(live_next, step, state, ROWS, CHUNK, WIDE)


@triton.jit
def scan_live(live_next, step, state, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """`next_live` of a tile with holes."""
    found = tl.reshape(tl.where(live_next, step + 1, NO_STEP), [ROWS, CHUNK])
    end = tl.min(found, axis=1)
    found = tl.associative_scan(found, 1, _smaller)
    enters = state
    if WIDE:
        row = tl.arange(0, ROWS)
        for q in tl.static_range(ROWS):
            enters = tl.where(row == q, state, enters)
            row_end = tl.min(tl.where(row == q, end, NO_STEP), axis=0)
            state = tl.minimum(state, row_end)
    else:
        state = tl.minimum(state, end)
    return tl.reshape(tl.minimum(found, enters[:, None]), [ROWS * CHUNK]), state
