"""The magnitudes whose roundings reach each output, per op, from the fp64 call and its result.

Each function returns output -> (roundings, condition, needs_eager) for `budget.py`; `eps` is that
of the precision computed in, beside which sums kept in fp64 round by EPS64 / eps. Written from
the formulas of docs and reference, one rounding per operation: a difference a − b rounds by
|a − b|, exp(d) by (4 + |d|)·exp(d) because d is rounded already, a sum of n terms by √n of its
absolute sum (Higham & Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_fast import reference
from ppo_fast._results import STATS_FIELDS
from ppo_fast.reference.common import Sequences, keep_of, whitening
from ppo_fast.testing.calls import Call

EPS64 = torch.finfo(torch.float64).eps
Conditions = dict[str, tuple[float, Tensor, bool]]


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def logprobs_condition(call: Call, exact: dict[str, Tensor], eps: float) -> Conditions:
    """κ_j: what rounds z_j and z_j − max; it reaches ln Σ weighted by p_j."""
    t = call.tensors
    number = torch.tensor(call.options.get("temperature", 1.0), device=t["logits"].device)
    heat = t.get("temperature", number).double()
    heat = heat.expand(t["tokens"].shape)[..., None]
    z = t["logits"] / heat
    vocab = z.shape[-1]
    top = z.amax(-1, keepdim=True)
    p, logp = z.softmax(-1), _finite(z.log_softmax(-1))
    z, gap = _finite(z), _finite(z - top)
    log_sum = (z.log_softmax(-1) - z)[..., :1].neg() - top
    # V additions and, online, about ln V changes of the maximum; in units of `ops`.
    adds = (math.sqrt(vocab) + 2 * math.log(vocab + 1)) / 8
    kappa = z.abs() + gap.abs() + 4
    total = (p * kappa).sum(-1, keepdim=True) + log_sum.abs() + adds
    label = t["tokens"].clamp(0, vocab - 1).long()[..., None]
    at = (kappa + logp.abs()).gather(-1, label)
    entropy = -(p * logp).sum(-1, keepdim=True)
    slope = (logp + entropy).abs()
    spread = (p * gap.abs()).sum(-1, keepdim=True)
    of_entropy = (p * slope * kappa).sum(-1, keepdim=True) + total + spread * (1 + adds)
    out: Conditions = {
        "logprobs": (8, (at + total)[..., 0], False),
        "entropy": (8, of_entropy[..., 0], False),
    }
    if "grad_logits" in exact:
        g, h = (call.cotangents[k].abs()[..., None] for k in ("logprobs", "entropy"))
        hit = torch.zeros_like(z).scatter(-1, label, 1.0)
        reach = kappa + total
        grad = g * (hit + p * reach) + h * p * (slope * reach + reach + of_entropy)
        out["grad_logits"] = (8, _finite(grad / heat), False)
    return out


def _kl(x: Tensor, estimator: str, clamp: float | None) -> tuple[Tensor, Tensor]:
    """Conditions of the KL term's value and derivative."""
    name = estimator.rstrip("+")
    grown = (-x).exp() * x.abs()
    bend = torch.expm1(-x).abs()
    value, slope, raw = {
        "k1": (x.abs(), torch.ones_like(x), x),
        "k2": (1.5 * x * x, x.abs(), x * x / 2),
        "k3": (4 * bend + grown + x.abs(), 4 * bend + grown, torch.expm1(-x) + x),
        "abs": (x.abs(), torch.ones_like(x), x),
    }[name]
    if clamp is not None:
        outside = raw.abs() > clamp
        value = torch.where(outside, clamp, value)
        slope = torch.where(outside, 0.0, slope)
    return value, x.abs() if estimator.endswith("+") else slope


