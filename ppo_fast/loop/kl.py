"""How the two KL coefficients follow the KL they are meant to hold."""

from __future__ import annotations


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
