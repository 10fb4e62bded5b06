"""Log-probabilities of a linear head at several ids of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast._results import TokenLogProbs
from ppo_fast.reference.common import compute
from ppo_fast.reference.linear_logprobs import logits_of, rows_of
from ppo_fast.reference.logprobs import token_logprobs
from ppo_fast.support import ABSENT


def linear_logprobs_at(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    row_index: Tensor | None = None,
) -> TokenLogProbs:
    """log softmax over the whole vocabulary at each id (..., K), 0 where absent; the entropy."""
    first = ids.new_zeros(ids.shape[:-1])
    keep = rows_of(first, mask, row_index)
    z = logits_of(hidden, weight, keep, bias, softcap, extra, logit_scale, vocab_size)
    if isinstance(temperature, Tensor):
        temperature = torch.where(keep, compute(temperature), 1.0)[..., None].to(z.dtype)
    z = z / temperature
    entropy = token_logprobs(z, first, mask=keep).entropy

    absent = ids == ABSENT
    legal = (ids >= 0) & (ids < z.shape[-1])
    at = torch.where(legal, ids, 0).long()
    logprobs = z.log_softmax(-1).gather(-1, at)
    # As in `token_logprobs`: no gradient through an id of probability 0 by its own logit.
    impossible = z.gather(-1, at).isneginf() & ~logprobs.isnan()
    logprobs = torch.where(impossible, logprobs.detach(), logprobs)

    wrong = keep & (~legal & ~absent).any(-1)
    poison = torch.where(wrong, float("nan"), 1.0).to(z.dtype)
    read = keep[..., None] & ~absent
    return TokenLogProbs(
        torch.where(read, logprobs * poison[..., None], torch.zeros_like(logprobs)),
        torch.where(keep, entropy * poison, torch.zeros_like(entropy)),
    )
