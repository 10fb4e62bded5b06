"""Token log-probabilities and entropies."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast._results import TokenLogProbs
from ppo_fast.reference.common import compute, keep_of
from ppo_fast.reference.support import multiplicity
from ppo_fast.support import Support


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    support: Support | None = None,
) -> TokenLogProbs:
    """log softmax(logits / temperature)[token] and the entropy −Σ p ln p, per token.

    With a support the softmax is over z + ln(multiplicity): −inf for what is not kept.
    """
    vocab = logits.shape[-1]
    keep = keep_of(tokens, mask) & (tokens != ignore_index)
    legal = (tokens >= 0) & (tokens < vocab)
    label = torch.where(keep & legal, tokens, 0).long()[..., None]
    z, log_times, wrong = _scaled(logits, tokens, keep, temperature, support)
    logp = z.log_softmax(-1) - log_times.clamp(min=0)
    at_label = logp.gather(-1, label)[..., 0]
    # The label at −inf has probability 0 whatever the other logits: no gradient through it.
    impossible = z.gather(-1, label)[..., 0].isneginf() & ~at_label.isnan()
    logprobs = torch.where(impossible, at_label.detach(), at_label)
    # p ln p → 0 as p → 0: −inf logits are selected away, value and gradient.
    entropy = -(
        (logp + log_times).exp() * torch.where(z.isneginf(), torch.zeros_like(z), logp)
    ).sum(-1)

    poison = torch.where(keep & (wrong | ~legal), float("nan"), 1.0).to(z.dtype)
    zero = torch.zeros_like(entropy)
    return TokenLogProbs(
        torch.where(keep, logprobs * poison, zero), torch.where(keep, entropy * poison, zero)
    )


def log_sum_exp(
    logits: Tensor,
    tokens: Tensor,
    keep: Tensor,
    temperature: float | Tensor,
    support: Support | None,
) -> Tensor:
    """ln Σ e^(logits / temperature) of every row, over its support where given; 0 where masked."""
    z, _, wrong = _scaled(logits, tokens, keep, temperature, support)
    lse = torch.where(wrong, float("nan"), z.logsumexp(-1))
    return torch.where(keep, lse, torch.zeros_like(lse))


def _scaled(
    logits: Tensor,
    tokens: Tensor,
    keep: Tensor,
    temperature: float | Tensor,
    support: Support | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits over their temperature, to which ln(multiplicity) is added, that, and wrong rows."""
    z = torch.where(keep[..., None], compute(logits), 0.0)
    if isinstance(temperature, Tensor):
        temperature = torch.where(keep, compute(temperature), 1.0)[..., None].to(z.dtype)
    z = z / temperature
    if support is None:
        return z, torch.zeros_like(z), torch.zeros_like(keep)
    times, wrong = multiplicity(support, tokens, logits.shape[-1])
    log_times = times.log().to(z.dtype)
    return torch.where(log_times.isneginf(), log_times, z + log_times), log_times, wrong
