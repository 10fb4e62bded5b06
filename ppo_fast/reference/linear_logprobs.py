"""Token log-probabilities of a linear head."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast._results import TokenLogProbs
from ppo_fast.reference.common import compute, keep_of
from ppo_fast.reference.logprobs import token_logprobs
from ppo_fast.support import Support


def rows_of(tokens: Tensor, mask: Tensor | None, row_index: Tensor | None) -> Tensor:
    """The unmasked slots among the rows that `row_index` names, bool."""
    keep = keep_of(tokens, mask)
    if row_index is None:
        return keep
    named = torch.zeros(tokens.numel(), dtype=torch.bool, device=tokens.device)
    return keep & named.index_fill(0, row_index, True).view(tokens.shape)


def logits_of(
    hidden: Tensor,
    weight: Tensor,
    keep: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    extra: tuple[Tensor, Tensor] | None,
    logit_scale: float,
    vocab_size: int | None,
) -> Tensor:
    """z = cap·tanh(logit_scale·(hidden·weightᵀ + u·bᵀ + bias) / cap), of hidden = u = 0 where not
    kept, and the first `vocab_size` rows of weight, b and bias."""
    # Selected before the product: 0·NaN would reach the weight's gradient.
    z = torch.where(keep[..., None], compute(hidden), 0.0) @ compute(weight[:vocab_size]).t()
    if extra is not None:
        u, b = extra
        z = z + torch.where(keep[..., None], compute(u), 0.0) @ compute(b[:vocab_size]).t()
    if bias is not None:
        z = z + compute(bias[:vocab_size])
    z = logit_scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_token_logprobs(
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
    support: Support | None = None,
) -> TokenLogProbs:
    """`token_logprobs` of `logits_of` the head."""
    keep = rows_of(tokens, mask, row_index)
    z = logits_of(hidden, weight, keep, bias, softcap, extra, logit_scale, vocab_size)
    return token_logprobs(z, tokens, temperature=temperature, mask=keep, support=support)
