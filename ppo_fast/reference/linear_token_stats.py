"""Token statistics of a linear head."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast._results import TokenStats
from ppo_fast.reference.common import compute
from ppo_fast.reference.linear_logprobs import logits_of, rows_of
from ppo_fast.reference.logprobs import token_logprobs


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    row_index: Tensor | None = None,
) -> TokenStats:
    """Statistics of the softmax of `linear_token_logprobs`' logits."""
    keep = rows_of(tokens, mask, row_index)
    z = logits_of(hidden, weight, keep, bias, softcap, extra, logit_scale, vocab_size)
    top = z.argmax(-1)  # the first of equals
    if isinstance(temperature, Tensor):
        temperature = torch.where(keep, compute(temperature), 1.0)[..., None].to(z.dtype)
    z = z / temperature
    logprobs, entropy = token_logprobs(z, tokens, mask=keep)
    nowhere = (tokens < 0) | (tokens >= z.shape[-1])
    nothing = logprobs.isnan()  # neither a distribution, nor a token of it

    def shown(x: Tensor, hidden: Tensor) -> Tensor:
        """NaN where hidden, 0 where masked."""
        return torch.where(keep, torch.where(hidden, float("nan"), x), torch.zeros_like(x))

    return TokenStats(
        logprobs,
        entropy,
        shown(z.logsumexp(-1), nothing),
        shown((2 * z.log_softmax(-1)).logsumexp(-1), nothing),
        keep & ~nothing & (top == tokens),
        shown((z / z.shape[-1]).sum(-1), nowhere),  # no overflow before the quotient
    )
