"""Live sequences of a loss, counted from its tiles: more counts than one step of the merge."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from conftest import usable

from ppo_fast.kernels.common import LAUNCH
from ppo_fast.kernels.loss_tiles import COUNTS_STEP, Counts, live_sequences

STEP = COUNTS_STEP.value
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def counting_kernel(counts_ptr, n, n_pieces, out_ptr, PER_SEQUENCE: tl.constexpr):
    tl.store(out_ptr, live_sequences(Counts(counts_ptr, n, n_pieces), PER_SEQUENCE))


def counted(counts: torch.Tensor, n_pieces: int, per_sequence: bool) -> float:
    usable("triton")
    out = torch.zeros(1, dtype=torch.float64, device=counts.device)
    flat = counts.flatten().int()
    args = (flat, flat.numel(), n_pieces, out)
    counting_kernel[(1,)](*args, PER_SEQUENCE=per_sequence, num_warps=8, **LAUNCH)
    return float(out)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("rows, pieces", [(3, 2), (1, 3000), (700, 3), (40, 64), (2, STEP)])
def test_rows_of_several_tiles(rows: int, pieces: int, density: float) -> None:
    """Also rows that begin in one step of the merge and end in the next."""
    torch.manual_seed(rows * pieces)
    live = torch.rand(rows, pieces, device=DEVICE) < density
    for position in (0, -1):  # a row that its first or its last tile alone keeps alive
        live[rows // 2] = False
        live[rows // 2, position] = True
        assert counted(live, pieces, False) == int(live.any(1).sum())


@pytest.mark.parametrize("n", [1, STEP, 2 * STEP + 5])
def test_tiles_of_several_rows(n: int) -> None:
    counts = torch.arange(n, device=DEVICE) % 5
    assert counted(counts, 1, False) == int(counts.sum())
    assert counted(counts, 1, True) == int((counts > 0).sum())
