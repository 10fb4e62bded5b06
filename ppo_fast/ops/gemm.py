"""Matrix products of the head, with fp32-grade results for inputs of any precision.

`z` and its gradient are fp32 (fp64 for fp64 inputs); a gradient that a kernel has rounded has the
inputs' dtype. On CUDA the GEMM takes 16-bit operands and gives fp32; on a CPU, where such a GEMM
is slow or absent, operands become fp32 a piece at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows of a 16-bit weight that are fp32 at one time on a CPU.
_PIECE = 8192


def _direct(x: Tensor, wide: torch.dtype) -> bool:
    return x.dtype == wide


def _pieces(weight: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, weight.shape[0], _PIECE):
        piece = slice(start, start + _PIECE)
        yield piece, weight[piece].to(wide)


def logits_into(z: Tensor, x: Tensor, weight: Tensor) -> None:
    """z (R, V) = x (R, H) · weightᵀ."""
    if _direct(weight, z.dtype):
        torch.mm(x, weight.t(), out=z)
    elif x.is_cuda:
        torch.ops.aten.mm.dtype_out(x, weight.t(), z.dtype, out=z)
    else:
        x = x.to(z.dtype)
        for piece, w in _pieces(weight, z.dtype):
            torch.mm(x, w.t(), out=z[:, piece])


def hidden_gradient(dz: Tensor, weight: Tensor) -> Tensor:
    """dz (R, V) · weight, in the weight's dtype on CUDA and in dz's on a CPU."""
    if _direct(weight, dz.dtype) or dz.is_cuda:
        return dz.to(weight.dtype) @ weight
    out = dz.new_zeros(dz.shape[0], weight.shape[1])
    for piece, w in _pieces(weight, dz.dtype):
        out.addmm_(dz[:, piece], w)
    return out


def add_weight_gradient(total: Tensor, dz: Tensor, x: Tensor) -> None:
    """total (V, H) += dzᵀ · x; `total` is wide, so nothing is lost between chunks."""
    if _direct(x, total.dtype):
        torch.addmm(total, dz.t(), x, out=total)
    elif x.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, dz.to(x.dtype).t(), x, total.dtype, out=total)
    else:
        torch.addmm(total, dz.to(total.dtype).t(), x.to(total.dtype), out=total)
