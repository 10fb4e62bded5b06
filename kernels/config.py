"""Launch choices of the row and token kernels as data: pure Python, no autotuning.

What fixes the order of a row's arithmetic (lanes, unroll, segment) is a function of V alone, so
that a row's bits do not depend on how many rows there are. The figures were chosen by counting
bytes in flight and instructions per element for an H200; they are not tuned on one yet. The tile
of the advantages is `scan.CHUNKS`.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """BLOCK elements per program (or per step of it), and its warps."""

    block: int
    warps: int


class RowTiling(NamedTuple):
    """Tiling of a row of logits: one segment a program, in steps of unroll * lanes."""

    lanes: int  # in the forward, running (max, sum, dot) accumulators
    unroll: int  # elements a lane takes per step; in the forward, per rescaling
    segment: int  # a multiple of the step
    warps: int
    stages: int  # steps in flight through shared memory; 1: none

    def constants(self) -> dict[str, int]:
        """The launch's constants."""
        return {
            "LANES": self.lanes,
            "UNROLL": self.unroll,
            "SEGMENT": self.segment,
            "num_warps": self.warps,
            "STAGES": self.stages,
        }


class TokenTile(NamedTuple):
    """Tile of the per-token losses: rows * cols tokens of whole or partial rows."""

    rows: int
    cols: int
    warps: int


class PairTile(NamedTuple):
    """Tile of pairs (row, id) and of the hidden size, of the sparse head."""

    pairs: int
    lanes: int
    warps: int

    def constants(self) -> dict[str, int]:
        """The launch's constants."""
        return {"PAIRS": self.pairs, "LANES": self.lanes, "num_warps": self.warps}


# Elements per program of the elementwise and reducing passes over token-sized tensors.
TOKENS = Tile(block=1024, warps=4)
# Elements per program of `scale` a turn, and its programs: 8 for each multiprocessor of an H200.
# Mostly they do nothing but load a factor of 1, so there are no more than run at a time.
SCALE = Tile(block=2048, warps=8)
SCALE_PROGRAMS = 1056
# Rows per program of the kernels that form per-row scalars.
ROW_SCALARS = Tile(block=32, warps=1)
# 8 lanes a thread are one 16-byte load of bf16.
WIDE = RowTiling(lanes=1024, unroll=8, segment=32768, warps=4, stages=1)
NARROW = RowTiling(lanes=128, unroll=4, segment=2048, warps=1, stages=1)
WIDE_GRAD = RowTiling(lanes=1024, unroll=4, segment=32768, warps=4, stages=1)
NARROW_GRAD = RowTiling(lanes=128, unroll=4, segment=2048, warps=1, stages=1)
# Two rows at a time, a student's and a teacher's.
WIDE_PAIR = RowTiling(lanes=1024, unroll=2, segment=32768, warps=4, stages=1)
NARROW_PAIR = RowTiling(lanes=128, unroll=4, segment=2048, warps=1, stages=1)
# Pairs whose products one program forms, two a warp. 256 lanes of bf16 are a load of 16 bytes a
# thread, of which there are four in flight: more would cost registers, and with them warps.
PAIR_PRODUCTS = PairTile(pairs=8, lanes=256, warps=4)
# Pairs that a program adds at a time, all of them in each thread: their sums need no barrier, and
# a row of one pair keeps every thread busy.
PAIR_SUMS = PairTile(pairs=4, lanes=1024, warps=4)
NARROW_PAIR_SUMS = PairTile(pairs=4, lanes=256, warps=1)
# Pairs of a row that one program adds: longer rows are shared by several.
PAIR_SEGMENT = 512
# Programs of a loss, a power of two: all resident at once, two on a multiprocessor of an H200's
# 132, and merged in one step by the last one.
LOSS_PROGRAMS = 256


def forward_tiling(vocab: int) -> RowTiling:
    """Tiling with which `logprobs_fwd` reads a row of `vocab` logits."""
    return NARROW if vocab <= NARROW.segment else WIDE


def gradient_tiling(vocab: int) -> RowTiling:
    """Tiling with which `logprobs_bwd` reads and writes such a row."""
    return NARROW_GRAD if vocab <= NARROW_GRAD.segment else WIDE_GRAD


def pair_tiling(vocab: int) -> RowTiling:
    """Tiling with which the ops of divergence.py read two such rows, and write one."""
    return NARROW_PAIR if vocab <= NARROW_PAIR.segment else WIDE_PAIR


def token_tile(cols: int) -> TokenTile:
    """Tile for rows of `cols` tokens; several columns of tiles only with one row each."""
    if cols <= 16:
        return TokenTile(64, 16, 8)
    if cols <= 128:
        return TokenTile(8, 128, 8)
    return TokenTile(2, 512, 8) if cols <= 512 else TokenTile(1, 1024, 8)


def pair_sum_tile(width: int) -> PairTile:
    """Tile with which rows of `width` are added."""
    return NARROW_PAIR_SUMS if width <= NARROW_PAIR_SUMS.lanes else PAIR_SUMS
