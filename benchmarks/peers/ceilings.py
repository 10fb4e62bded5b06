"""Ceilings, the lower bounds of an op's time: its memory traffic, or the products of a head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_fast.testing import Call


def copy(*tensors: Tensor) -> list[Tensor]:
    """A fresh copy of each: what an op that reads its inputs and writes as much cannot beat."""
    return [x.clone() for x in tensors]


def copy_and_read(logits: Tensor, mask: Tensor, teacher_logits: Tensor) -> list[Tensor]:
    """A fresh copy of a student's logits, the size of their gradient, and a teacher's read."""
    return [logits.clone(), mask.sum(), teacher_logits.sum()]


def read(*tensors: Tensor) -> list[Tensor]:
    """One read of each."""
    return [x.sum() for x in tensors]


def gemms(call: Call) -> Any:
    """The products of a head's step, of both heads' where there is a teacher, in chunks of some
    heights: the fastest here is the ceiling."""
    hidden, weight = call.tensors["hidden"], call.tensors["weight"]
    others = [call.tensors[k] for k in ("teacher_hidden", "teacher_weight") if k in call.tensors]
    rows, vocab = hidden.shape[0], weight.shape[0]
    dx, dw = torch.empty_like(hidden), torch.zeros_like(weight)

    def step(height: int, z: Tensor, y: Tensor) -> list[Tensor]:
        for start in range(0, rows, height):
            chunk = slice(start, start + height)
            x, part = hidden[chunk], z[: min(height, rows - start)]
            torch.mm(x, weight.t(), out=part)
            if others:
                torch.mm(others[0][chunk], others[1].t(), out=y[: len(x)])
            torch.mm(part, weight, out=dx[chunk])
            torch.addmm(dw, part.t(), x, beta=float(start > 0), out=dw)
        return [dx, dw]

    def chunk(height: int) -> Any:
        z = torch.empty(height, vocab, dtype=hidden.dtype, device=hidden.device)
        y = torch.empty_like(z if others else z[:0])
        return lambda: step(height, z, y)

    return [chunk(height) for height in sorted({min(rows, h) for h in (512, 1024, 2048)})]


def product(hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """The forward's one product."""
    return [F.linear(hidden, weight)]


def products(
    hidden: Tensor, weight: Tensor, mask: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> list[Tensor]:
    """The two of a forward with a teacher, one after the other."""
    del mask
    return [F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight)]
