"""Sequences of a batch, their rollout, and their rewards."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ppo_fast import Support


class Sequences(NamedTuple):
    """Left-padded prompts followed by right-padded responses.

    tokens and attention (B, P + R) int64; mask (B, R) bool, True up to and including the EOS.
    A dropped sample has an all-False mask. `support` holds the ids that the token of each of the
    (B, R) slots was drawn from, in row-major order; None stands for the whole vocabulary.
    """

    tokens: Tensor
    attention: Tensor
    mask: Tensor
    support: Support | None = None

    @property
    def response(self) -> Tensor:
        """The response tokens, (B, R)."""
        return self.tokens[:, -self.mask.shape[1] :]

    @property
    def prompt_width(self) -> int:
        """Columns of the prompts, P."""
        return self.tokens.shape[1] - self.mask.shape[1]

    def rows(self, index: Tensor) -> Sequences:
        """The sequences at `index`."""
        support, width = self.support, self.mask.shape[1]
        if support is not None:
            slots = torch.arange(width, device=index.device)
            support = support.rows((index[:, None] * width + slots).flatten())
        return Sequences(self.tokens[index], self.attention[index], self.mask[index], support)

    def kept(self, rows: list[bool]) -> Sequences:
        """The same sequences with all rows but the true ones masked out."""
        kept = torch.tensor(rows, device=self.mask.device)
        return self._replace(mask=self.mask & kept[:, None])

    def flat(self, x: Tensor) -> Tensor:
        """Values of a (B, R, ...) tensor at the n kept tokens, (n, ...)."""
        return x[self.mask]

    def flat_support(self) -> Support | None:
        """The support of the n kept tokens."""
        if self.support is None:
            return None
        return self.support.rows(self.mask.flatten().nonzero().squeeze(1))

    def cu_seqlens(self) -> Tensor:
        """Offsets of each sequence's kept tokens among the n, (B + 1,) int64."""
        ends = self.mask.sum(1).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends])

    def scored_positions(self) -> Tensor:
        """Flat indices into (B, P + R), ascending, of the positions that predict a kept token."""
        keep = torch.zeros_like(self.attention, dtype=torch.bool)
        keep[:, -self.mask.shape[1] - 1 : -1] = self.mask
        return keep.flatten().nonzero().squeeze(1)

    def unflatten(self, values: Tensor) -> Tensor:
        """Spread one value per kept token, (n, ...), over (B, R, ...) with zeros elsewhere."""
        index, rest = self.mask.flatten().nonzero().squeeze(1), values.shape[1:]
        flat = values.new_zeros(self.mask.numel(), *rest).index_copy(0, index, values)
        return flat.view(*self.mask.shape, *rest)


def context_of(config: Any) -> int | None:
    """Most tokens that a model of a transformers `config` reads at once; None: it has no bound."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((length for length in found if length is not None), None)


def position_ids(attention: Tensor) -> Tensor:
    """Positions that count attended tokens only, so that left padding moves nothing."""
    return (attention.cumsum(-1) - 1).clamp(min=0)


def support_of(ids: Tensor, counts: Tensor) -> Support:
    """The support of the slots of `counts`, in row-major order, each with that many of `ids`."""
    ends = counts.flatten().cumsum(0)
    return Support(ids, torch.cat([ends.new_zeros(1), ends]))


class Cut(NamedTuple):
    """Probability that truncated sampling cut of each token, (B, R), and whether at its limit."""

    mass: Tensor
    limited: Tensor


class Rollout(NamedTuple):
    """Sampled sequences and the sampler's own log-probability of every token, (B, R) fp32.

    `cut` is there where the sampler truncated.
    """

    seqs: Sequences
    logprobs: Tensor
    cut: Cut | None = None

    def rows(self, index: Tensor) -> Rollout:
        """The sequences at `index`."""
        cut = None if self.cut is None else Cut(*(x[index] for x in self.cut))
        return Rollout(self.seqs.rows(index), self.logprobs[index], cut)

    @classmethod
    def joined(cls, parts: list[Rollout]) -> Rollout:
        """Several rollouts in one, as wide as the longest prompt and response ask for."""
        before = max(part.seqs.prompt_width for part in parts)
        width = max(part.logprobs.shape[1] for part in parts)
        left = [before - part.seqs.prompt_width for part in parts]
        right = [width - part.logprobs.shape[1] for part in parts]

        def whole(columns: list[Tensor]) -> Tensor:
            pads = zip(columns, left, right, strict=True)
            return torch.cat([pad(x, (front, back)) for x, front, back in pads])

        def response(columns: list[Tensor]) -> Tensor:
            return torch.cat([pad(x, (0, back)) for x, back in zip(columns, right, strict=True)])

        seqs, support, cut = [part.seqs for part in parts], None, None
        supports = [(s.support, s.mask.shape) for s in seqs if s.support is not None]
        if supports:
            counts = response([x.counts.view(shape) for x, shape in supports])
            support = support_of(torch.cat([x.ids for x, _ in supports]), counts)
        cuts = [part.cut for part in parts if part.cut is not None]
        if cuts:
            cut = Cut(*(response(list(column)) for column in zip(*cuts, strict=True)))
        one = Sequences(
            whole([s.tokens for s in seqs]),
            whole([s.attention for s in seqs]),
            response([s.mask for s in seqs]),
            support,
        )
        return cls(one, response([part.logprobs for part in parts]), cut)


@dataclass
class Scores:
    """One reward per sample, 0 for a dropped one, and the reason for each drop.

    `parts` are the rewards that make up each one where they are several, by name, NaN where one is
    missing. `errors` are the exceptions behind the faults, one of each place that raised. `late`
    says that the call ran out of time.
    """

    values: list[float]
    faults: dict[int, str] = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list, compare=False, repr=False)
    late: bool = field(default=False, repr=False)

    @property
    def kept(self) -> list[bool]:
        """True for each sample with a reward."""
        return [i not in self.faults for i in range(len(self.values))]

    @property
    def differ(self) -> bool:
        """True where two samples have rewards, and not the same one."""
        return len({v for v, kept in zip(self.values, self.kept, strict=True) if kept}) > 1

    def rows(self, index: list[int]) -> Scores:
        """The scores at `index`."""
        faults = {k: self.faults[i] for k, i in enumerate(index) if i in self.faults}
        parts = {name: [values[i] for i in index] for name, values in self.parts.items()}
        return Scores([self.values[i] for i in index], faults, parts)

    @classmethod
    def joined(cls, scores: list[Scores]) -> Scores:
        """The scores of several batches in one."""
        out = cls([])
        for one in scores:
            first = len(out.values)
            out.values += one.values
            out.faults |= {first + i: reason for i, reason in one.faults.items()}
            for name, values in one.parts.items():
                out.parts.setdefault(name, []).extend(values)
        return out

    @property
    def mean(self) -> float:
        """Mean reward of the kept samples, NaN without any."""
        kept = [v for i, v in enumerate(self.values) if i not in self.faults]
        return sum(kept) / len(kept) if kept else math.nan

    @property
    def std(self) -> float:
        """Standard deviation (divided by n) of the kept samples' rewards, NaN without any."""
        kept = [v for i, v in enumerate(self.values) if i not in self.faults]
        return statistics.pstdev(kept) if kept else math.nan
