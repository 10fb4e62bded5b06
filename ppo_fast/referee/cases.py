"""Batches of the referee, by name and seed: random ones and nasty ones.

All numbers are fp32's, held in fp64, so that a trainer in fp32 and a formula in fp64 start from
the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Ranks, their micro-batches, the rows of each.
Cut = tuple[tuple[tuple[int, ...], ...], ...]


class Edges(NamedTuple):
    """Ratios at which a loss changes its branch."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None


@dataclass(frozen=True)
class Tokens:
    """Tokens of an optimiser step, `(B, T)`: rows are sequences, `mask` their own tokens."""

    mask: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    entropies: Tensor
    values: Tensor
    old_values: Tensor
    returns: Tensor
    rewards: Tensor
    cut: Cut

    def rows(self, rows: tuple[int, ...]) -> Tokens:
        """One micro-batch, all of these rows."""
        fields = {k: v[list(rows)] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Tokens(**fields, cut=((tuple(range(len(rows))),),))

    def to(self, dtype: torch.dtype) -> Tokens:
        """The numbers in another precision."""
        fields = {k: v.to(dtype) for k, v in vars(self).items() if k not in ("mask", "cut")}
        return replace(self, **fields)


class Logits(NamedTuple):
    """Rows of logits `(N, V)`, a label each, and the temperature that divides them."""

    logits: Tensor
    labels: Tensor
    temperature: float


class Steps(NamedTuple):
    """Steps of environments `(T, B)`; `last_values` `(B,)` follow the last step.

    `next_values` is the value of the state that a step leads to, before a reset.
    """

    rewards: Tensor
    values: Tensor
    next_values: Tensor
    last_values: Tensor
    terminated: Tensor
    truncated: Tensor


class Groups(NamedTuple):
    """Scores `(N,)` of completions, and the prompt of each."""

    scores: Tensor
    groups: Tensor


TOKENS = {
    "random": "lengths of 4 to 12",
    "long-tail": "one sequence of 64 tokens among sequences of 1 to 3",
    "tool-tokens": "masked tokens in the middle of a sequence",
    "empty-row": "a sequence without a token",
    "nan-masked": "NaN in masked slots of every input but the model's own outputs",
    "clip-edges": "ratios at, just within and just beyond every bound, both signs of advantage",
    "huge-log-ratios": "log-ratios of ±21 to ±30, a sequence's of one sign, either advantage",
    "zero-advantages": "advantages of 0",
    "one-token": "a batch of a single token",
    "micro-batches": "two micro-batches, of 3 and of 61 tokens",
    "uneven-rows": "two micro-batches, of one and of three sequences",
    "two-ranks": "two ranks, of 5 and of 21 tokens, averaged as DDP does",
    "uneven-ranks": "two ranks, of one and of three sequences",
    "ranks-and-micro-batches": "two ranks of two micro-batches each",
}
LOGITS = {
    "random": "a vocabulary of 50",
    "large-logits": "logits of ±60",
    "equal-logits": "a flat distribution",
    "removed-tokens": "logits of −inf, as top-k and top-p leave them",
}
STEPS = {
    "no-ends": "no episode ends",
    "terminated": "episodes that end in the middle",
    "truncated": "episodes that a time limit ends, with a value to bootstrap from",
    "ends-at-the-last-step": "an episode that ends with the rollout",
}
GROUPS = {
    "random": "six prompts of four",
    "equal-scores": "a prompt whose completions have equal scores",
    "binary": "scores of 0 and 1",
    "large-scores": "scores around 1000",
}
_LENGTHS: dict[str, tuple[int, ...]] = {
    "random": (12, 7, 4, 12, 9, 5),
    "long-tail": (64, 1, 2, 3, 1, 2),
    "empty-row": (12, 5, 0, 12, 1, 8),
    "one-token": (1,),
    "micro-batches": (1, 2, 30, 31),
    "uneven-rows": (12, 3, 2, 7),
    "two-ranks": (1, 4, 9, 12),
    "uneven-ranks": (12, 3, 2, 7),
    "ranks-and-micro-batches": (1, 4, 9, 12, 2, 2, 11, 5),
}
_CUTS: dict[str, Cut] = {
    "micro-batches": (((0, 1), (2, 3)),),
    "uneven-rows": (((0,), (1, 2, 3)),),
    "two-ranks": (((0, 1),), ((2, 3),)),
    "uneven-ranks": (((0,),), ((1, 2, 3),)),
    "ranks-and-micro-batches": (((0, 1), (2, 3)), ((4, 5), (6, 7))),
}


def _normal(g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=g)).double()


def _generator(name: str, seed: int) -> torch.Generator:
    # A seed of its own for each name, whatever other cases are chosen.
    return torch.Generator().manual_seed(seed * 1009 + sum(name.encode()))


