"""Denominators of a loss over an optimiser step: tokens, sequences, micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.referee.cases import Cut
from ppo_fast.referee.formulas import MASKS, Change

REDUCTIONS = {
    "token-mean": "the mean over all tokens",
    "seq-mean-token-mean": "the mean over sequences of their token means",
    "seq-mean-token-sum": "the sum of a sequence's tokens, averaged over sequences",
    "seq-mean-token-sum-norm": "the sum of a sequence's tokens over a constant, averaged over"
    " sequences",
    "token-sum": "the sum over tokens, without a denominator",
    "slot-mean": "the mean over all slots, masked ones too",
}
_SCOPES = {
    "micro-batch": "the mean of micro-batch means, not the mean over the step's",
    "rank": "each rank's own mean, averaged over ranks, not the mean over the step's",
    "summed": "micro-batch means that are added, not averaged: too large by their number",
    "local": "the micro-batch's own sum over the step's, averaged over ranks: too small by their"
    " number",
}


def weights(
    keep: Tensor, cut: Cut, reduction: str, scope: str, empty_rows: bool, divisor: float
) -> Tensor:
    """Weight `(B, T)` of each slot's loss in the step's, masked slots' too.

    `scope` says over which rows a denominator is counted; `divisor` is the constant of
    "seq-mean-token-sum-norm".
    """
    lengths = keep.sum(-1, keepdim=True).double()
    if reduction == "slot-mean":
        own, counts = torch.ones_like(lengths), torch.full_like(lengths, keep.shape[1])
    elif reduction in ("token-mean", "token-sum"):
        own, counts = torch.ones_like(lengths), lengths
    else:
        own = 1 / lengths.clamp(min=1) if reduction == "seq-mean-token-mean" else 1.0 + 0 * lengths
        counts = torch.ones_like(lengths) if empty_rows else (lengths > 0).double()
        if reduction == "seq-mean-token-sum-norm":
            own = own / divisor
    if reduction == "token-sum":
        return own.expand(keep.shape).clone()
    out = torch.zeros(keep.shape, dtype=torch.float64)
    for rank in cut:
        for rows in rank:
            if scope in ("step", "local"):
                count = counts.sum() * (len(cut) if scope == "local" else 1)
            elif scope == "rank":
                count = counts[[i for part in rank for i in part]].sum() * len(cut)
            else:
                parts = len(rank) if scope == "micro-batch" else 1
                count = counts[list(rows)].sum() * parts * len(cut)
            out[list(rows)] = own[list(rows)].expand(-1, keep.shape[1]) / count.clamp(min=1)
    return out


def changes(reduction: str) -> list[Change]:
    """Other denominators, other masks, beside a reduction."""
    scopes = [
        Change(f"denominator: {words}", {"scope": scope}, f"denominator.{scope}")
        for scope, words in _SCOPES.items()
    ]
    others = [
        Change(f"denominator: {words}", {"reduction": name}, f"denominator.{name}")
        for name, words in REDUCTIONS.items()
    ]
    rows = [
        Change(
            f"denominator: sequences without a token are {words}counted",
            {"empty_rows": counted},
            "denominator.empty-rows",
        )
        for counted, words in ((False, "not "), (True, ""))
        if reduction.startswith("seq")
    ]
    return [*MASKS, *scopes, *rows, *others]
