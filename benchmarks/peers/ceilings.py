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


def read(*tensors: Tensor) -> list[Tensor]:
    """One read of each."""
    return [x.sum() for x in tensors]


def gemms(call: Call) -> Any:
    """The three products of a head's step, in chunks of the height that is fastest here."""
    hidden, weight = call.tensors["hidden"], call.tensors["weight"]
    rows, vocab = hidden.shape[0], weight.shape[0]
    dx, dw = torch.empty_like(hidden), torch.zeros_like(weight)

    def step(height: int, z: Tensor) -> list[Tensor]:
        for start in range(0, rows, height):
            x = hidden[start : start + height]
            part = z[: len(x)]
            torch.mm(x, weight.t(), out=part)
            torch.mm(part, weight, out=dx[start : start + height])
            torch.addmm(dw, part.t(), x, beta=float(start > 0), out=dw)
        return [dx, dw]

    def chunk(height: int) -> Any:
        z = torch.empty(height, vocab, dtype=hidden.dtype, device=hidden.device)
        return lambda: step(height, z)

    return [chunk(height) for height in sorted({min(rows, h) for h in (512, 1024, 2048)})]


def product(hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """The forward's one product."""
    return [F.linear(hidden, weight)]