def tokens(name: str, seed: int, edges: Edges, per_sequence: bool) -> Tokens:
    """The batch of a name in TOKENS; `per_sequence`: a sequence has one advantage."""
    g = _generator(name, seed)
    lengths = torch.tensor(_LENGTHS.get(name, _LENGTHS["random"]))
    rows, width = len(lengths), int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    if name == "tool-tokens":
        mask[0, 3:6], mask[3, 5:7], mask[4, 0] = False, False, False
    logprobs = (-_normal(g, rows, width).abs() - 0.1).float().double()
    batch = Tokens(
        mask=mask,
        logprobs=logprobs,
        old_logprobs=_apart(name, g, logprobs, 0.3),
        ref_logprobs=_apart(name, g, logprobs, 0.5),
        advantages=_normal(g, rows, 1).expand(-1, width).clone()
        if per_sequence
        else _normal(g, rows, width),
        entropies=_normal(g, rows, width).abs(),
        values=_normal(g, rows, width),
        old_values=_normal(g, rows, width),
        returns=_normal(g, rows, width),
        rewards=_normal(g, rows, width),
        cut=_CUTS.get(name, ((tuple(range(rows)),),)),
    )
    return _nasty(name, batch, edges, per_sequence).to(torch.float32).to(torch.float64)


def _apart(name: str, g: torch.Generator, logprobs: Tensor, scale: float) -> Tensor:
    """Log-probabilities of another policy."""
    gap = _normal(g, *logprobs.shape, scale=scale)
    if name == "huge-log-ratios":
        sizes = 21 + 9 * torch.rand(gap.shape, generator=g).double()
        gap = torch.where(torch.arange(len(gap)) % 2 == 0, 1.0, -1.0)[:, None] * sizes
    return logprobs - gap


_INPUTS = ("old_logprobs", "ref_logprobs", "entropies", "old_values", "returns", "rewards")


def _nasty(name: str, batch: Tokens, edges: Edges, per_sequence: bool) -> Tokens:
    if name == "zero-advantages":
        return replace(batch, advantages=torch.zeros_like(batch.advantages))
    if name == "huge-log-ratios":
        signs = torch.where(torch.arange(len(batch.mask)) % 4 < 2, 1.0, -1.0)[:, None]
        return replace(batch, advantages=batch.advantages.abs() * signs)
    if name == "clip-edges":
        return _at_the_edges(batch, edges, per_sequence)
    if name == "nan-masked":
        names = _INPUTS if per_sequence else (*_INPUTS, "advantages")
        fields = {k: getattr(batch, k).masked_fill(~batch.mask, math.nan) for k in names}
        return replace(batch, **fields)
    return batch


def _at_the_edges(batch: Tokens, edges: Edges, per_sequence: bool) -> Tokens:
    """Ratios at, within and beyond the bounds in turn, beside advantages of either sign."""
    low, high = max(1 - edges.low, 0.01), 1 + edges.high
    bounds = [low, high, 1.0] if edges.dual is None else [low, high, edges.dual]
    ratios = torch.tensor([b * f for b in bounds for f in (1.0, 0.999, 1.001)]).double()
    index = torch.arange(batch.mask.numel()).reshape(batch.mask.shape)
    old = batch.logprobs - ratios[index % len(ratios)].log()
    turn = torch.arange(len(index))[:, None] if per_sequence else index
    signs = torch.where(turn % 2 == 0, 1.0, -1.0)
    return replace(batch, old_logprobs=old, advantages=batch.advantages.abs() * signs)


def logits(name: str, seed: int, temperature: float) -> Logits:
    """The rows of a name in LOGITS."""
    g = _generator(name, seed)
    x = _normal(g, 9, 50)
    labels = torch.randint(0, 40, (9,), generator=g)
    if name == "large-logits":
        x = (x.sign() * 60 + x).float().double()
    elif name == "equal-logits":
        x = torch.zeros_like(x)
    elif name == "removed-tokens":
        x[:, 40:] = -math.inf
    return Logits(x, labels, temperature)


def steps(name: str, seed: int) -> Steps:
    """The environments' steps of a name in STEPS."""
    g = _generator(name, seed)
    length, envs = 16, 3
    rewards, values = _normal(g, length, envs), _normal(g, length, envs)
    last = _normal(g, envs)
    ends = torch.zeros(length, envs, dtype=torch.bool)
    if name in ("terminated", "truncated"):
        ends[4, 0], ends[9, 0], ends[7, 1], ends[0, 2] = True, True, True, True
    elif name == "ends-at-the-last-step":
        ends[-1, 0], ends[5, 1] = True, True
    after = torch.cat([values[1:], last[None]])
    after = torch.where(ends, _normal(g, length, envs), after)  # of the state before a reset
    none = torch.zeros_like(ends)
    cut = (none, ends) if name == "truncated" else (ends, none)
    return Steps(rewards, values, after, last, *cut)


def groups(name: str, seed: int) -> Groups:
    """The scores of a name in GROUPS."""
    g = _generator(name, seed)
    scores = _normal(g, 24)
    if name == "equal-scores":
        scores[4:8] = 0.5
    elif name == "binary":
        scores = (scores > 0).double()
        scores[:4] = torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    elif name == "large-scores":
        scores = (scores + 1000).float().double()
    return Groups(scores, torch.arange(6).repeat_interleave(4))


NAMES: dict[str, dict[str, str]] = {
    "tokens": TOKENS,
    "logits": LOGITS,
    "steps": STEPS,
    "groups": GROUPS,
}


def make(kind: str, name: str, seed: int, **options: Any) -> Any:
    """The batch of one of the four kinds in NAMES."""
    makers: dict[str, Any] = {
        "tokens": tokens,
        "logits": logits,
        "steps": steps,
        "groups": groups,
    }
    return makers[kind](name, seed, **options)
