"""The magnitudes whose roundings reach advantages, rewards and what is whitened.

As `conditions.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppo_fast import reference
from ppo_fast.testing.calls import Call
from ppo_fast.testing.loss_conditions import EPS64, Conditions, finite, kl_term


def _moments(advantages: Tensor) -> Tensor:
    if not advantages.numel():
        return torch.zeros(3, dtype=torch.float64)
    spread = (advantages - advantages.mean()).square().sum()
    top = advantages.abs().amax()
    return torch.stack([torch.zeros_like(top), top, spread]) * (
        1 + math.sqrt(advantages.numel()) / 4
    )


def gae_condition(call: Call, exact: dict[str, Tensor], eps: float) -> Conditions:
    """The largest exact value beside twice the error of the sequential fp32 loop."""
    out: Conditions = {}
    for name in ("advantages", "returns"):
        x = finite(exact[name])
        out[name] = (4, x.abs().amax() if x.numel() else x.new_zeros(()), True)
    out["moments"] = (8, _moments(finite(exact["advantages"])), False)
    return out


def rlhf_condition(call: Call, exact: dict[str, Tensor], eps: float) -> Conditions:
    """As `gae`, after a reward that carries the KL estimate's condition."""
    t, o = call.tensors, call.options
    keep = t["mask"] != 0
    x = torch.where(keep, t["logprobs"] - t["ref_logprobs"], 0.0)
    kl = torch.where(keep, kl_term(x, o.get("kl_estimator", "k1"), o.get("kl_clamp"))[0], 0.0)
    rewards = kl * abs(float(o["kl_coef"])) * 2 + exact["rewards"].abs()
    out = gae_condition(call, exact, eps)
    # A reward's rounding reaches every earlier step: at most the sum of the row.
    reach = finite(rewards).sum()
    for name in ("advantages", "returns"):
        ops, condition, eager = out[name]
        out[name] = (ops, condition + reach, eager)
    return out | {"kl": (4, kl, False), "rewards": (4, rewards, False)}


def whiten_condition(call: Call, exact: dict[str, Tensor], eps: float) -> Conditions:
    """x − mean with the mean held in two fp32 numbers, scaled; the mean is added back if kept.

    The scale's own roundings are counted in `ops`.
    """
    o = call.options
    given = o.get("moments")
    moments = (given or reference.moments(call.tensors["x"], call.tensors.get("mask"))).values
    n, mean, m2 = moments.tolist()
    free = max(1.0, n - 1 if o.get("unbiased", True) else n)
    var, added = m2 / free, o.get("eps", 1e-8)
    root = math.sqrt(var + added) if o.get("eps_at", "var") == "var" else math.sqrt(var) + added
    scale = 1 / root if root else 0.0
    shift = 0.0 if o.get("shift_mean", True) else abs(mean)
    y = finite(exact["out"]).abs() + 2 * shift
    # The sums are fp64: their rounding moves the mean, and the mean's own split by 2^-24 of it.
    top = float(call.tensors["x"].abs().nan_to_num(0.0).max()) if n else 0.0
    drift = (1 + math.sqrt(n) / 4) * EPS64 / eps * scale * top
    return {"out": (6, y * (1 + drift) + drift + abs(mean) * scale * 2.0**-24, False)}
