"""The ops in plain PyTorch, written as trainers write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What a trainer logs, in the order of each loss's second result.
PPO_STATS = (
    "loss",
    "policy_loss",
    "entropy",
    "ref_kl",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "ess",
    "clip_frac",
    "clip_frac_low",
    "clip_frac_high",
    "clip_frac_eps",
    "n_tokens",
    "n_seqs",
)
VALUE_STATS = ("value_loss", "vf_clip_frac", "explained_variance", "n_tokens")
ROLLOUT_STATS = (
    "weight_mean",
    "weight_min",
    "weight_max",
    "ess",
    "frac_high",
    "rejected_frac",
    "seq_rejected_frac",
    "kl",
    "k3_kl",
    "chi2_token",
    "chi2_seq",
    "ppl",
    "rollout_ppl",
    "ppl_ratio",
    "log_ppl_diff",
)


def token_logprobs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's `selective_log_softmax_and_entropy` before it had kernels."""
    logp = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    logprobs = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logprobs, entropy


def linear_token_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The logits materialised first."""
    return token_logprobs(F.linear(hidden, weight), tokens)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor,
    ref_logprobs: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    entropy_coef: float,
    kl_coef: float,
    kl_clamp: float,
) -> tuple[Tensor, Tensor]:
    """The loss of verl's actor update with a k3 term, and `PPO_STATS` without a sync."""
    keep = mask.to(logprobs.dtype)
    n = keep.sum()

    def mean(x: Tensor) -> Tensor:
        return (x * keep).sum() / n

    d = (logprobs - old_logprobs).clamp(-20.0, 20.0)
    ratio = d.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    policy_loss = mean(torch.maximum(plain, clipped))
    x = logprobs - ref_logprobs
    ref_kl = mean((torch.expm1(-x) + x).clamp(-kl_clamp, kl_clamp))
    entropy_mean = mean(entropy)
    loss = policy_loss + kl_coef * ref_kl - entropy_coef * entropy_mean
    with torch.no_grad():
        active = (clipped > plain) * keep
        below, above = (ratio < 1 - clip_low).to(keep), (ratio > 1 + clip_high).to(keep)
        low, high = (active * below).sum() / n, (active * above).sum() / n
        stats = (
            loss,
            policy_loss,
            entropy_mean,
            ref_kl,
            mean(-d),
            mean(0.5 * d * d),
            mean(torch.expm1(d) - d),
            mean(ratio),
            ratio.masked_fill(~mask, torch.inf).amin(),
            ratio.masked_fill(~mask, -torch.inf).amax(),
            (ratio * keep).sum() ** 2 / (n * (ratio * ratio * keep).sum()),
            low + high,
            low,
            high,
            mean(below + above),
            n,
            mask.any(-1).sum().to(n),
        )
        return loss, torch.stack(stats)


def logits_ppo_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor,
    **options: float,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the logits, then their loss."""
    logprobs, entropy = token_logprobs(logits, tokens)
    return ppo_loss(logprobs, old_logprobs, advantages, mask, entropy, ref_logprobs, **options)


def linear_ppo_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, row_index: Tensor | None = None, **rest: Any
) -> tuple[Tensor, Tensor]:
    """The logits materialised first, those of the chosen rows alone."""
    if row_index is not None:
        hidden, tokens = hidden[row_index], tokens[row_index]
        rest = {k: x[row_index] if isinstance(x, Tensor) else x for k, x in rest.items()}
    return logits_ppo_loss(F.linear(hidden, weight), tokens, **rest)


def linear_token_stats(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """Six statistics of the materialised logits."""
    z = F.linear(hidden, weight).float()
    logp = F.log_softmax(z, dim=-1)
    return (
        logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1),
        -(logp.exp() * logp).sum(-1),
        z.logsumexp(-1),
        (2 * logp).logsumexp(-1),
        z.argmax(-1) == tokens,
        z.mean(-1),
    )


def masked_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The logits materialised, -inf outside of the kept ids (N, K)."""
    logits = F.linear(hidden, weight)
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    logp = F.log_softmax(logits.masked_fill(~keep, -torch.inf), dim=-1, dtype=torch.float32)
    logprobs = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp.masked_fill(~keep, 0.0)).sum(-1)  # 0 times -inf is NaN
    return logprobs, entropy


def gathered_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The kept rows of the head copied for every token, (N, K, H), and multiplied."""
    logits = torch.einsum("nh,nkh->nk", hidden, F.embedding(ids, weight))
    return token_logprobs(logits, (ids == tokens[:, None]).int().argmax(1))


def of_support(
    head: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    ids: Tensor,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """The loss of the log-probabilities and entropies over a support, as `head` forms them."""
    logprobs, entropy = head(hidden, weight, tokens, ids)
    return ppo_loss(logprobs, entropy=entropy, **rest)


def divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    kind: str,
    beta: float,
    coef: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean divergence, each row's, and its entropy, which is logged."""
    logp, logq = (F.log_softmax(x, dim=-1, dtype=torch.float32) for x in (logits, teacher_logits))
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    rows = divergences(logp, logq, kind, beta)
    keep = mask.to(rows.dtype)
    return coef * (rows * keep).sum() / keep.sum(), rows, entropy


def divergences(logp: Tensor, logq: Tensor, kind: str, beta: float) -> Tensor:
    """Those of rows of log-probabilities, as TRL's `generalized_jsd_loss` has them."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q, p, reduction="none", log_target=True)

    if kind == "reverse":
        return kl(logp, logq).sum(-1)
    if kind == "forward":
        return kl(logq, logp).sum(-1)
    mixture = torch.logaddexp(logp + math.log1p(-beta), logq + math.log(beta))
    return (beta * kl(logq, mixture) + (1 - beta) * kl(logp, mixture)).sum(-1)


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of both materialised first."""
    logits, teacher_logits = F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight)
    return divergence(logits, teacher_logits, mask, **options)


