"""The magnitudes whose roundings reach each output, per op, from the fp64 call and its result.

Each function returns output -> (roundings, condition, needs_eager) for `budget.py`; `eps` is that
of the precision computed in, beside which sums kept in fp64 round by EPS64 / eps. Written from
the formulas of docs and reference, one rounding per operation: a difference a − b rounds by
|a − b|, exp(d) by (4 + |d|)·exp(d) because d is rounded already, a sum of n terms by √n of its
absolute sum (Higham & Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis").
"""

from __future__ import annotations

from collections.abc import Callable

from ppo_fast.testing.advantage_conditions import gae_condition, rlhf_condition, whiten_condition
from ppo_fast.testing.divergence_conditions import logits_divergence_condition
from ppo_fast.testing.head_conditions import (
    head_loss_condition,
    linear_divergence_condition,
    linear_logprobs_at_condition,
    linear_logprobs_condition,
    linear_token_stats_condition,
)
from ppo_fast.testing.loss_conditions import (
    Conditions,
    logprobs_condition,
    ppo_condition,
    value_condition,
)
from ppo_fast.testing.rollout_conditions import rollout_condition

__all__ = ["CONDITIONS", "Conditions"]

CONDITIONS: dict[str, Callable[..., Conditions]] = {
    "token_logprobs": logprobs_condition,
    "ppo_loss": ppo_condition,
    "value_loss": value_condition,
    "gae": gae_condition,
    "rlhf_advantages": rlhf_condition,
    "whiten": whiten_condition,
    "linear_token_logprobs": linear_logprobs_condition,
    "linear_logprobs_at": linear_logprobs_at_condition,
    "linear_token_stats": linear_token_stats_condition,
    "logits_ppo_loss": head_loss_condition,
    "linear_ppo_loss": head_loss_condition,
    "divergence": logits_divergence_condition,
    "linear_token_divergence": linear_divergence_condition,
    "linear_divergence": linear_divergence_condition,
    "rollout_weights": rollout_condition,
}
