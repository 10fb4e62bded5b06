"""Coefficients that change over a run: the learning rate's schedule and adaptive KL weights."""

from __future__ import annotations

import math

from ppo_fast.loop.config import TrainConfig


def lr_share(config: TrainConfig, updates: int) -> float:
    """The share of the learning rate that an update has after `updates` others.

    It rises evenly over `warmup` updates, and then stays ("constant") or falls towards `lr_end`,
    where it would be after the last update: evenly ("linear") or by half a cosine (Loshchilov and
    Hutter 2017, SGDR, eq. 5).
    """
    if updates < config.warmup:
        return (updates + 1) / config.warmup
    done = (updates - config.warmup) / max(1, config.updates - config.warmup)
    if config.lr_schedule == "linear":
        left = 1.0 - done
    elif config.lr_schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        left = 1.0
    return config.lr_end + (1.0 - config.lr_end) * left


def adapt_reward_kl(coef: float, kl: float, target: float, n: int, horizon: float) -> float:
    """The next coefficient of the KL in the reward, after `n` sequences of mean KL `kl` (nats).

    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2: it
    grows by the factor 1 + clip(kl / target - 1, ±0.2) * n / horizon.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * n / horizon)


def adapt_penalty(coef: float, kl: float, target: float) -> float:
    """The next coefficient of KL(old, new) in `variant="penalty"`, `kl` in nats per token.

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", section 4: halved when the
    KL that an update ended with is below target / 1.5, doubled when above target * 1.5.
    """
    if kl < target / 1.5:
        return coef / 2.0
    return coef * 2.0 if kl > target * 1.5 else coef
