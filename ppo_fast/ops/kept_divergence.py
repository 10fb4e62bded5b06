"""Divergence over a support: of the pairs' logits of a student and a teacher.

In PyTorch: there are few pairs, and those of both heads have gone through the kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast._boundary.options import Scoring, Softmax
from ppo_fast.ops.shards import Shard
from ppo_fast.ops.support import Kept, softmax_over
from ppo_fast.reference.divergence import divergence_terms, kl_of, log_mixture


class KeptTeacher(NamedTuple):
    """Scoring of a teacher's pairs, and the divergence from it."""

    s: Scoring
    kind: str
    beta: float

    def part(self, at: slice) -> KeptTeacher:
        """Teacher of a slice of the rows."""
        tokens, t = self.s.tokens[at], self.s.temperature_tensor
        s = self.s._replace(tokens=tokens, temperature_tensor=None if t is None else t[at])
        return self._replace(s=s)


class KeptPair(NamedTuple):
    """Both log-probabilities of every pair, (M,), and the rows' divergence and own KL, (N,)."""

    student: Tensor
    teacher: Tensor
    divergence: Tensor
    kl: Tensor


def compare_kept(
    backend: str,
    z: Tensor,
    y: Tensor,
    kept: Kept,
    s: Scoring,
    softmax: Softmax,
    t: KeptTeacher,
    shard: Shard | None,
) -> KeptPair:
    """The divergence of rows from their pairs' logits, of which a shard has its share."""
    own = softmax_over(backend, y, kept, t.s, shard)
    student, teacher = _ln_p(z, kept, s, softmax), _ln_p(y, kept, t.s, own)
    other = log_mixture(student, teacher, t.beta) if t.kind == "jsd" else teacher
    parts = (
        _sums(divergence_terms(student, teacher, t.kind, t.beta), kept),
        _sums(kl_of(student, other), kept),
    )
    divergence, kl = parts if shard is None else shard.summed(*parts)
    return KeptPair(student, teacher, divergence.clamp(min=0), kl)


def kept_slopes(pair: KeptPair, kept: Kept, s: Scoring, t: KeptTeacher, c: Tensor) -> Tensor:
    """dz (M,) of Σ c·divergence, wide; 0 where a pair is absent or its row masked."""
    row = kept.rows
    p, q = pair.student.exp(), pair.teacher.exp()
    none = pair.student.isneginf()

    def own(other: Tensor) -> Tensor:
        return torch.where(none, 0.0, p * (pair.student - other - pair.kl[row]))

    if t.kind == "jsd":
        slope = (1 - t.beta) * own(log_mixture(pair.student, pair.teacher, t.beta))
    elif t.kind == "mixed":
        slope = t.beta * own(pair.teacher) + (1 - t.beta) * (p - q)
    else:
        slope = own(pair.teacher) if t.kind == "reverse" else p - q
    dz = c[row] * slope / _per_pair(s, kept)
    return torch.where(none & pair.teacher.isneginf() | (c[row] == 0), 0.0, dz)


def _per_pair(s: Scoring, kept: Kept) -> Any:
    t = s.temperature_tensor
    return s.temperature if t is None else t[kept.rows]


def _ln_p(z: Tensor, kept: Kept, s: Scoring, softmax: Softmax) -> Tensor:
    """ln p of every pair, −∞ where it is absent or its row masked."""
    row = kept.rows
    ln_p = z / _per_pair(s, kept) - softmax.row_max[row] - softmax.log_sum[row]
    return torch.where(kept.pairs.mask[row] & (z != -torch.inf), ln_p, -torch.inf)


def _sums(x: Tensor, kept: Kept) -> Tensor:
    """Sums over the pairs of every row, in their order."""
    return torch.segment_reduce(
        x, "sum", offsets=kept.pairs.offsets, initial=0.0, unsafe=True, axis=0
    )
