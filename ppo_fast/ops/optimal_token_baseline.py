"""`optimal_token_baseline`: advantages over the baseline of least variance, a step at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast import _checks
from ppo_fast._boundary.schema import compute_dtype
from ppo_fast._results import TokenAdvantages
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.group_advantages import Groups

_OP = "optimal_token_baseline"
_EPS = 1e-8  # verl's, beside ΣW


@derivatives()
def optimal_token_baseline(
    rewards: Tensor,
    logprobs: Tensor,
    log_sum_sq_probs: Tensor,
    group_ids: Tensor,
    mask: Tensor | None = None,
    *,
    is_weights: Tensor | None = None,
) -> TokenAdvantages:
    """A_t = G_t − B_t, B_t the baseline of least variance of a prompt's responses at step t.

    G_t is the sum of the rewards from step t on, w_t = 1 − 2π_t + Σπ² the squared norm of the
    log-probability's gradient by the logits, W_t = w_1 + … + w_t, and over a group
    B_t = ΣG_t W_t / (ΣW_t + 1e-8), verl's `compute_optimal_token_baseline_advantage`
    (verl/trainer/ppo/core_algos.py). Where no other response of the group has a token at step t,
    B_t is 0: a lone response, and the end of the longest one. w_t is formed as
    (1 − π_t)² + (Σπ² − π_t²), neither part below 0, so that a certain token weighs nothing.

    Args:
        rewards: `(B, T)` fp32, bf16, fp16 or fp64, of every token.
        logprobs: `(B, T)`, of the tokens under the policy that is trained (verl: old).
        log_sum_sq_probs: `(B, T)`, ln Σπ² of the same distributions: `linear_token_stats` has it.
        group_ids: `(B,)` int32 or int64, equal where the prompt is; in any order.
        mask: `(B, T)` of any real dtype, non-zero keeps; masked steps count for nothing.
        is_weights: `(B, T)` or `(B, 1)`, importance weights, whose squares scale w.

    Returns:
        `TokenAdvantages(advantages, returns)`, `(B, T)` fp32 (fp64 for fp64 rewards), detached,
        computed in fp64 without asking the device; 0 where masked.

    Raises:
        ValueError: shape or device. TypeError: dtype.
        NotImplementedError: a forward-mode tangent, as the op has no derivative.
    """
    keep = _check(rewards, logprobs, log_sum_sq_probs, group_ids, mask, is_weights)
    returns = _kept(keep, rewards).flip(-1).cumsum(-1).flip(-1)
    chosen = _kept(keep, logprobs)
    others = (_kept(keep, log_sum_sq_probs).exp() - (2 * chosen).exp()).clamp(min=0)
    w = torch.expm1(chosen).square() + others
    if is_weights is not None:
        w = w * _kept(keep, is_weights.expand(rewards.shape)).square()
    energy = _kept(keep, _kept(keep, w).cumsum(-1))
    groups = Groups(group_ids)
    baseline = groups.sum(_kept(keep, returns) * energy) / (groups.sum(energy) + _EPS)
    compared = groups.sum(keep.double()) > 1
    advantages = returns - torch.where(compared, baseline, torch.zeros_like(baseline))
    dtype = compute_dtype(rewards)
    return TokenAdvantages(*(_kept(keep, x).to(dtype) for x in (advantages, returns)))


def _kept(keep: Tensor, x: Tensor) -> Tensor:
    """x in fp64, 0 where masked."""
    return torch.where(keep, x.detach().double(), 0.0)


def _check(
    rewards: Tensor, logprobs: Any, log_sum_sq_probs: Any, group_ids: Any, mask: Any, weights: Any
) -> Tensor:
    """The bool mask, or ValueError or TypeError."""
    if _checks.floating(_OP, "rewards", rewards).dim() != 2:
        raise ValueError(f"{_OP}: rewards must have shape (B, T), got {tuple(rewards.shape)}")
    _checks.alike(_OP, rewards, logprobs=logprobs, log_sum_sq_probs=log_sum_sq_probs)
    for name, x in (("logprobs", logprobs), ("log_sum_sq_probs", log_sum_sq_probs)):
        _checks.tensor(_OP, name, x)
    rows, device = rewards.shape[:1], rewards.device
    _checks.indices(_OP, "group_ids", group_ids, rows, device)
    mask = _checks.flags(_OP, "mask", mask, rewards.shape, device)
    if weights is not None:
        if _checks.floating(_OP, "is_weights", weights).shape == (*rows, 1):
            _checks.sized(_OP, "is_weights", weights, rewards, (*rows, 1), "(B, 1)")
        else:
            _checks.alike(_OP, rewards, is_weights=weights)
    if mask is None:
        return torch.ones(rewards.shape, dtype=torch.bool, device=device)
    return mask != 0
