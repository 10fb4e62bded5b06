"""The backward recurrence A_t = a_t·A_{t+1} + b_t in chunks, shared by gae and rlhf_advantages.

A program holds a tile of ROWS chunks of CHUNK steps: a chunk of each of ROWS sequences, or (WIDE)
ROWS consecutive chunks of one sequence. Chunks are anchored at their sequence's start. Inside one,
the steps are scanned as affine maps, last step first (reversed addresses: Triton's
`reverse=True` is wrong for maps that do not commute); from chunk to chunk a state is carried, one
after the other. So a sequence's bits depend on CHUNK alone, not on ROWS, WIDE, padding or packing.
Slots are one-dimensional, and rows of chunks only for the scan: with two
dimensions Triton chooses which of them a warp spans, in its own way in each version. No stride is
specialised, so that a thread never holds neighbouring steps. Then the scan's layout along the
chunk, and with it its tree, is the same for every input.
"""

import triton
import triton.language as tl
from torch import Tensor, empty, int32

from . import config
from .common import LAUNCH

NO_STEP = tl.constexpr(2147483647)  # no later step is live


# fmt: off
@triton.jit
def offsets_kernel(
    cu_ptr,  # (S + 1,)
    fails_ptr,  # (1,) int32
    n_seqs: tl.int64, length: tl.int64,
    BLOCK: tl.constexpr,
):
    # fmt: on
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
    fails = empty(1, dtype=int32, device=cu_seqlens.device)
    offsets_kernel[(1,)](
        cu_seqlens, fails, cu_seqlens.numel() - 1, length,
        BLOCK=config.TOKENS.block, num_warps=config.TOKENS.warps, **LAUNCH,
    )  # fmt: skip
    return fails


@triton.jit
def sequences(
    cu_ptr, fails, n_seqs, length, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Sequence (int64), first slot (int64) and number of steps (int32): of the whole tile where
    WIDE (scalars), else of each of its slots. Where the offsets fail, each sequence has an even
    share of the slots, to poison."""
    seq = tl.program_id(0).to(tl.int64)
    if not WIDE:
        seq = seq * ROWS + tl.arange(0, ROWS * CHUNK) // CHUNK
    inside = seq < n_seqs
    if cu_ptr is None:
        first = seq * 0
        steps = tl.where(inside, length, 0).to(tl.int32)
    else:  # length is N here
        first = tl.load(cu_ptr + seq, mask=inside, other=0).to(tl.int64)
        end = tl.load(cu_ptr + seq + 1, mask=inside, other=0).to(tl.int64)
        share = tl.minimum(seq, n_seqs) * length // n_seqs
        first = tl.where(fails, share, first)
        end = tl.where(fails, tl.minimum(seq + 1, n_seqs) * length // n_seqs, end)
        steps = (end - first).to(tl.int32)
    return seq, first, steps


@triton.jit
def poisoned(x, fails):
    """NaN where the offsets fail."""
    if fails is None:
        return x
    else:
        return tl.where(fails, float("nan"), x)


@triton.jit
def tile_count(steps, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """Tiles of the longest row."""
    span = CHUNK
    longest = steps
    if WIDE:
        span = ROWS * CHUNK
    else:
        longest = tl.max(steps, axis=0)
    return tl.cdiv(longest, span)


@triton.jit
def tile_steps(tile, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """Step of each of a tile's ROWS * CHUNK slots, later ones first."""
    slot = tl.arange(0, ROWS * CHUNK)
    if WIDE:
        t = (tile + 1) * (ROWS * CHUNK) - 1 - slot
    else:
        t = (tile + 1) * CHUNK - 1 - slot % CHUNK
    return t


@triton.jit
def at(seq, first, t, seq_stride, step_stride):
    """int64 offsets of the steps t."""
    return (seq * seq_stride + first * step_stride) + t.to(tl.int64) * step_stride


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
    row = tl.arange(0, ROWS)
    last = tl.arange(0, CHUNK)[None, :] == CHUNK - 1
    a_end = tl.sum(tl.where(last, a, 0.0), axis=1)
    b_end = tl.sum(tl.where(last, b, 0.0), axis=1)
    if cut is not None:
        cut_end = tl.sum(tl.where(last, cut, 0), axis=1)
    enters = state
    if WIDE:
        for q in tl.static_range(ROWS):
            enters = tl.where(row == q, state, enters)
            here_a = tl.sum(tl.where(row == q, a_end, 0.0), axis=0)
            here_b = tl.sum(tl.where(row == q, b_end, 0.0), axis=0)
            after = tl.fma(state, here_a, here_b)
            if cut is not None:
                here_cut = tl.sum(tl.where(row == q, cut_end, 0), axis=0)
                after = tl.where(here_cut != 0, here_b, after)
            state = after
    else:
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
    live_next, t, state, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The first live step after each t (NO_STEP: none), and the state behind the tile, (ROWS,).

    `live_next`: whether step t + 1 exists and is live. Minima of integers: exact in any order.
    """
    found = tl.reshape(tl.where(live_next, t + 1, NO_STEP), [ROWS, CHUNK])
    end = tl.min(found, axis=1)
    found = tl.associative_scan(found, 1, _smaller)
    enters = state
    if WIDE:
        row = tl.arange(0, ROWS)
        for q in tl.static_range(ROWS):
            enters = tl.where(row == q, state, enters)
            here = tl.min(tl.where(row == q, end, NO_STEP), axis=0)
            state = tl.minimum(state, here)
    else:
        state = tl.minimum(state, end)
    return tl.reshape(tl.minimum(found, enters[:, None]), [ROWS * CHUNK]), state


@triton.jit
def chan(n, mean, m2, n_new, mean_new, m2_new):
    """Merged (count, mean, M2): Chan, Golub and LeVeque 1979."""
    total = n + n_new
    share = n_new / tl.maximum(total, 1.0)
    delta = mean_new - mean
    return total, tl.fma(delta, share, mean), m2 + m2_new + delta * delta * n * share
