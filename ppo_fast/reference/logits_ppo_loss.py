"""The policy loss of a head: log-probabilities, then `ppo_loss`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ppo_fast._results import HeadLoss, TokenLogProbs
from ppo_fast.reference.common import keep_of
from ppo_fast.reference.logprobs import token_logprobs
from ppo_fast.reference.ppo_loss import ppo_loss
from ppo_fast.support import Support


def head_loss(
    scored: TokenLogProbs,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    rows: Tensor,
    counted: Tensor,
    **options: Any,
) -> HeadLoss:
    """`ppo_loss` over `rows`, divided by the D of the slots that are `counted`."""
    loss, stats = ppo_loss(
        scored.logprobs,
        old_logprobs,
        advantages,
        rows,
        entropy=scored.entropy,
        all_tokens=counted,
        **options,
    )
    return HeadLoss(loss, stats, scored.logprobs.detach(), scored.entropy.detach())


def logits_ppo_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    **options: Any,
) -> HeadLoss:
    """`ppo_loss` of `token_logprobs`, entropy bonus included."""
    keep = keep_of(tokens, mask)
    scored = token_logprobs(logits, tokens, temperature=temperature, mask=keep, support=support)
    return head_loss(scored, old_logprobs, advantages, keep, keep, **options)
