"""What an update learns from, and the weights that correct for who sampled it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.loop.data.sequences import Rollout, Scores


class Experience(NamedTuple):
    """One update's samples: prompts and completions as texts and as tokens, and their rewards.

    `token_rewards` (B, R) takes the place of the scores where every token has a reward of its own.
    """

    prompts: list[str]
    texts: list[str]
    rollout: Rollout
    scores: Scores
    token_rewards: Tensor | None = None


class Importance(NamedTuple):
    """Truncated weights (B, R), 1 outside the mask, and what a log says of them."""

    weights: Tensor
    statistics: dict[str, float]


@torch.no_grad()
def importance(old: Tensor, behaviour: Tensor, mask: Tensor, cap: float) -> Importance:
    """min(exp(old − behaviour), cap) per token: how much likelier the trainer finds a token.

    `old` and `behaviour` (B, R) are log-probabilities of the trainer's policy before the update
    and of the policy that sampled. The weight multiplies the policy term only, beside the ratio
    that PPO clips, so that this ratio stays 1 at the start (decoupled objective, Hilton et al.
    2022). Truncation bounds the variance for a bias (Ionides 2008; Espeholt et al. 2018,
    section 4.1).

    The statistics, over the unmasked tokens: `is_mean` of the truncated weights, `is_max` of the
    weights before, `is_truncated` (share above the cap), `is_ess` (effective sample size
    (Σw)²/Σw² of the truncated weights as a share of the tokens; Kong 1992).
    """
    raw = torch.where(mask, old - behaviour, torch.zeros_like(old)).exp()
    weights = raw.clamp(max=cap)
    kept, before = weights[mask].double(), raw[mask]
    statistics = {
        "is_mean": float(kept.mean()),
        "is_max": float(before.max()),
        "is_truncated": float((before > cap).double().mean()),
        "is_ess": float(kept.sum() ** 2 / (kept.square().sum() * len(kept))),
    }
    return Importance(weights, statistics)
