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


def layout_axes(offsets: str | None, wide: bool) -> dict[str, Any]:
    """The constants of a tile, and the AOT types of packed sequences' offsets."""
    fails = None if offsets is None else "*i32:16"
    return {"cu_ptr": offsets, "fails_ptr": fails} | tile_axes(wide)


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


def pointers(kind: str, *names: str) -> dict[str, str]:
    """Their AOT types."""
    return {f"{name}_ptr": f"{kind}:16" for name in names}


def strides(*names: str) -> dict[str, str]:
    """Their AOT types."""
    return {f"{name}_{dim}": "i64" for name in names for dim in ("seq", "step")}


def lambda_axes() -> tuple[dict[str, Any], ...]:
    """A number, a tensor per sequence or one per step for each of the two λ; the same, or two."""
    kinds = (None, False, True)  # per step, where a tensor
    return tuple(
        {
            "lam_ptr": None if one is None else "*fp32",
            "lam_ret_ptr": None if two is None else "*fp32",
            "LAM_STEPS": bool(one), "LAM_RET_STEPS": bool(two), "TWO": apart,
        }
        for one in kinds for two in kinds for apart in (False, True) if apart or one is two
    )  # fmt: skip


# What the two kernels have in common.
AXES = pointers("*fp64", "parts", "moments") | pointers("*fp32", "adv", "ret") | {
    "counter_ptr": "*i32", "n_seqs": "i64", "length": "i64", "gamma": "fp32", "decay": "fp32",
    "MERGE": MERGE_BLOCK,
}  # fmt: skip
