"""Divergences of two categorical distributions, from their log-probabilities or their logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ppo_fast._results import DivergenceLoss, TokenDivergence
from ppo_fast._sequences import Sequences
from ppo_fast.reference.common import compute, keep_of, own_denom, reduce_loss, stats_of


def divergence_terms(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """Terms of the divergence of log-probabilities (..., V), to be summed over the last dimension.

    A term of probability 0 is 0; a probability of the first beside 0 of the second is infinite.
    """
    if kind == "reverse":
        return kl_of(student, teacher)
    if kind == "forward":
        return kl_of(teacher, student)
    if kind == "mixed":
        return beta * kl_of(student, teacher) + (1 - beta) * kl_of(teacher, student)
    mixture = log_mixture(student, teacher, beta)
    return beta * kl_of(teacher, mixture) + (1 - beta) * kl_of(student, mixture)


def kl_of(p: Tensor, q: Tensor) -> Tensor:
    """p·ln(p / q) of log-probabilities."""
    none = p.isneginf()
    return torch.where(
        none, 0.0, p.exp() * (torch.where(none, 0.0, p) - torch.where(none, 0.0, q))
    )


def log_mixture(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """ln((1 − β)s + βt), which is −∞ where both are; no gradient is NaN there."""
    none = student.isneginf() & teacher.isneginf()
    s, t = (torch.where(none, 0.0, x) for x in (student, teacher))
    mixed = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
    return torch.where(none, -torch.inf, mixed)


def token_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    keep: Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    log_times: Tensor | None = None,
) -> TokenDivergence:
    """Divergence and student's entropy of every row of logits (..., V), 0 where not kept.

    `log_times`, ln of how often an id counts, makes the distributions those over a support.
    """
    student, teacher = (
        log_softmax_of(x, keep, t, log_times)
        for x, t in ((logits, temperature), (teacher_logits.detach(), teacher_temperature))
    )
    # An id that counts n times has n terms of an nth of its probability: the same sum.
    divergence = divergence_terms(student, teacher, kind, beta).sum(-1)
    # Below 0 by rounding alone: the gradient is that of the value as it was.
    divergence = torch.where(divergence < 0, divergence - divergence.detach(), divergence)
    inside = torch.where(student.isneginf(), 0.0, student)
    entropy = -(student.exp() * inside).sum(-1)
    return TokenDivergence(*(torch.where(keep, x, 0.0) for x in (divergence, entropy)))


def log_softmax_of(
    logits: Tensor, keep: Tensor, temperature: float | Tensor, log_times: Tensor | None
) -> Tensor:
    """ln of the softmax of rows of logits over their temperature, of zeros where not kept."""
    if isinstance(temperature, Tensor):
        temperature = torch.where(keep, temperature, 1.0)[..., None]
    z = torch.where(keep[..., None], compute(logits), 0.0) / temperature
    if log_times is not None:
        z = torch.where(log_times.isneginf(), log_times, z + log_times)
    return z.log_softmax(-1)


def divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "token-mean",
    denom: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> DivergenceLoss:
    """Σ w·divergence / D of rows of logits."""
    keep = keep_of(logits[..., 0], mask)
    tokens = token_divergence(logits, teacher_logits, keep, **options)
    return reduced(tokens, keep, keep, 1.0, reduction, denom, cu_seqlens)


def reduced(
    tokens: TokenDivergence,
    keep: Tensor,
    counted: Tensor,
    coef: float | Tensor,
    reduction: str,
    denom: float | Tensor | None,
    cu_seqlens: Tensor | None,
) -> DivergenceLoss:
    """coef·Σ w·divergence / D over the rows that are kept; D of the slots that are `counted`."""
    seqs = Sequences(keep, cu_seqlens)
    if denom is None:
        own = own_denom(Sequences(counted, cu_seqlens), reduction)
        denom = torch.ones_like(own) if reduction == "token-sum" else own
    terms = coef * tokens.divergence
    loss, weights, own = reduce_loss(terms, seqs, reduction, denom)
    wide = [x.detach().double() for x in (terms, tokens.divergence, tokens.entropy)]
    stats = stats_of(
        keep.device,
        n_tokens=keep.sum(),
        n_seqs=(seqs.tokens > 0).sum(),
        loss=(weights * wide[0]).sum(),
        loss_denom=own,
        divergence=wide[1].sum(),
        entropy=wide[2].sum(),
    )
    return DivergenceLoss(loss, stats, tokens.divergence.detach(), tokens.entropy.detach())
