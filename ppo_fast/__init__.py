"""Fused kernels for PPO fine-tuning of large language models, behind a thin PyTorch API.

Every op is one call with one result tuple, on CPU (C++) and CUDA (Triton) tensors, defined by
the pure-PyTorch functions of `ppo_fast.reference`. Importing this module loads torch alone.
"""

from ppo_fast import surrogates
from ppo_fast._backend import BackendUnavailableError, backends, use_backend
from ppo_fast._results import (
    Advantages,
    DivergenceLoss,
    HeadLoss,
    Loss,
    Moments,
    RLHFAdvantages,
    RolloutStats,
    RolloutWeights,
    Stats,
    TokenAdvantages,
    TokenDivergence,
    TokenLogProbs,
    TokenStats,
    TopKDivergence,
)
from ppo_fast.corrections import Correction
from ppo_fast.ops.divergence import divergence
from ppo_fast.ops.few_rows_linear import few_rows_linear
from ppo_fast.ops.gae import gae
from ppo_fast.ops.group_advantages import group_advantages, prompt_weights
from ppo_fast.ops.linear_divergence import linear_divergence, linear_token_divergence
from ppo_fast.ops.linear_logprobs import linear_token_logprobs
from ppo_fast.ops.linear_logprobs_at import linear_logprobs_at
from ppo_fast.ops.linear_ppo_loss import linear_ppo_loss
from ppo_fast.ops.linear_token_stats import linear_token_stats
from ppo_fast.ops.logits_ppo_loss import logits_ppo_loss
from ppo_fast.ops.logprobs import token_logprobs
from ppo_fast.ops.optimal_token_baseline import optimal_token_baseline
from ppo_fast.ops.ppo_loss import ppo_loss
from ppo_fast.ops.rlhf_advantages import rlhf_advantages
from ppo_fast.ops.rollout_weights import off_policy_mask, rollout_weights
from ppo_fast.ops.topk_divergence import topk_divergence
from ppo_fast.ops.value_loss import value_loss
from ppo_fast.ops.whiten import whiten
from ppo_fast.support import Support
from ppo_fast.surrogates import Surrogate, TokenTerms
from ppo_fast.teacher import Teacher

__version__ = "0.1.0"

__all__ = [
    "Advantages",
    "BackendUnavailableError",
    "Correction",
    "DivergenceLoss",
    "HeadLoss",
    "Loss",
    "Moments",
    "RLHFAdvantages",
    "RolloutStats",
    "RolloutWeights",
    "Stats",
    "Support",
    "Surrogate",
    "Teacher",
    "TokenAdvantages",
    "TokenDivergence",
    "TokenLogProbs",
    "TokenStats",
    "TokenTerms",
    "TopKDivergence",
    "backends",
    "divergence",
    "few_rows_linear",
    "gae",
    "group_advantages",
    "linear_divergence",
    "linear_logprobs_at",
    "linear_ppo_loss",
    "linear_token_divergence",
    "linear_token_logprobs",
    "linear_token_stats",
    "logits_ppo_loss",
    "off_policy_mask",
    "optimal_token_baseline",
    "ppo_loss",
    "prompt_weights",
    "rlhf_advantages",
    "rollout_weights",
    "surrogates",
    "token_logprobs",
    "topk_divergence",
    "use_backend",
    "value_loss",
    "whiten",
]
