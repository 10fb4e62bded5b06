"""Truncated sampling (top-k, top-p, min-p): the tokens that are kept, and what is cut."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast import Support
from ppo_fast.loop.config import OptionError, TrainConfig
from ppo_fast.loop.data.sequences import Cut, support_of

# Most ids that are kept of a token: without a bound a flat distribution would hold the vocabulary.
LIMIT = 4096
_FIRST = 256  # logits that top-p looks at first: nearly always enough


class Truncation(NamedTuple):
    """Tokens that are drawn from: `top_k`, of these `top_p`, of these `min_p` (0, 1, 0 are off).

    The order is that of transformers' generation, after the temperature. What is kept is always
    all tokens with at least some logit, so that ties stay together: no sort's order matters.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> Truncation | None:
        """The truncation in a run's options; None where they cut nothing."""
        found = cls(config.top_k, config.top_p, config.min_p)
        return None if found == cls() else found

    def kept(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens kept, (B, V) bool, the mass cut, (B,) fp64, and rows at the limit, (B,) bool.

        `z` (B, V) are logits over the temperature. A row's result depends on nothing but the row.
        """
        probs = torch.softmax(z, dim=-1)
        total = _mass(probs)
        threshold = z.amax(-1) + (math.log(self.min_p) if self.min_p else -math.inf)
        mass = total
        if 0 < self.top_k < z.shape[1]:
            of_k = z.topk(self.top_k).values[:, -1]
            threshold = torch.maximum(threshold, of_k)
            mass = _mass(probs.masked_fill(z < of_k[:, None], 0)) if self.top_p < 1 else mass
        if self.top_p < 1:
            target = self.top_p * mass
            of_p, found = _reached(z, probs, target, _FIRST)
            more = (~found).nonzero().squeeze(1)
            if len(more):
                of_p[more], _ = _reached(z[more], probs[more], target[more], LIMIT)
            threshold = torch.maximum(threshold, of_p)
        kept = (z >= threshold[:, None]) & (z > -math.inf)
        limited = kept.sum(-1) > LIMIT
        over = limited.nonzero().squeeze(1)
        if len(over):
            kept[over] &= _likeliest(z[over])
        cut = 1 - _mass(probs.masked_fill(~kept, 0)) / total
        return kept, cut.clamp(min=0), limited


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """The logits over the temperature, in fp32, or fp64 where they are."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1 else wide / temperature  # the division costs a pass


def _mass(probs: Tensor) -> Tensor:
    """Sums of the rows, (B,) fp64, in an order that does not depend on the batch."""
    return probs.cumsum(-1, dtype=torch.float64)[:, -1]


def _reached(z: Tensor, probs: Tensor, target: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The logit at which the likeliest tokens' mass reaches `target`, (B,), and whether it does.

    At most `width` logits are looked at; it is -inf where they do not reach it.
    """
    top = z.topk(min(width, z.shape[1]))
    mass = probs.gather(1, top.indices).cumsum(1, dtype=torch.float64)
    before = (mass < target[:, None]).sum(1)
    found = before < mass.shape[1]
    last = top.values.gather(1, before.clamp(max=mass.shape[1] - 1)[:, None]).squeeze(1)
    return torch.where(found, last, -math.inf), found


def _likeliest(z: Tensor) -> Tensor:
    """The `LIMIT` largest of each row, (B, V) bool; of equal ones those of the lowest ids."""
    last = z.topk(LIMIT).values[:, -1:]
    above, ties = z > last, z == last
    return above | (ties & (ties.cumsum(1) <= LIMIT - above.sum(1, keepdim=True)))


class Kept:
    """Kept ids of the tokens of a `response`, (n, T) int64, taken down as they are drawn."""

    def __init__(self, truncation: Truncation, response: Tensor) -> None:
        self._truncation = truncation
        self._ids: list[Tensor] = []  # of each step, row after row
        self._counts = torch.zeros_like(response)
        self._mass = torch.zeros_like(response, dtype=torch.float64)
        self._limited = torch.zeros_like(response, dtype=torch.bool)

    def cut(
        self, logits: Tensor, temperature: float, t: int, going: Tensor, alive: Tensor
    ) -> Tensor:
        """The logits (B, V) of step `t`, -inf where they are cut.

        Of the rows that are `alive`, which are the rows `going` of the response, it is taken down.
        """
        kept, mass, limited = self._truncation.kept(scaled(logits, temperature))
        live = kept[alive]
        self._ids.append(live.nonzero()[:, 1].int())
        self._counts[going, t] = live.sum(1)
        self._mass[going, t], self._limited[going, t] = mass[alive], limited[alive]
        return logits.masked_fill(~kept, -math.inf)

    def support(self) -> tuple[Support, Cut]:
        """The support of the (n, T) slots up to the last step, row after row, and their cut."""
        n, steps = len(self._counts), len(self._ids)
        by_step = support_of(torch.cat(self._ids), self._counts[:, :steps].T)
        slots = torch.arange(steps * n, device=self._counts.device).view(steps, n).T.flatten()
        return by_step.rows(slots), Cut(self._mass[:, :steps], self._limited[:, :steps])


def held_at_most(config: TrainConfig, vocab: int) -> str:
    """A line on the memory that the supports of an update take, for the start of a run."""
    rollouts = config.dynamic_filtering + 1  # all of them, and what is taken of them
    tokens = rollouts * config.sequences * config.max_new_tokens
    most, remark = min(LIMIT, vocab), ""
    if 0 < config.top_k < most:
        most, remark = config.top_k, ", more only where logits tie"
    megabytes = tokens * (4 * most + 8) / 1e6
    return (
        f"an update's kept ids take at most {megabytes:.1f} MB ({tokens} tokens, {most} ids each"
        f"{remark})"
    )


def require_support(backend: str, config: TrainConfig, stored: bool = False) -> None:
    """Raise OptionError for the backend without kernels for supports, where there will be some.

    They come of the options, or with `stored` transitions.
    """
    truncation, off = Truncation.of(config), Truncation()
    if backend != "cuda" or not (truncation or stored):
        return
    cause = "transitions that have support_ids"
    if truncation is not None:
        fields = zip(truncation._fields, truncation, off, strict=True)
        cause = next(f"{name} {value}" for name, value, none in fields if value != none)
    raise OptionError(f"backend must be triton, cpu or reference with {cause}, got {backend!r}")
