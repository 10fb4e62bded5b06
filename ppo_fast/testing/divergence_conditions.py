"""The magnitudes whose roundings reach a divergence and its gradient, as `conditions.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ppo_fast._results import STATS_FIELDS
from ppo_fast._sequences import Sequences
from ppo_fast.reference.common import keep_of, token_weights
from ppo_fast.reference.divergence import divergence_terms
from ppo_fast.teacher import check_kind
from ppo_fast.testing.calls import Call
from ppo_fast.testing.loss_conditions import (
    Conditions,
    Narrow,
    Softmax,
    finite,
    seqs_value,
)


class Pair:
    """Rows of a student's and a teacher's logits (..., V) over their temperatures.

    `own` and `other` are the softmaxes of both: their `reach` is what rounds a ln p, and with it,
    relatively, the p.
    """

    def __init__(
        self, z: Tensor, y: Tensor, own: Softmax, other: Softmax, kind: str, beta: float
    ) -> None:
        self.kind, self.beta = check_kind("Pair", kind, beta)
        self.s, self.t = z.log_softmax(-1), y.log_softmax(-1)
        self.reach = own.reach, other.reach
        self.adds = 1 + math.sqrt(z.shape[-1]) / 8
        self.value = divergence_terms(self.s, self.t, self.kind, self.beta).sum(-1)

    def kl(self, first: int) -> tuple[Tensor, Tensor]:
        """KL of the student (0) or of the teacher (1) from the other, and what rounds it."""
        pair, reach = (self.s, self.t), self.reach
        gap = pair[first] - pair[1 - first]
        return self._sum(pair[first], gap, reach[first], reach[0] + reach[1])

    def from_mixture(self, of: Tensor, which: int) -> tuple[Tensor, Tensor]:
        """KL of one of both from (1 − β)s + βt, and what rounds it."""
        gap, reach = of - self.mixture(), self.reach[which]
        return self._sum(of, gap, reach, reach + self._mixture_error())

    def mixture(self) -> Tensor:
        """ln((1 − β)s + βt)."""
        s, t = self.s + math.log1p(-self.beta), self.t + math.log(self.beta)
        return torch.logaddexp(s, t)

    def _mixture_error(self) -> Tensor:
        both = torch.maximum(*self.reach) + finite(self.s).abs() + finite(self.t).abs()
        return both + 4 + finite(self.mixture()).abs()

    def _sum(
        self, ln_p: Tensor, gap: Tensor, reach: Tensor, of_gap: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Σ p·gap and its roundings: of p, of the gap and of the additions."""
        p, size = ln_p.exp(), finite(gap).abs()
        error = p * ((self.adds + reach + 4) * size + of_gap)
        return finite(p * finite(gap)).sum(-1), finite(error).sum(-1)

    def condition(self) -> Tensor:
        """Of the divergence, (...)."""
        if self.kind == "jsd":
            own, other = self.from_mixture(self.s, 0), self.from_mixture(self.t, 1)
            return (1 - self.beta) * own[1] + self.beta * other[1] + self.value
        if self.kind == "mixed":
            return self.beta * self.kl(0)[1] + (1 - self.beta) * self.kl(1)[1] + self.value
        return self.kl(0 if self.kind == "reverse" else 1)[1] + self.value

    def gradient(self) -> tuple[Tensor, Tensor]:
        """The slope by every z_j and what rounds it, (..., V)."""
        p, q = self.s.exp(), self.t.exp()
        reach_s, reach_t = self.reach
        forward = p - q, p * (reach_s + 4) + q * (reach_t + 4)
        if self.kind == "forward":
            return forward
        if self.kind == "jsd":
            kl, of_kl = self.from_mixture(self.s, 0)
            gap, of_gap = self.s - self.mixture(), reach_s + self._mixture_error()
        else:
            kl, of_kl = self.kl(0)
            gap, of_gap = self.s - self.t, reach_s + reach_t
        gap, kl, of_kl = finite(gap), kl[..., None], of_kl[..., None]
        error = (reach_s + 8) * (gap.abs() + kl.abs()) + of_gap + of_kl
        slope, error = p * (gap - kl), p * error
        if self.kind == "jsd":
            return (1 - self.beta) * slope, (1 - self.beta) * error
        if self.kind == "mixed":
            rest = 1 - self.beta
            return self.beta * slope + rest * forward[0], self.beta * error + rest * forward[1]
        return slope, error


