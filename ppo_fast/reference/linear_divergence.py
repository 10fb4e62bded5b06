"""Divergence of a linear head's distribution from that of another linear head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ppo_fast._results import DivergenceLoss, TokenDivergence
from ppo_fast.reference.common import compute, keep_of
from ppo_fast.reference.divergence import reduced, token_divergence
from ppo_fast.reference.linear_logprobs import logits_of, rows_of


class TeacherRows(NamedTuple):
    """A teacher of logits cap·tanh(logit_scale·(hidden·weightᵀ + bias) / cap), a constant."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    temperature: float | Tensor
    kind: str
    beta: float
    coef: float | Tensor

    def logits(self, keep: Tensor) -> Tensor:
        """(..., V), of a hidden state of 0 where not kept."""
        x, scale = (self.hidden, self.weight), self.logit_scale
        return logits_of(*x, keep, self.bias, self.softcap, None, scale, None)

    def divergence_from(
        self,
        logits: Tensor,
        keep: Tensor,
        temperature: float | Tensor,
        log_times: Tensor | None = None,
    ) -> TokenDivergence:
        """Of a student's rows of logits (..., V), as `token_divergence`."""
        return token_divergence(
            logits,
            self.logits(keep),
            keep,
            kind=self.kind,
            beta=self.beta,
            temperature=temperature,
            teacher_temperature=self.temperature,
            log_times=log_times,
        )


def linear_token_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherRows,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    row_index: Tensor | None = None,
) -> TokenDivergence:
    """`token_divergence` of `logits_of` the student and the teacher's."""
    keep = rows_of(hidden[..., 0], mask, row_index)
    logits = logits_of(hidden, weight, keep, bias, softcap, extra, logit_scale, vocab_size)
    return teacher.divergence_from(logits, keep, temperature)


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherRows,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    row_index: Tensor | None = None,
    reduction: str = "token-mean",
    denom: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> DivergenceLoss:
    """coef·Σ w·divergence / D; rows left out by `row_index` count in D alone."""
    tokens = linear_token_divergence(
        hidden,
        weight,
        teacher,
        mask,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        row_index=row_index,
        extra=extra,
    )
    keep = rows_of(hidden[..., 0], mask, row_index)
    coef = (
        teacher.coef.to(compute(hidden).dtype)
        if isinstance(teacher.coef, Tensor)
        else teacher.coef
    )
    counted = keep_of(hidden[..., 0], mask)
    return reduced(tokens, keep, counted, coef, reduction, denom, cu_seqlens)
