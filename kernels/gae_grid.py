"""How the backward recurrences are laid over programs, on the host's side."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor

from . import config
from .common import LAUNCH, MERGE_BLOCK, ROOMY


def steps_of(x: Tensor | None, time_major: bool = False) -> tuple[Tensor | None, int, int]:
    """(tensor, stride between sequences, stride between steps); flat tensors have no first one."""
    if x is None:
        return None, 0, 0
    if x.dim() == 1:
        return x, 0, x.stride(0)
    return (x, x.stride(1), x.stride(0)) if time_major else (x, x.stride(0), x.stride(1))


def tile_axes(wide: bool) -> dict[str, Any]:
    """The constants of a tile."""
    tile = config.CHUNKS
    shape = {"WIDE": wide, "ROWS": tile.rows, "CHUNK": tile.chunk, "num_warps": tile.warps}
    return shape | ROOMY


class Grid(NamedTuple):
    """How sequences are spread over programs."""

    n_seqs: int
    length: int  # steps of a row, or N when packed
    programs: int
    wide: bool

    def options(self) -> dict[str, Any]:
        """The launch's constants."""
        return LAUNCH | tile_axes(self.wide) | {"MERGE": MERGE_BLOCK}


def grid_of(main: Tensor, cu_seqlens: Tensor | None, time_major: bool = False) -> Grid:
    """Batch and length of (B, T), (T, B) or packed (N,), and the programs for them."""
    if cu_seqlens is None:
        length, n_seqs = main.shape if time_major else main.shape[::-1]
        wide = config.chunks_wide(length)
    else:
        length, n_seqs = main.shape[0], cu_seqlens.numel() - 1
        wide = config.chunks_wide(length / max(n_seqs, 1))
    programs = n_seqs if wide else triton.cdiv(n_seqs, config.CHUNKS.rows)
    return Grid(n_seqs, length, programs, wide)