def _policy(
    call: Call, d: Tensor, adv: Tensor, seqs: Sequences, relative: Tensor, ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """Conditions of the policy term and of its derivative."""
    t, o = call.tensors, call.options
    variant, kl = o.get("variant", "clip"), float(o.get("kl_coef", 0.0))
    bounded = ratio.clamp(1 - o.get("clip_low", 0.2), 1 + o.get("clip_high", 0.2))
    slope = adv.abs() * torch.maximum(ratio, bounded) * (relative + 8)
    if variant == "cispo":
        slope = adv.abs() * bounded * (relative + 8)
        return slope * seqs_value(t["logprobs"], seqs).abs(), slope
    if variant == "linear" and "ref_logprobs" in t:
        gap = (t["ref_logprobs"] - t.get("old_logprobs", t["logprobs"])).clamp(-20, 20)
        gap = seqs_value(gap, seqs)
        return slope * (1 + kl) + kl * adv.abs() * gap.exp() * (gap.abs() + 8), slope
    return slope + adv.abs() * (o.get("dual_clip") or 0.0), slope


def seqs_value(x: Tensor, seqs: Sequences) -> Tensor:
    """x where kept, 0 elsewhere."""
    return torch.where(seqs.keep, x, torch.zeros_like(x))


def ppo_condition(call: Call, exact: dict[str, Tensor], eps: float) -> Conditions:
    """Per-token magnitudes under the weights; sums add √n, the mean divides by the exact D."""
    t, o = call.tensors, call.options
    new = t["logprobs"]
    seqs = Sequences(keep_of(new, t.get("mask")), t.get("cu_seqlens"))
    d, ratio, relative = _ratio(call, seqs)
    adv = seqs_value(t["advantages"].expand_as(new), seqs)
    if "advantage_moments" in o:
        mean, rstd = whitening(o["advantage_moments"].values.to(adv.device))
        adv = seqs_value((adv - mean) * rstd, seqs)
    policy, slope = _policy(call, d, adv, seqs, relative, ratio)
    kept = seqs_value(t.get("is_weights", torch.ones_like(new)), seqs).abs()
    policy, slope = policy * kept, slope * kept
    kl, bent = _kl_of(call, d, seqs, ratio * relative)

    weight = seqs.keep.double()
    if o["reduction"] == "seq-mean-token-mean":
        weight = weight / seqs.spread(seqs.tokens.clamp(min=1))
    klc, entc = abs(float(o.get("kl_coef", 0.0))), abs(float(o.get("entropy_coef", 0.0)))
    bonus = seqs_value(t.get("entropy", torch.zeros_like(new)), seqs).abs()
    terms = policy + (0.0 if o.get("variant") == "linear" else klc) * kl + entc * bonus
    sums = {"loss": weight * terms, "policy_loss": weight * policy, "entropy": bonus, "ref_kl": kl}
    sums |= {"kl_k1": d.abs(), "kl_k2": 1.5 * d * d, "ratio": ratio * relative}
    sums |= {"kl_k3": d.exp() * (4 + d.abs()) + d.abs(), "ratio_sq": 2 * ratio**2 * relative}
    adds = 1 + math.sqrt(max(1, int(seqs.keep.sum()))) / 4
    stats = _stats(seqs.keep, sums, adds)
    top = seqs_value(ratio * relative, seqs).flatten()
    for name in ("ratio_min", "ratio_max"):
        stats[STATS_FIELDS.index(name)] = _finite(top).max() if top.numel() else 0.0
    divisor = _divisor(o, exact["stats"], "loss_denom")
    factor = weight * float(call.cotangents["loss"].abs()) / divisor if call.cotangents else weight
    return {
        "loss": (4, _finite(sums["loss"]).sum() * adds / divisor, False),
        "stats": (4, stats, False),
        "grad_logprobs": (4, seqs_value(factor * (slope + klc * bent), seqs), False),
        "grad_entropy": (4, factor * entc, False),
    }


def _ratio(call: Call, seqs: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """The clamped log-ratio, the variant's ratio, and the roundings of that ratio."""
    new, bounds = call.tensors["logprobs"], call.options.get("log_ratio_clamp", 20.0)
    if not isinstance(bounds, tuple):
        bounds = (-math.inf, math.inf) if bounds is None else (-bounds, bounds)
    d = seqs_value(new - call.tensors.get("old_logprobs", new), seqs).clamp(*bounds)
    if call.options.get("variant") != "gspo":
        return d, d.exp(), 4 + d.abs()
    n = seqs.tokens.clamp(min=1)
    mean = seqs.spread(seqs.sum(d) / n)
    return d, mean.exp(), 4 + seqs.spread((2 + n.sqrt() / 4) * seqs.sum(d.abs()) / n)


def _kl_of(call: Call, d: Tensor, seqs: Sequences, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Conditions of the call's KL term; zeros without one."""
    t, o = call.tensors, call.options
    estimator, clamp = o.get("kl_estimator", "k3"), o.get("kl_clamp", 10.0)
    if o.get("variant") == "penalty":
        kl, bent = _kl(-d, estimator, clamp)
    elif "ref_logprobs" in t:
        kl, bent = _kl(seqs_value(t["logprobs"] - t["ref_logprobs"], seqs), estimator, clamp)
    else:
        return torch.zeros_like(d), torch.zeros_like(d)
    return kl, bent * ratio if o.get("kl_ratio_clip") is not None else bent


def _stats(keep: Tensor, sums: dict[str, Tensor], adds: float) -> Tensor:
    out = torch.zeros(len(STATS_FIELDS), dtype=torch.float64, device=keep.device)
    for name, x in sums.items():
        out[STATS_FIELDS.index(name)] = _finite(torch.where(keep, x, 0.0)).sum() * adds
    return out


def _divisor(options: dict[str, Any], stats: Tensor, field: str) -> float:
    """D of the exact call; 1 where it is 0, as under "token-sum"."""
    denom = options.get("denom")
    own = float(stats[STATS_FIELDS.index(field)]) or 1.0
    return own if denom is None else float(denom)


def value_condition(call: Call, exact: dict[str, Tensor], eps: float) -> Conditions:
    """e = v − R squared; the clipped value rounds by the size of its bound."""
    t, o = call.tensors, call.options
    values = t["values"]
    seqs = Sequences(keep_of(values, t.get("mask")), t.get("cu_seqlens"))
    err, scale = (values - t["returns"]).abs(), o.get("scale", 0.5)
    size, slope = 3 * err**2, 2 * err
    old = t.get("old_values", values)
    if o["clip"] is not None:
        far = (values.clamp(old - o["clip"], old + o["clip"]) - t["returns"]).abs()
        bound = old.abs() + o["clip"]
        size, slope = size + 3 * far**2 + 2 * far * bound, slope + 2 * (far + bound)
    weight = seqs.keep.double()
    if o.get("reduction") == "seq-mean-token-mean":
        weight = weight / seqs.spread(seqs.tokens.clamp(min=1))
    size = seqs_value(weight * scale * size, seqs)
    adds = 1 + math.sqrt(max(1, int(seqs.keep.sum()))) / 4
    gap = t["returns"] - old
    # Returns and errors are accumulated in double: one rounding of an error, and of fp64 sums.
    sums = {
        "err": gap.abs(),
        "err_sq": gap**2,
        "ret": t["returns"].abs(),
        "ret_sq": t["returns"] ** 2,
    }
    stats = _stats(seqs.keep, {"vf_loss": size}, adds)
    stats += _stats(seqs.keep, {k: sums[k] for k in ("err", "err_sq")}, 1.0)
    stats += _stats(seqs.keep, sums, adds * EPS64 / eps)
    divisor = _divisor(o, exact["stats"], "vf_loss_denom")
    out: Conditions = {
        "loss": (4, _finite(size).sum() * adds / divisor, False),
        "stats": (4, stats, False),
    }
    if call.cotangents:
        factor = weight * float(call.cotangents["loss"].abs()) / divisor
        out["grad_values"] = (4, seqs_value(factor * scale * slope, seqs), False)
    return out


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
        x = _finite(exact[name])
        out[name] = (4, x.abs().amax() if x.numel() else x.new_zeros(()), True)
    out["moments"] = (8, _moments(_finite(exact["advantages"])), False)
    return out


def rlhf_condition(call: Call, exact: dict[str, Tensor], eps: float) -> Conditions:
    """As `gae`, after a reward that carries the KL estimate's condition."""
    t, o = call.tensors, call.options
    keep = t["mask"] != 0
    x = torch.where(keep, t["logprobs"] - t["ref_logprobs"], 0.0)
    kl = torch.where(keep, _kl(x, o.get("kl_estimator", "k1"), o.get("kl_clamp"))[0], 0.0)
    rewards = kl * abs(float(o["kl_coef"])) * 2 + exact["rewards"].abs()
    out = gae_condition(call, exact, eps)
    # A reward's rounding reaches every earlier step: at most the sum of the row.
    reach = _finite(rewards).sum()
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
    y = _finite(exact["out"]).abs() + 2 * shift
    # The sums are fp64: their rounding moves the mean, and the mean's own split by 2^-24 of it.
    kept = _finite(call.tensors["x"]).abs()
    drift = (1 + math.sqrt(n) / 4) * EPS64 / eps * (scale * float(kept.max()) if n else 0.0)
    y = _finite(exact["out"]).abs() + 2 * shift
    # The sums are fp64: their rounding moves the mean, and the mean's own split by 2^-24 of it.
    top = float(call.tensors["x"].abs().nan_to_num(0.0).max()) if n else 0.0
    drift = (1 + math.sqrt(n) / 4) * EPS64 / eps * scale * top
    return {"out": (6, y * (1 + drift) + drift + abs(mean) * scale * 2.0**-24, False)}


CONDITIONS: dict[str, Callable[[Call, dict[str, Tensor], float], Conditions]] = {
    "token_logprobs": logprobs_condition,
    "ppo_loss": ppo_condition,
    "value_loss": value_condition,
    "gae": gae_condition,
    "rlhf_advantages": rlhf_condition,
    "whiten": whiten_condition,
}