def linear_token_divergence(**named: Any) -> tuple[Tensor, ...]:
    """The same without its mean."""
    return linear_divergence(**named)[1:]


def linear_ppo_loss_with_teacher(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor,
    *,
    kind: str,
    beta: float,
    coef: float,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """The policy's loss and the mean divergence from one softmax of the materialised logits."""
    logp = F.log_softmax(F.linear(hidden, weight), dim=-1, dtype=torch.float32)
    logq = F.log_softmax(F.linear(teacher_hidden, teacher_weight), dim=-1, dtype=torch.float32)
    logprobs = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    loss, stats = ppo_loss(logprobs, entropy=entropy, mask=mask, **rest)
    keep = mask.to(loss.dtype)
    loss = loss + coef * (divergences(logp, logq, kind, beta) * keep).sum() / keep.sum()
    return loss, torch.cat([loss.detach()[None], stats[1:]])


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped value loss of TRL and verl, and `VALUE_STATS`."""
    keep = mask.to(values.dtype)
    n = keep.sum()
    bounded = torch.clamp(values, old_values - clip, old_values + clip)
    plain, clipped = (values - returns) ** 2, (bounded - returns) ** 2
    loss = 0.5 * (torch.maximum(plain, clipped) * keep).sum() / n
    with torch.no_grad():
        error = returns - old_values

        def variance(x: Tensor) -> Tensor:
            mean = (x * keep).sum() / n
            return ((x - mean) ** 2 * keep).sum() / n

        clip_frac = ((clipped > plain) * keep).sum() / n
        explained = 1 - variance(error) / variance(returns)
        return loss, torch.stack((loss, clip_frac, explained, n))


def gae_loop(
    rewards: Tensor, values: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The per-token loop of TRL, OpenRLHF and verl: advantages and returns."""
    length = rewards.shape[1]
    last = torch.zeros_like(rewards[:, 0])
    reversed_advantages = []
    for t in reversed(range(length)):
        next_values = values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        last = delta + gamma * lam * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


def rlhf_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards and KL of right-padded responses, as verl forms them."""
    keep = mask.to(values.dtype)
    kl = (logprobs - ref_logprobs) * keep
    rewards = -kl_coef * kl
    last = mask.sum(-1, keepdim=True) - 1
    rewards = rewards.scatter_add(1, last, scores[:, None])
    advantages, returns = gae_loop(rewards, values * keep, gamma=gamma, lam=lam)
    return advantages * keep, returns * keep, rewards, kl


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over the mask, unbiased, 1e-8 added to the variance."""
    keep = mask.to(x.dtype)
    n = keep.sum()
    mean = (x * keep).sum() / n
    variance = ((x - mean) ** 2 * keep).sum() / (n - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * keep


def rollout_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    high: float,
    reject: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated token weights, the mask after the rejections, and `ROLLOUT_STATS`, as verl."""
    keep = mask.to(old_logprobs.dtype)
    n, lengths = keep.sum(), keep.sum(-1).clamp(min=1)
    log_ratio = old_logprobs - rollout_logprobs
    x = log_ratio.clamp(-20.0, 20.0)
    ratio = x.exp()
    weights = ratio.clamp(max=high) * keep
    values = {"ratio": x, "k1": -x, "k2": 0.5 * x * x, "k3": torch.expm1(x) - x}
    kept = mask
    for key, bound in reject.items():
        where, _, what = key.rpartition("-")
        held = _held(_folded(where, values[what], mask, keep, lengths), bound)
        kept = kept & (held if where == "token" else held[:, None])

    def mean(v: Tensor) -> Tensor:
        return (v * keep).sum() / n

    means = [-(v * keep).sum(-1) / lengths for v in (old_logprobs, rollout_logprobs)]
    sums = (log_ratio * keep).sum(-1).clamp(-20.0, 20.0)
    stats = (
        weights.sum() / n,
        weights.masked_fill(~mask, torch.inf).amin(),
        weights.masked_fill(~mask, -torch.inf).amax(),
        weights.sum() ** 2 / (n * (weights * weights).sum()),
        mean((ratio > high).to(keep)),
        (mask & ~kept).sum() / n,
        (mask & ~kept).any(-1).to(keep).mean(),
        mean(-log_ratio),
        mean(values["k3"]),
        mean(ratio * ratio) - 1,
        torch.exp(2 * sums).mean() - 1,
        means[0].exp().mean(),
        means[1].exp().mean(),
        (means[0] - means[1]).exp().mean(),
        (means[0] - means[1]).mean(),
    )
    return weights, kept, torch.stack(stats)


def _folded(where: str, v: Tensor, mask: Tensor, keep: Tensor, lengths: Tensor) -> Tensor:
    """A statistic's values of tokens, or of sequences."""
    if where == "seq-min":
        return v.masked_fill(~mask, torch.inf).amin(-1)
    if where == "seq-max":
        return v.masked_fill(~mask, -torch.inf).amax(-1)
    if where == "token":
        return v
    total = (v * keep).sum(-1)
    return total if where == "seq-sum" else total / lengths


def _held(v: Tensor, bound: Any) -> Tensor:
    """Values within (low, high), bounds of e^v, or below one number."""
    if isinstance(bound, tuple):
        return (v >= math.log(bound[0])) & (v <= math.log(bound[1]))
    return v <= bound
