"""An adapter of low rank on the head, whose weight is frozen: LoRA with u = hidden·Aᵀ."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.case import BOTH, DTYPES, Case, Shape
from benchmarks.ops.op import Cost
from ppo_fast.testing import Call

RANK = 16
# A micro-batch's completions, and the head of SmolLM2-135M.
SHAPE = Shape(f"smollm2-head-lora-{RANK}", (256, 49152, 576))


def is_adapted(case: Case) -> bool:
    """True where a case's head has an adapter, scaled to the machine or not."""
    return case.shape.name.partition("/")[0] == SHAPE.name


def a_of(case: Case) -> Tensor:
    """A (r, H) of the case, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    width = case.shape.dims[2]
    a = torch.randn(RANK, width, generator=generator) / width**0.5
    return a.to(DTYPES[case.dtype]).to(case.device)


def inputs(case: Case, call: Call) -> Call:
    """The call with the adapter's u = hidden·Aᵀ, and b of a few steps of training."""
    b = 0.1 * torch.randn(case.shape.dims[1], RANK, device=case.device)
    hidden = call.tensors["hidden"]
    return call.replace(extra_u=hidden @ a_of(case).t(), extra_b=b.to(hidden.dtype))


def cost(case: Case) -> Cost:
    """The head's, of which the weight's gradient is not taken, with the same of u and b."""
    rows, vocab, width = case.shape.dims
    n, both = rows * vocab, case.direction == BOTH
    moved = (rows + vocab) * (width + RANK) * DTYPES[case.dtype].itemsize
    if both:
        moved += (rows * (width + RANK) + vocab * RANK) * DTYPES[case.dtype].itemsize
    products = 2 * width + 3 * RANK if both else width + RANK
    return Cost(moved + rows * 32, 2 * n * products + (13 if both else 5) * n)
