"""Reference of every op in pure PyTorch: short, differentiable by autograd, exact in fp64.

A kernel that disagrees with these functions is wrong. They take what `ops/` has checked and
return the public result tuples; they favour clarity over memory and speed.
"""

from ppo_fast.reference.divergence import divergence
from ppo_fast.reference.few_rows_linear import few_rows_linear
from ppo_fast.reference.gae import gae
from ppo_fast.reference.linear_divergence import linear_divergence, linear_token_divergence
from ppo_fast.reference.linear_logprobs import linear_token_logprobs
from ppo_fast.reference.linear_logprobs_at import linear_logprobs_at
from ppo_fast.reference.linear_ppo_loss import linear_ppo_loss
from ppo_fast.reference.linear_token_stats import linear_token_stats
from ppo_fast.reference.logits_ppo_loss import logits_ppo_loss
from ppo_fast.reference.logprobs import token_logprobs
from ppo_fast.reference.ppo_loss import ppo_loss
from ppo_fast.reference.rlhf_advantages import rlhf_advantages
from ppo_fast.reference.rollout_weights import rollout_weights
from ppo_fast.reference.value_loss import value_loss
from ppo_fast.reference.whiten import moments, whiten

__all__ = [
    "divergence",
    "few_rows_linear",
    "gae",
    "linear_divergence",
    "linear_logprobs_at",
    "linear_ppo_loss",
    "linear_token_divergence",
    "linear_token_logprobs",
    "linear_token_stats",
    "logits_ppo_loss",
    "moments",
    "ppo_loss",
    "rlhf_advantages",
    "rollout_weights",
    "token_logprobs",
    "value_loss",
    "whiten",
]
