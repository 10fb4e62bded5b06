"""The policy loss of a linear head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ppo_fast._results import HeadLoss
from ppo_fast.reference.common import keep_of
from ppo_fast.reference.linear_logprobs import linear_token_logprobs, rows_of
from ppo_fast.reference.logits_ppo_loss import head_loss
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
    row_index: Tensor | None = None,
    support: Support | None = None,
    **options: Any,
) -> HeadLoss:
    """`ppo_loss` of `linear_token_logprobs`; rows left out by `row_index` count in D alone."""
    scored = linear_token_logprobs(
        hidden,
        weight,
        tokens,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        mask=mask,
        row_index=row_index,
        support=support,
    )
    rows = rows_of(tokens, mask, row_index)
    return head_loss(scored, old_logprobs, advantages, rows, keep_of(tokens, mask), **options)
