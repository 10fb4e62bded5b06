"""A toy trainer in plain PyTorch: the losses of the papers, as one writes them."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    entropies: Tensor,
    mask: Tensor,
    tokens: int,
    ranks: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    entropy_coef: float,
) -> Tensor:
    """PPO with dual clip, k3 and an entropy bonus, over all tokens of the step."""
    old, ref, a, h = (
        torch.where(mask, x, 0.0) for x in (old_logprobs, ref_logprobs, advantages, entropies)
    )
    ratio = torch.exp(torch.where(mask, logprobs - old, 0.0))
    clipped = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-a * ratio, -a * clipped)
    loss = torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)
    gap = torch.where(mask, ref - logprobs, 0.0)
    loss = loss + kl_coef * (torch.exp(gap) - 1 - gap)
    loss = loss - entropy_coef * h
    return torch.where(mask, loss, 0.0).sum() / tokens * ranks


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    tokens: int,
    ranks: int,
    value_clip: float,
) -> Tensor:
    old, target = torch.where(mask, old_values, 0.0), torch.where(mask, returns, 0.0)
    near = old + torch.clamp(values - old, -value_clip, value_clip)
    error = torch.maximum((values - target) ** 2, (near - target) ** 2)
    return 0.5 * torch.where(mask, error, 0.0).sum() / tokens * ranks


def kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    gap = ref_logprobs - logprobs
    return torch.exp(gap) - 1 - gap


def logprobs(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    scores = torch.log_softmax(logits / temperature, -1)
    return scores.gather(-1, labels[:, None])[:, 0]


def entropy(logits: Tensor, temperature: float) -> Tensor:
    scores = torch.log_softmax(logits / temperature, -1)
    scores = torch.where(logits > -torch.inf, scores, 0.0)
    return -torch.where(logits > -torch.inf, scores.exp() * scores, 0.0).sum(-1)


def whiten(rewards: Tensor, mask: Tensor, eps: float) -> Tensor:
    kept = rewards[mask]
    variance = kept.var(unbiased=True)
    return (rewards - kept.mean()) * torch.rsqrt(variance + eps)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    following, advantage = torch.zeros(len(mask)), torch.zeros(len(mask))
    found = []
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        keep = mask[:, t]
        advantage = torch.where(keep, delta + gamma * lam * advantage, advantage)
        following = torch.where(keep, values[:, t], following)
        found.append(advantage)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + values


def step_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    advantage, found = torch.zeros(rewards.shape[1]), []
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_values[t] * ~terminated[t] - values[t]
        advantage = delta + gamma * lam * ~(terminated[t] | truncated[t]) * advantage
        found.append(advantage)
    advantages = torch.stack(found[::-1])
    return advantages, advantages + values


def group_advantages(scores: Tensor, groups: Tensor, eps: float) -> Tensor:
    out = torch.zeros_like(scores)
    for group in groups.unique():
        own = groups == group
        out[own] = (scores[own] - scores[own].mean()) / (scores[own].std() + eps)
    return out
