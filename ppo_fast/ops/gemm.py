"""Matrix products of the head, with fp32-grade results for inputs of any precision.

`z` and its gradient are fp32 (fp64 for fp64 inputs); a gradient that a kernel has rounded has the
inputs' dtype. On CUDA the GEMM takes 16-bit operands and gives fp32. So does a kernel of ours for
bf16 on a CPU with its dot products, where dz is the sum of two bf16 numbers. On other CPUs such a
GEMM is slow or absent: operands become fp32 a piece at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ppo_fast import _backend
from ppo_fast._boundary import calls

# Rows of a 16-bit weight that are fp32 at one time on a CPU.
_PIECE = 8192
# Rows that are rounded through memory of their own.
_FIRST = 64


def _direct(x: Tensor, wide: torch.dtype) -> bool:
    return x.dtype == wide


def _dots(x: Tensor) -> bool:
    """True for an operand of a CPU that has products of bf16 with fp32 sums."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and _backend.bf16_dot()


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
    elif _dots(weight):
        calls.bf16_product_(x, weight.t(), z, add=False)
    else:
        x = x.to(z.dtype)
        for piece, w in _pieces(weight, z.dtype):
            torch.mm(x, w.t(), out=z[:, piece])


def add_logits(z: Tensor, x: Tensor, weight: Tensor) -> None:
    """z (R, V) += x (R, r) · weightᵀ, of a further product."""
    if _direct(weight, z.dtype):
        torch.addmm(z, x, weight.t(), out=z)
    elif x.is_cuda:
        torch.ops.aten.addmm.dtype_out(z, x, weight.t(), z.dtype, out=z)
    elif _dots(weight):
        calls.bf16_product_(x, weight.t(), z, add=True)
    else:
        x = x.to(z.dtype)
        for piece, w in _pieces(weight, z.dtype):
            z[:, piece].addmm_(x, w.t())


def narrowed(z: Tensor, dtype: torch.dtype) -> Tensor:
    """z (R, V) fp32 rounded to a 16-bit dtype over its own memory, contiguous from its start.

    Rows [a, 2a) become the bytes of rows [a/2, a), which have been read by then: no copy overlaps
    what it reads, and only the first rows take memory of their own.
    """
    count, vocab = z.shape
    out = z.view(dtype).view(-1)[: count * vocab].view(count, vocab)
    done = min(count, _FIRST)
    out[:done] = z[:done].to(dtype)
    while done < count:
        rows = slice(done, min(count, 2 * done))
        out[rows] = z[rows]
        done = rows.stop
    return out


def hidden_gradient(dz: Tensor, weight: Tensor) -> Tensor:
    """dz (R, V) · weight, in dz's dtype, which on CUDA is the weight's."""
    if _direct(weight, dz.dtype):
        return dz @ weight
    if _dots(weight):
        out = dz.new_empty(dz.shape[0], weight.shape[1])
        calls.bf16_product_(dz, weight, out, add=False)
        return out
    out = dz.new_zeros(dz.shape[0], weight.shape[1])
    for piece, w in _pieces(weight, dz.dtype):
        out.addmm_(dz[:, piece], w)
    return out


def add_weight_gradient(total: Tensor, dz: Tensor, x: Tensor, beta: int) -> None:
    """total (V, H) = beta·total + dzᵀ · x; wide, so that nothing is lost between blocks."""
    if _direct(x, total.dtype):
        torch.addmm(total, dz.t(), x, beta=beta, out=total)
    elif x.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, dz.t(), x, total.dtype, beta=beta, out=total)
    elif _dots(x):
        calls.bf16_product_(dz.t(), x, total, add=beta == 1)
    else:
        dz, x = dz.to(total.dtype), x.to(total.dtype)
        torch.addmm(total, dz.t(), x, beta=beta, out=total)
