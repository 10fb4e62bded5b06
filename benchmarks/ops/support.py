"""Supports of the heads' cases: kept ids a row, their distribution, and a frozen weight.

A case of a support has a shape of `SHAPES`, whose name says what its dimensions do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ops.case import BOTH, DTYPES, Case, Shape
from benchmarks.ops.op import Cost
from ppo_fast import Support
from ppo_fast.testing import Call

_DIMS = (256, 49152, 576)  # a micro-batch's completions, and the head of SmolLM2-135M


class Kept(NamedTuple):
    """The ids that every row keeps: their number, their law, and whether the weight is trained."""

    ids: int
    uniform: bool = False
    frozen: bool = False


K20, K128, K512, K2048, K4096 = (f"support-{n}" for n in (20, 128, 512, 2048, 4096))
FROZEN, UNIFORM = "support-20-frozen", "support-20-uniform"
_KEPT = {
    K20: Kept(20),
    K128: Kept(128),
    K512: Kept(512),
    K2048: Kept(2048),  # below and above the share of the vocabulary from which on a CPU's head
    K4096: Kept(4096),  # multiplies all of it
    FROZEN: Kept(20, frozen=True),
    UNIFORM: Kept(20, uniform=True),
}
SHAPES = {name: Shape(name, _DIMS) for name in _KEPT}


def kept(case: Case) -> Kept | None:
    """A case's kept ids, scaled to the machine or not; None for one without a support."""
    return _KEPT.get(case.shape.name.partition("/")[0])


def is_frozen(case: Case) -> bool:
    """True where the weight gets no gradient."""
    found = kept(case)
    return found is not None and found.frozen


@functools.cache
def sampled(shape: Shape) -> tuple[Tensor, Tensor]:
    """Ids (N, K) int64, each once in a row, and the tokens (N,), of which every row keeps its own.

    They follow Zipf's law, a token's probability the inverse of its rank: rows share the frequent
    ones. A token's id says nothing about its rank, and its place none about which was drawn.
    """
    rows, vocab = shape.dims[:2]
    found = _KEPT[shape.name.partition("/")[0]]
    generator = torch.Generator().manual_seed(0)
    law = torch.ones(vocab) if found.uniform else 1 / torch.arange(1.0, vocab + 1)
    law = law[torch.randperm(vocab, generator=generator)]
    ids = torch.multinomial(law.expand(rows, vocab), found.ids, generator=generator)
    place = torch.randint(found.ids, (rows, 1), generator=generator)
    return ids, ids.gather(1, place).squeeze(1)


def inputs(case: Case, make: Callable[..., Call]) -> Call:
    """The call that `make` forms of the case's tokens and support."""
    ids, tokens = (x.to(case.device) for x in sampled(case.shape))
    return make(case, tokens=tokens, support=Support(ids))


def whole(case: Case, make: Callable[..., Call]) -> Call:
    """The call of the same tokens over the whole vocabulary."""
    return make(case, tokens=sampled(case.shape)[1].to(case.device))


def cost(case: Case) -> Cost:
    """Hidden states, and each kept row of the head once, ids and results; products and softmax.

    Backward: both gradients, all rows of the weight's, or that of the hidden states alone.
    """
    ids, _ = sampled(case.shape)
    rows, vocab, width = case.shape.dims
    wide, pairs, read = DTYPES[case.dtype].itemsize, ids.numel(), ids.unique().numel()
    moved, products, softmax = (rows + read) * width * wide + 4 * pairs + rows * 32, 1, 5
    if case.direction == BOTH:
        moved += (rows + (0 if is_frozen(case) else vocab)) * width * wide
        products, softmax = (2 if is_frozen(case) else 3), 13
    return Cost(moved, products * 2 * pairs * width + softmax * pairs)


def ids_of(call: Call) -> Tensor:
    """The call's ids as a peer takes them, (N, K) int64."""
    support: Any = call.options["support"]
    return support.ids.long().view(support.n_rows, -1)
