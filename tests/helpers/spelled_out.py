"""Independent spelling of the ops, in scalar Python floats and from other sources.

No code is shared with ppo_fast.reference, so an error in the reference shows as a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Row = Sequence[float]


def log_softmax(logits: Row) -> list[float]:
    top = max(logits)
    log_sum = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - log_sum for z in logits]


def gae_row(
    rewards: Row,
    values: Row,
    gamma: float,
    lam: float,
    *,
    mask: Sequence[int] | None = None,
    masked: str = "carry",
    last: float = 0.0,
    following: Row | None = None,
    terminated: Sequence[int] | None = None,
    truncated: Sequence[int] | None = None,
    rho: Row | None = None,
    c: Row | None = None,
) -> tuple[list[float], list[float]]:
    """A_t as the explicit sum Σ_k (Π γλc) δ_{t+k}, not as a recursion.

    "carry": the row is first shortened to its unmasked steps. "zero": masked steps get r = V = 0.
    """
    n = len(rewards)
    keep = [True] * n if mask is None else [bool(m) for m in mask]
    steps = [t for t in range(n) if keep[t] or masked == "zero"]
    r = [rewards[t] if keep[t] else 0.0 for t in steps]
    v = [values[t] if keep[t] else 0.0 for t in steps]
    term = [bool(terminated[t]) and keep[t] if terminated else False for t in steps]
    done = [
        d or (bool(truncated[t]) and keep[t] if truncated else False)
        for d, t in zip(term, steps, strict=True)
    ]
    weight = [rho[t] if rho and keep[t] else 1.0 for t in steps]
    trace = [c[t] if c and keep[t] else 1.0 for t in steps]
    after = (
        [*v[1:], last] if following is None else [following[t] if keep[t] else 0.0 for t in steps]
    )
    delta = [
        weight[i] * (r[i] + (0.0 if term[i] else gamma * after[i]) - v[i])
        for i in range(len(steps))
    ]
    advantages, returns = [0.0] * n, [0.0] * n
    for i, t in enumerate(steps):
        total, factor = 0.0, 1.0
        for k in range(i, len(steps)):
            total += factor * delta[k]
            if done[k]:
                break
            factor *= gamma * lam * trace[k]
        if keep[t]:
            advantages[t], returns[t] = total, total + v[i]
    return advantages, returns


def gae_recursion(rewards: Row, values: Row, gamma: float, lam: float, last: float) -> list[float]:
    """The textbook loop, for rows too long for the sum."""
    out, following, advantage = [], last, 0.0
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        advantage = r + gamma * following - v + gamma * lam * advantage
        following = v
        out.append(advantage)
    return out[::-1]


def kl(x: float, estimator: str, clamp: float | None) -> float:
    value = {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x, "abs": abs(x)}[estimator]
    return value if clamp is None else min(max(value, -clamp), clamp)


def policy_term(
    variant: str, new: float, ratio: float, adv: float, low: float, high: float
) -> float:
    """The surrogate as its paper writes it, to be minimised."""
    clipped = min(max(ratio, 1 - low), 1 + high)
    if variant in ("clip", "gspo"):
        return -min(ratio * adv, clipped * adv)
    if variant == "cispo":
        return -clipped * adv * new
    return -ratio * adv


def ppo_rows(
    new: torch.Tensor,
    old: torch.Tensor,
    adv: torch.Tensor,
    mask: torch.Tensor,
    variant: str,
    reduction: str,
    low: float,
    high: float,
) -> float:
    """The loss of (B, T) inputs by two loops over tokens."""
    rows = []
    for b in range(new.shape[0]):
        steps = [t for t in range(new.shape[1]) if mask[b, t]]
        if not steps:
            continue
        gaps = [float(new[b, t] - old[b, t]) for t in steps]
        ratios = [math.exp(d) for d in gaps]
        if variant == "gspo":
            ratios = [math.exp(math.fsum(gaps) / len(gaps))] * len(gaps)
        rows.append(
            [
                policy_term(variant, float(new[b, t]), ratio, float(adv[b, t]), low, high)
                for t, ratio in zip(steps, ratios, strict=True)
            ]
        )
    tokens = [term for row in rows for term in row]
    if reduction == "token-sum":
        return math.fsum(tokens)
    if reduction == "token-mean":
        return math.fsum(tokens) / len(tokens)
    if reduction == "seq-mean-token-mean":
        return math.fsum(math.fsum(row) / len(row) for row in rows) / len(rows)
    total = math.fsum(tokens) / len(rows)
    return total / new.shape[1] if reduction == "seq-mean-token-sum-norm" else total


def value_token(value: float, old: float, target: float, clip: float | None, form: str) -> float:
    """Half the squared error, as OpenAI Baselines (max) and SB3 (clipped) write it."""
    plain = (value - target) ** 2
    if clip is None:
        return plain / 2
    near = old + min(max(value - old, -clip), clip)
    clipped = (near - target) ** 2
    return (max(plain, clipped) if form == "max" else clipped) / 2
