"""Weights and rejections of tokens that another policy sampled, from two log-probabilities."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast._results import ROLLOUT_FIELDS
from ppo_fast._sequences import Sequences
from ppo_fast.corrections import MAX_LOG_RATIO, Correction
from ppo_fast.reference.common import keep_of, select


def rollout_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    correction: Correction | None,
    cu_seqlens: Tensor | None = None,
    context_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (0 where masked), bool mask after the rejections, and `RolloutStats.values`.

    Where x is NaN at an unmasked slot (a NaN of either, or −inf of both), x = 0. Without a
    correction the weights are 1. With a context group the statistics are this part's, and those
    of sequences 0.
    """
    keep = keep_of(old_logprobs, mask)
    old, rollout = select(keep, old_logprobs), select(keep, rollout_logprobs)
    seqs = Sequences(keep, cu_seqlens, context_group)
    x = old - rollout
    missing = x.isnan()
    x = torch.where(missing, 0.0, x)
    finite = torch.where(old.isfinite(), old, torch.where(rollout.isfinite(), rollout, 0.0))
    old, rollout = (torch.where(missing, finite, y) for y in (old, rollout))
    bounded = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = _level(correction, x, seqs)
    low, high = (0.0, float("inf")) if correction is None else correction.bounds()
    outside = (ratio < low, ratio > high)
    weights = ratio.clamp(low, high)
    if correction is not None and correction.form == "mask":
        weights = torch.where(outside[0] | outside[1], 0.0, ratio)
    weights = torch.where(keep, weights, 0.0)
    kept = keep if correction is None else keep & _accepted(correction, bounded, seqs)
    known = context_group is None and (keep.dim() == 2 or cu_seqlens is not None)
    part = seqs if context_group is None else Sequences(keep, cu_seqlens)
    stats = _stats(old, rollout, x, weights, outside, kept, missing, part, known)
    return weights, kept, stats


def _level(correction: Correction | None, x: Tensor, seqs: Sequences) -> Tensor:
    """e^x of the correction's level, in every slot."""
    level = None if correction is None else correction.level
    if level is None:
        return torch.ones_like(x)
    if level != "token":
        wide = x.double()  # the place of padding does not survive the rounding
        per = seqs.sum(wide) if level == "sequence" else seqs.mean(wide)
        x = seqs.spread(per).to(x.dtype)
    return x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _k2(x: Tensor) -> Tensor:
    return 0.5 * x * x


def _k3(x: Tensor) -> Tensor:
    return torch.expm1(x) - x


def _accepted(correction: Correction, x: Tensor, seqs: Sequences) -> Tensor:
    """Tokens that all of the rejections' bounds keep; bounds are open at infinity."""
    x = x.double()
    ways = (lambda v: v, seqs.sum, seqs.mean, seqs.min, seqs.max)
    kept = torch.ones_like(seqs.keep)
    for way, (low, high, k2, k3) in zip(ways, correction.windows(), strict=True):
        held = []
        if (low, high) != (-float("inf"), float("inf")):
            value = way(x)
            held.append((value >= low) & (value <= high))
        if k2 != float("inf"):
            held.append(way(_k2(x)) <= k2)
        if k3 != float("inf"):
            held.append(way(_k3(x)) <= k3)
        for one in held:
            kept = kept & (one if one.shape == kept.shape else seqs.spread(one))
    return kept


def _stats(
    old: Tensor,
    rollout: Tensor,
    x: Tensor,
    weights: Tensor,
    outside: tuple[Tensor, Tensor],
    kept: Tensor,
    missing: Tensor,
    seqs: Sequences,
    known: bool,
) -> Tensor:
    """`RolloutStats.values`: sums over unmasked tokens, and sequences with one where `known`."""
    keep, live = seqs.keep, (seqs.tokens > 0) & known
    x, weights = x.double(), weights.double()
    bounded = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    whole = seqs.sum(x).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ppl, rollout_ppl = (-seqs.mean(logprobs.double()) for logprobs in (old, rollout))
    rejected = keep & ~kept
    per_token = {
        "tokens": keep,
        "missing": missing,
        "rejected": rejected,
        "weight": weights,
        "weight_sq": weights * weights,
        "below": outside[0],
        "above": outside[1],
        "k1": -x,
        "k3": _k3(bounded),
        "ratio_sq": (2.0 * bounded).exp(),
    }
    per_sequence = {
        "seqs": live,
        "rejected_seqs": seqs.sum(rejected.double()) > 0,
        "seq_ratio_sq": (2.0 * whole).exp(),
        "log_ppl": ppl,
        "rollout_log_ppl": rollout_ppl,
        "ppl": ppl.exp(),
        "rollout_ppl": rollout_ppl.exp(),
        "ppl_ratio": (ppl - rollout_ppl).exp(),
    }
    found = {k: torch.where(keep, v.double(), 0.0).sum() for k, v in per_token.items()}
    found |= {k: torch.where(live, v.double(), 0.0).sum() for k, v in per_sequence.items()}
    inf = x.new_full((1,), float("inf"))
    lowest = torch.where(keep, weights, float("inf")).flatten()
    highest = torch.where(keep, weights, float("-inf")).flatten()
    found["weight_min"] = torch.cat([inf, lowest]).amin()
    found["weight_max"] = torch.cat([-inf, highest]).amax()
    return torch.stack([found[name] for name in ROLLOUT_FIELDS])
