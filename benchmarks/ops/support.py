"""Supports of the heads' cases: kept ids a row, their distribution, and a frozen weight.

A case of a support has a shape of `SHAPES`, whose name says what its dimensions do not.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from benchmarks.ops.case import BOTH, DTYPES, Case, Shape
from benchmarks.ops.op import Cost
from benchmarks.ops.sizes import QWEN_R2
from ppo_fast import Support
from ppo_fast.testing import Call

_DIMS = (256, 49152, 576)  # a micro-batch's completions, and the head of SmolLM2-135M


class Kept(NamedTuple):
    """The ids that every row keeps: their number, their law, and whether the weight is trained."""

    ids: int
    uniform: bool = False
    frozen: bool = False


K20, K128, K512, K4096, K8192 = (f"support-{n}" for n in (20, 128, 512, 4096, 8192))
FROZEN, UNIFORM = "support-20-frozen", "support-20-uniform"
_KEPT = {
    K20: Kept(20),
    K128: Kept(128),
    K512: Kept(512),
    K4096: Kept(4096),  # below and above the share of the vocabulary from which on a CPU's head
    K8192: Kept(8192),  # multiplies all of it
    FROZEN: Kept(20, frozen=True),
    UNIFORM: Kept(20, uniform=True),
}
SHAPES = {name: Shape(name, _DIMS) for name in _KEPT}
# On a GPU, of R2's hidden states and head.
GPU_SHAPES = {n: Shape(f"{QWEN_R2.name}-support-{n}", QWEN_R2.dims) for n in (20, 128, 512)}
_KEPT |= {shape.name: Kept(n) for n, shape in GPU_SHAPES.items()}


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
    if shape.dims == QWEN_R2.dims:
        ids = _frequent(rows, vocab, found.ids, generator)
        return ids, ids[:, 0]
    law = torch.ones(vocab) if found.uniform else 1 / torch.arange(1.0, vocab + 1)
    law = law[torch.randperm(vocab, generator=generator)]
    ids = torch.multinomial(law.expand(rows, vocab), found.ids, generator=generator)
    place = torch.randint(found.ids, (rows, 1), generator=generator)
    return ids, ids.gather(1, place).squeeze(1)


def _frequent(rows: int, vocab: int, count: int, generator: torch.Generator) -> Tensor:
    """Ids by Zipf's law, each once in a row, without a weight for every id of every row.

    Ranks are drawn with replacement, and one that is taken is moved to the next that is not.
    """
    ranks = (vocab - count) ** torch.rand(rows, count, generator=generator, dtype=torch.float64)
    place = torch.arange(count)
    ranks = (ranks.long().sort(1).values - place).cummax(1).values + place
    ids = torch.randperm(vocab, generator=generator)[ranks]
    return ids[:, torch.randperm(count, generator=generator)]


def inputs(case: Case, make: Callable[..., Call]) -> Call:
    """The call that `make` forms of the case's tokens and support."""
    with unset_fake_temporarily():  # a trace has no values, and a support looks at its ids
        ids, tokens = (x.to(case.device) for x in sampled(case.shape))
        support = Support(ids)
    return make(case, tokens=tokens.clone(), support=support)


def moved(call: Call, there: Callable[[Tensor], Tensor]) -> Call:
    """The call with its support's tensors replaced; what the host knows of it stays."""
    if "support" not in call.options:
        return call
    support: Any = copy.copy(call.options["support"])
    for name in ("ids", "offsets", "whole_index"):
        setattr(support, name, there(getattr(support, name)))
    return call.option(support=support)


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
