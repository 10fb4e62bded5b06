"""Sequences of a batch, their rollout, and their rewards."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Left-padded prompts followed by right-padded responses.

    tokens and attention (B, P + R) int64; mask (B, R) bool, True up to and including the EOS.
    A dropped sample has an all-False mask.
    """

    tokens: Tensor
    attention: Tensor
    mask: Tensor

    @property
    def response(self) -> Tensor:
        """The response tokens, (B, R)."""
        return self.tokens[:, -self.mask.shape[1] :]

    def rows(self, index: Tensor) -> Sequences:
        """The sequences at `index`."""
        return Sequences(*(x[index] for x in self))

    def kept(self, scores: Scores) -> Sequences:
        """The same sequences with those without a reward masked out."""
        kept = torch.tensor(scores.kept, device=self.mask.device)
        return self._replace(mask=self.mask & kept[:, None])

    def ended(self, eos: list[int]) -> list[bool]:
        """True for each response that reached one of the tokens `eos`."""
        stops = torch.tensor(eos, device=self.tokens.device)
        return (torch.isin(self.response, stops) & self.mask).any(1).tolist()

    def flat(self, x: Tensor) -> Tensor:
        """Values of a (B, R) tensor at the n kept tokens, (n,)."""
        return x[self.mask]

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
        """Spread one value per kept token, (n,), over (B, R) with zeros elsewhere."""
        index = self.mask.flatten().nonzero().squeeze(1)
        flat = values.new_zeros(self.mask.numel()).index_copy(0, index, values)
        return flat.view(self.mask.shape)


def position_ids(attention: Tensor) -> Tensor:
    """Positions that count attended tokens only, so that left padding moves nothing."""
    return (attention.cumsum(-1) - 1).clamp(min=0)


def lengths(seqs: Sequences, eos: list[int]) -> dict[str, float]:
    """`response_length`, mean tokens a response with its EOS, and `ended`, the share with one."""
    ended = seqs.ended(eos)
    return {
        "response_length": float(seqs.mask.sum()) / len(ended),
        "ended": sum(ended) / len(ended),
    }


class Rollout(NamedTuple):
    """Sampled sequences and the sampler's own log-probability of every token, (B, R) fp32."""

    seqs: Sequences
    logprobs: Tensor


@dataclass
class Scores:
    """One reward per sample, 0 for a dropped one, and the reason for each drop.

    `errors` are the exceptions behind the faults, one of each place that raised. `late` says that
    the call ran out of time.
    """

    values: list[float]
    faults: dict[int, str] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list, compare=False, repr=False)
    late: bool = field(default=False, repr=False)

    @property
    def kept(self) -> list[bool]:
        """True for each sample with a reward."""
        return [i not in self.faults for i in range(len(self.values))]

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
