"""KL-shaped rewards, score placement and GAE, as every RLHF trainer does them."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast._results import RLHFAdvantages
from ppo_fast._sequences import Sequences
from ppo_fast.reference.common import keep_of, kl_terms, select
from ppo_fast.reference.gae import gae
from ppo_fast.reference.whiten import moments as moments_of


@torch.no_grad()
def rlhf_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float | Tensor,
    kl_estimator: str = "k1",
    kl_clamp: float | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    score_at: str = "last-token",
    masked: str = "carry",
    bootstrap: Tensor | None = None,
    reward_clip: tuple[float, float] | None = None,
    cu_seqlens: Tensor | None = None,
) -> RLHFAdvantages:
    """r_t = −kl_coef·kl_t + [t is the score's slot]·score, then GAE (Ziegler et al. 2019)."""
    keep = keep_of(logprobs, mask)
    x = select(keep, logprobs.detach()) - select(keep, ref_logprobs.detach())
    kl = select(keep, kl_terms(x, kl_estimator.rstrip("+"), kl_clamp))
    if isinstance(kl_coef, Tensor):
        kl_coef = kl_coef.to(kl.dtype)
    scores = select(torch.ones_like(scores, dtype=torch.bool), scores.detach())
    if reward_clip is not None:
        scores = scores.clamp(*reward_clip)
    if score_at == "per-token":
        slot, score = keep, scores
    else:
        slot, score = _score_slots(keep, scores, cu_seqlens, score_at)
    live = keep | slot
    rewards = select(keep, -kl_coef * kl) + select(slot, score)
    adv, returns, _ = gae(
        rewards,
        values,
        gamma=gamma,
        lam=lam,
        mask=live,
        masked=masked,
        bootstrap=bootstrap,
        cu_seqlens=cu_seqlens,
    )
    adv = select(keep, adv)
    return RLHFAdvantages(adv, returns, rewards, kl, moments_of(adv, keep))


def _score_slots(
    keep: Tensor, scores: Tensor, cu_seqlens: Tensor | None, score_at: str
) -> tuple[Tensor, Tensor]:
    """Slot of each sequence's score, and the score spread over the sequence's slots.

    "first-pad" is TRL's placement: one slot after the last kept one, if the sequence has it.
    """
    seqs = Sequences(keep, cu_seqlens)
    size = keep.shape[-1]
    position = torch.arange(size, device=keep.device).expand(keep.shape)
    last = seqs.max(position.double()).clamp(min=-1).long()
    if score_at == "first-pad":
        end = cu_seqlens[1:].long() if cu_seqlens is not None else torch.full_like(last, size)
        last = torch.where((last >= 0) & (last + 1 < end), last + 1, last)
    return position == seqs.spread(last), seqs.spread(scores)
