"""A correction inside a loss: weights and masks from two log-probabilities, and what counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast._results import ROLLOUT_FIELDS
from ppo_fast._sequences import Sequences
from ppo_fast.corrections import Correction
from ppo_fast.reference.common import own_denom
from ppo_fast.reference.rollout_weights import rollout_weights

# Weights, bool mask after rejections, and `RolloutStats.values`: `rollout_weights` of a backend.
Form = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Corrected(NamedTuple):
    """The policy term's weights (None: 1), the tokens not rejected, and `RolloutStats.values`."""

    is_weights: Tensor | None
    kept: Tensor
    stats: Tensor


class Counted(NamedTuple):
    """The mask, weights and divisor of a loss, some of whose tokens are rejected.

    `rows` is the loss's mask. `own` is the reduction's own D (0 for "token-sum"), `denom` the D
    that is used; `reduction` and `sequence_weights` give w. `seqs` are those of
    `rows`, with a context group.
    """

    rows: Tensor
    reduction: str
    denom: float | Tensor
    own: Tensor
    sequence_weights: Tensor | None
    seqs: Sequences | None


def is_late(correction: Correction | None, old: Tensor | None) -> bool:
    """True for a correction that is a function of the current log-probabilities."""
    return correction is not None and (correction.ratio == "current" or old is None)


def corrected(
    correction: Correction,
    logprobs: Tensor,
    rollout: Tensor,
    is_weights: Tensor | None,
    keep: Tensor,
    cu_seqlens: Tensor | None,
    context_group: dist.ProcessGroup | None = None,
    form: Form = rollout_weights,
) -> Corrected:
    """The correction of tokens whose x is `logprobs` − `rollout`; `is_weights` multiply it."""
    weights, kept, stats = form(
        logprobs.detach(),
        rollout,
        keep,
        correction=correction,
        cu_seqlens=cu_seqlens,
        context_group=context_group,
    )
    if correction.level is not None:
        is_weights = weights if is_weights is None else is_weights.to(weights.dtype) * weights
    if correction.reject and correction.drops == "policy":
        own = torch.ones_like(weights) if is_weights is None else is_weights
        is_weights = torch.where(kept, own, 0.0)
    return Corrected(is_weights, kept, stats)


def counted(
    correction: Correction,
    kept: Tensor,
    rows: Tensor,
    all_tokens: Tensor,
    **options: Any,
) -> Counted:
    """The loss's mask, w and D. `rows` are summed over, `all_tokens` count in D as well."""
    kept = kept | ~rows  # nothing is known of the others
    in_w, in_d = rows, all_tokens
    if correction.count == "kept":
        in_w = rows & kept
        in_d = in_w if all_tokens is rows else all_tokens & kept
    if correction.drops == "all":
        rows = in_w if correction.count == "kept" else rows & kept
    return numbers(rows, in_w, in_d, **options)


def numbers(
    rows: Tensor,
    in_w: Tensor,
    in_d: Tensor,
    *,
    cu_seqlens: Tensor | None,
    context_group: dist.ProcessGroup | None,
    reduction: str,
    denom: float | Tensor | None,
    sequence_weights: Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> Counted:
    """w over the tokens `in_w` and D over those `in_d`, as numbers."""
    found: dict[int, Sequences] = {}

    def of(mask: Tensor) -> Sequences:
        return found.setdefault(id(mask), Sequences(mask, cu_seqlens, context_group))

    own = own_denom(of(in_d), reduction)
    if denom is None:
        denom = torch.ones_like(own) if reduction == "token-sum" else own
    if reduction == "seq-mean-token-mean":
        tokens = of(in_w).tokens
        share = torch.where(tokens > 0, 1.0 / tokens.clamp(min=1), 0.0).to(dtype)
        sequence_weights = share if sequence_weights is None else share * sequence_weights
        reduction = "seq-mean-token-sum"
    whole = None if context_group is None else of(rows)
    return Counted(rows, reduction, denom, own, sequence_weights, whole)


def recounts(correction: Correction) -> bool:
    """True where what is summed over or counted differs from the mask given."""
    return bool(correction.reject) and (correction.drops, correction.count) != ("policy", "all")


def rollout_sums(stats: Tensor) -> dict[str, Tensor]:
    """The fields of `Stats` that `RolloutStats.values` fill."""
    names = ("tokens", "weight", "weight_sq", "k3", "rejected", "missing")
    return {f"rollout_{name}": stats[ROLLOUT_FIELDS.index(name)] for name in names}
