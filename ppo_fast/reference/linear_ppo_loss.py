"""The policy loss of a linear head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ppo_fast._results import HeadLoss
from ppo_fast.reference.common import keep_of
from ppo_fast.reference.linear_divergence import TeacherRows
from ppo_fast.reference.linear_logprobs import logits_of, rows_of
from ppo_fast.reference.logits_ppo_loss import head_loss
from ppo_fast.reference.logprobs import log_sum_exp, token_logprobs
from ppo_fast.reference.support import log_multiplicity
from ppo_fast.support import Support


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    row_index: Tensor | None = None,
    support: Support | None = None,
    teacher: TeacherRows | None = None,
    z_loss_coef: float | Tensor = 0.0,
    **options: Any,
) -> HeadLoss:
    """`ppo_loss` of `linear_token_logprobs`; rows left out by `row_index` count in D alone.

    A teacher adds coef·divergence to every token's term, and z_loss_coef·(ln Σe^z)² is added.
    """
    rows = rows_of(tokens, mask, row_index)
    # Once: its gradient is rounded once.
    z = logits_of(hidden, weight, rows, bias, softcap, extra, logit_scale, vocab_size)
    own: dict[str, Any] = {"temperature": temperature, "support": support}
    scored = token_logprobs(z, tokens, mask=rows, **own)
    others: dict[str, tuple[Tensor, float | Tensor]] = {}
    if teacher is not None:
        times = None if support is None else log_multiplicity(support, tokens, rows, z)
        found = teacher.divergence_from(z, rows, temperature, times)
        others["divergence"] = found.divergence, teacher.coef
    if isinstance(z_loss_coef, Tensor) or z_loss_coef != 0.0:
        lse = log_sum_exp(z, tokens, rows, **own)
        others["z_loss"] = lse * lse, z_loss_coef
    counted = keep_of(tokens, mask)
    return head_loss(scored, old_logprobs, advantages, rows, counted, others=others, **options)
