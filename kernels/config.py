"""Launch choices as data: pure Python, no autotuning.

What fixes the order of a row's arithmetic (lanes, unroll, segment) is a function of V alone, so
that a row's bits do not depend on how many rows there are. The figures were chosen by counting
bytes in flight and instructions per element for an H200; they are not tuned on one yet.
"""

from __future__ import annotations

import os
from typing import NamedTuple

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Tile(NamedTuple):
    """BLOCK elements a program (or a step of it), and its warps."""

    block: int
    warps: int


class Rows(NamedTuple):
    """How a row of logits is taken: a program has one segment, in steps of unroll * lanes."""

    lanes: int  # in the forward, running (max, sum, sum) accumulators
    unroll: int  # elements a lane takes per step; in the forward, per rescaling
    segment: int  # a multiple of the step
    warps: int
    stages: int  # steps in flight through shared memory; 1: none


class Chunks(NamedTuple):
    """How a scan over time is tiled: rows chunks of `chunk` steps a program."""

    rows: int
    chunk: int
    warps: int


# Elements per program of the elementwise and reducing passes over token-sized tensors.
TOKENS = Tile(block=1024, warps=4)
# Rows per program of the kernels that form per-row scalars.
ROW_SCALARS = Tile(block=32, warps=1)
# 8 lanes a thread are one 16-byte load of bf16.
WIDE = Rows(lanes=1024, unroll=8, segment=32768, warps=4, stages=1)
NARROW = Rows(lanes=128, unroll=4, segment=2048, warps=1, stages=1)
WIDE_GRAD = Rows(lanes=1024, unroll=4, segment=32768, warps=4, stages=1)
NARROW_GRAD = Rows(lanes=128, unroll=4, segment=2048, warps=1, stages=1)


def scan(vocab: int) -> Rows:
    """How `logprobs_fwd` reads a row of `vocab` logits."""
    return NARROW if vocab <= NARROW.segment else WIDE


def grad(vocab: int) -> Rows:
    """How `logprobs_bwd` reads and writes it."""
    return NARROW_GRAD if vocab <= NARROW_GRAD.segment else WIDE_GRAD


# gae and rlhf_advantages: one tile for all shapes, as the scan's layout, and with it a sequence's
# bits, follow from it. 4 * 128 over 4 warps: each warp has 32 neighbouring steps of every chunk,
# each thread one step of each chunk. The interpreter scans one element after the other: smaller.
CHUNKS = Chunks(rows=2, chunk=16, warps=1) if INTERPRETED else Chunks(rows=4, chunk=128, warps=4)


def chunks_wide(steps: float) -> bool:
    """Whether a tile is one sequence's, for sequences of `steps` on average."""
    return steps > CHUNKS.rows * CHUNKS.chunk


class TokenTile(NamedTuple):
    """A tile of the per-token losses: rows * cols tokens of whole or partial rows."""

    rows: int
    cols: int
    warps: int


# The last program merges one partial result per program, so there are never many.
LOSS_PROGRAMS = 512


def token_tile(cols: int) -> TokenTile:
    """The tile for rows of `cols` tokens; several columns of tiles only with one row each."""
    if cols <= 16:
        return TokenTile(32, 16, 8)
    return TokenTile(4, 128, 8) if cols <= 128 else TokenTile(1, 512, 8)