def weighted_loss(
    call: Call, keep: Tensor, divisor: float, terms: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Of a loss of per-token terms that are off by `terms`: (adds, loss, weights / D)."""
    seqs = Sequences(keep, call.tensors.get("cu_seqlens"))
    w = token_weights(seqs, call.options["reduction"], torch.float64).abs()
    adds = 1 + math.sqrt(max(1, int(keep.sum()))) / 4
    return adds, finite(w * seqs_value(terms, seqs)).sum() * adds / divisor, w / divisor


def logits_divergence_condition(
    call: Call, exact: dict[str, Tensor], eps: float, narrow: Narrow = None
) -> Conditions:
    """Of two softmaxes, their divergence, the loss of it and its gradient by the logits."""
    t, o = call.tensors, call.options
    keep = keep_of(t["logits"][..., 0], t.get("mask"))
    own, other = temperatures(call, keep)
    z, y = (
        torch.where(keep[..., None], t[name], 0.0) / x
        for name, x in (("logits", own), ("teacher_logits", other))
    )
    tokens = torch.zeros_like(keep, dtype=torch.int64)
    rows = Softmax(z, tokens)
    pair = Pair(z, y, rows, Softmax(y, tokens), o["kind"], o["beta"])
    out, slopes = loss_conditions(call, exact, keep, pair, rows, 1.0)
    if call.cotangents:
        slope, error = pair.gradient()
        size = finite(slopes[..., None] * (error + slope.abs()) / own)
        out["grad_logits"] = (8, size, False)
    return out


def temperatures(call: Call, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's temperature of every row, (..., 1)."""
    t, o = call.tensors, call.options
    own: Any = t.get("temperature", o.get("temperature", 1.0))
    given = o.get("teacher", {}).get("temperature", o.get("teacher_temperature"))
    other: Any = t.get("teacher_temperature", given)
    both = own, own if other is None else other
    first, second = (
        torch.as_tensor(x, dtype=torch.float64, device=keep.device).expand(keep.shape)[..., None]
        for x in both
    )
    return first, second


def loss_conditions(
    call: Call,
    exact: dict[str, Tensor],
    keep: Tensor,
    pair: Pair,
    rows: Softmax,
    coef: float,
) -> tuple[Conditions, Tensor]:
    """Of a divergence loss's results, and its gradient by every divergence, (...)."""
    denom, stats = call.options.get("denom"), exact["stats"]
    own = float(stats[STATS_FIELDS.index("loss_denom")]) or 1.0
    divisor = own if denom is None else float(denom)
    of_value, of_entropy = (torch.where(keep, x, 0.0) for x in (pair.condition(), rows.entropy))
    adds, loss, slopes = weighted_loss(call, keep, divisor, coef * of_value)
    sums = torch.zeros_like(stats)
    total = {"divergence": of_value, "entropy": of_entropy}
    for name, x in total.items():
        sums[STATS_FIELDS.index(name)] = finite(x).sum() * adds
    sums[STATS_FIELDS.index("loss")] = loss * divisor
    out: Conditions = {
        "loss": (8, loss, False),
        "stats": (8, sums, False),
        "divergence": (8, of_value, False),
        "entropy": (8, of_entropy, False),
    }
    passed = float(call.cotangents["loss"].abs()) if call.cotangents else 0.0
    return out, slopes * coef * passed
