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


class Choice(NamedTuple):
    """Tokens that rows of logits keep: (B, V) bool, and of each row the ids and their number.

    `rows` and `ids` (M,) int64 are those of the True ones, row after row. `mass` (B,) fp64 is what
    was cut of the probability, `limited` (B,) bool, where the limit cut.
    """

    kept: Tensor
    rows: Tensor
    ids: Tensor
    counts: Tensor
    mass: Tensor
    limited: Tensor


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

    def choose(self, z: Tensor) -> Choice:
        """The tokens that are kept of `z` (B, V), logits over the temperature.

        They depend on nothing but the row.
        """
        probs = torch.softmax(z, dim=-1)
        mass = total = _mass(probs)
        # At least the least number: a logit of -inf is never kept.
        threshold = torch.full_like(z[:, 0], torch.finfo(z.dtype).min)
        if self.min_p:
            threshold = torch.maximum(threshold, z.amax(-1) + math.log(self.min_p))
        if 0 < self.top_k < z.shape[1]:
            of_k = z.topk(self.top_k).values[:, -1]
            threshold = torch.maximum(threshold, of_k)
            mass = _mass(probs, z >= of_k[:, None]) if self.top_p < 1 else mass
        if self.top_p < 1:
            target = self.top_p * mass
            of_p, found = _reached(z, probs, target, _FIRST)
            more = (~found).nonzero().squeeze(1)
            if len(more):
                of_p[more], _ = _reached(z[more], probs[more], target[more], LIMIT)
            threshold = torch.maximum(threshold, of_p)
        kept = z >= threshold[:, None]
        rows, ids, counts = _listed(kept)
        limited = counts > LIMIT
        over = limited.nonzero().squeeze(1)
        if len(over):
            kept[over] &= _likeliest(z[over])
            rows, ids, counts = _listed(kept)
        sums = probs[rows, ids].cumsum(0, dtype=torch.float64)
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        mass = 1 - torch.cat([sums.new_zeros(1), sums])[ends].diff() / total
        return Choice(kept, rows, ids, counts, mass.clamp(min=0), limited)


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """The logits over the temperature, in fp32, or fp64 where they are."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1 else wide / temperature  # the division costs a pass


def _listed(kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row and id of every True one, and their number by row: a sum of bools would convert all."""
    rows, ids = kept.nonzero(as_tuple=True)
    return rows, ids, rows.bincount(minlength=len(kept))


def _mass(probs: Tensor, kept: Tensor | None = None) -> Tensor:
    """Sums of the rows, or of what is kept of them, (B,) fp64."""
    masked = probs if kept is None else torch.where(kept, probs, 0)
    # Two rows at least: one alone would be shared out among threads, and summed in another order.
    rows = masked if len(masked) > 1 else masked.expand(2, -1)
    return rows.sum(-1, dtype=torch.float64)[: len(masked)]


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
        found = self._truncation.choose(scaled(logits, temperature))
        self._ids.append(found.ids[alive[found.rows]].int())
        self._counts[going, t] = found.counts[alive]
        self._mass[going, t], self._limited[going, t] = found.mass[alive], found.limited[alive]
        return logits.masked_fill(~found.kept, -math.inf)

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
