"""The magnitudes whose roundings reach log-probabilities, entropies and losses.

As `conditions.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ppo_fast._results import STATS_FIELDS
from ppo_fast._sequences import Sequences
from ppo_fast.reference.common import keep_of, token_weights, whitening
from ppo_fast.reference.support import multiplicity
from ppo_fast.testing.calls import Call

EPS64 = torch.finfo(torch.float64).eps
Conditions = dict[str, tuple[float, Tensor, bool]]
# Largest relative and absolute rounding of dlogits before the products of the backward.
Narrow = tuple[float, float] | None


def finite(x: Tensor) -> Tensor:
    """x, and 0 where it is no finite number."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


class Softmax:
    """Rows z (..., V), divided by the temperature, whose own roundings are `given`.

    κ_j: what rounds z_j and z_j − max; it reaches ln Σ weighted by p_j.
    """

    def __init__(self, z: Tensor, tokens: Tensor, given: Tensor | float = 0.0) -> None:
        vocab = z.shape[-1]
        top = z.amax(-1, keepdim=True)
        p, logp = z.softmax(-1), finite(z.log_softmax(-1))
        z, gap = finite(z), finite(z - top)
        log_sum = (z.log_softmax(-1) - z)[..., :1].neg() - top
        # V additions and, online, about ln V changes of the maximum; in units of `ops`.
        adds = (math.sqrt(vocab) + 2 * math.log(vocab + 1)) / 8
        kappa = z.abs() + gap.abs() + 4 + given
        total = (p * kappa).sum(-1, keepdim=True) + log_sum.abs() + adds
        label = tokens.clamp(0, vocab - 1).long()[..., None]
        at = (kappa + logp.abs()).gather(-1, label)
        entropy = -(p * logp).sum(-1, keepdim=True)
        self.p, self.slope = p, logp + entropy
        self.hit = torch.zeros_like(z).scatter(-1, label, 1.0)
        spread = (p * gap.abs()).sum(-1, keepdim=True)
        self.reach = kappa + total
        self.of_entropy = (p * self.slope.abs() * kappa).sum(-1, keepdim=True) + (
            total + spread * (1 + adds)
        )
        self.logprobs, self.entropy = (at + total)[..., 0], self.of_entropy[..., 0]

    def outputs(self) -> Conditions:
        """Of the log-probability and the entropy."""
        return {"logprobs": (8, self.logprobs, False), "entropy": (8, self.entropy, False)}

    def gradient(self, g: Tensor, h: Tensor) -> Tensor:
        """Of Σ g·logprobs + h·entropy by z."""
        g, h = g.abs()[..., None], h.abs()[..., None]
        grad = g * (self.hit + self.p * self.reach)
        bent = self.slope.abs() * self.reach + self.reach + self.of_entropy
        return finite(grad + h * self.p * bent)


def temperature_of(call: Call) -> Tensor:
    """The temperature of every token, (..., 1)."""
    temperature = call.tensors.get(
        "temperature",
        torch.tensor(call.options.get("temperature", 1.0), device=call.tensors["tokens"].device),
    )
    return temperature.double().expand(call.tensors["tokens"].shape)[..., None]


def over_support(call: Call, z: Tensor) -> Tensor:
    """z (..., V) with −inf where the call's support, if there is one, keeps no id."""
    support = call.options.get("support")
    if support is None:
        return z
    times, _ = multiplicity(support, call.tensors["tokens"], z.shape[-1])
    return torch.where(times > 0, z + times.log(), -torch.inf)


def logprobs_condition(call: Call, exact: dict[str, Tensor], eps: float) -> Conditions:
    """Those of the softmax; the gradient is divided by the temperature."""
    temperature = temperature_of(call)
    z = over_support(call, call.tensors["logits"] / temperature)
    rows = Softmax(z, call.tensors["tokens"])
    out = rows.outputs()
    if "grad_logits" in exact:
        grad = rows.gradient(call.cotangents["logprobs"], call.cotangents["entropy"])
        out["grad_logits"] = (8, grad / temperature, False)
    return out


def kl_term(
    x: Tensor, estimator: str, clamp: float | None, wobble: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Conditions of the KL term's value and derivative; x itself is off by `wobble`."""
    name = estimator.rstrip("+")
    size = x.abs() + wobble
    grown = (-x).exp() * size
    bend = torch.expm1(-x).abs()
    value, slope, raw = {
        "k1": (size, torch.ones_like(x), x),
        "k2": (1.5 * x.abs() * size, size, x * x / 2),
        "k3": (4 * bend + grown + size, 4 * bend + grown, torch.expm1(-x) + x),
        "abs": (size, torch.ones_like(x), x),
    }[name]
    if clamp is not None:
        outside = raw.abs() > clamp
        value = torch.where(outside, clamp, value)
        slope = torch.where(outside, 0.0, slope)
    return value, size if estimator.endswith("+") else slope


def _policy(
    call: Call, adv: Tensor, seqs: Sequences, relative: Tensor, ratio: Tensor, wobble: Tensor
) -> tuple[Tensor, Tensor]:
    """Conditions of the policy term and of its derivative."""
    t, o = call.tensors, call.options
    variant, kl = o.get("variant", "clip"), float(o.get("kl_coef", 0.0))
    bounded = ratio.clamp(1 - o.get("clip_low", 0.2), 1 + o.get("clip_high", 0.2))
    slope = adv.abs() * torch.maximum(ratio, bounded) * (relative + 8)
    if variant == "cispo":
        slope = adv.abs() * bounded * (relative + 8)
        return slope * seqs_value(t["logprobs"], seqs).abs() + adv.abs() * bounded * wobble, slope
    if variant == "linear" and "ref_logprobs" in t:
        gap = (t["ref_logprobs"] - t.get("old_logprobs", t["logprobs"])).clamp(-20, 20)
        gap = seqs_value(gap, seqs)
        return slope * (1 + kl) + kl * adv.abs() * gap.exp() * (gap.abs() + 8), slope
    return slope + adv.abs() * (o.get("dual_clip") or 0.0), slope


def seqs_value(x: Tensor, seqs: Sequences) -> Tensor:
    """x where kept, 0 elsewhere."""
    return torch.where(seqs.keep, x, torch.zeros_like(x))


def ppo_condition(
    call: Call,
    exact: dict[str, Tensor],
    eps: float,
    wobble: tuple[Tensor | float, Tensor | float] = (0.0, 0.0),
) -> Conditions:
    """Per-token magnitudes under the weights; sums add √n, the mean divides by the exact D.

    Log-probabilities and entropies are themselves off by `wobble`, in units of 4·eps.
    """
    t, o = call.tensors, call.options
    new = t["logprobs"]
    seqs = Sequences(keep_of(new, t.get("mask")), t.get("cu_seqlens"))
    off, off_entropy = (seqs_value(x + torch.zeros_like(new), seqs) for x in wobble)
    d, ratio, relative = _ratio(call, seqs, off)
    adv = seqs_value(t["advantages"].expand_as(new), seqs)
    if "advantage_moments" in o:
        mean, rstd = whitening(o["advantage_moments"].values.to(adv.device))
        adv = seqs_value((adv - mean) * rstd, seqs)
    policy, slope = _policy(call, adv, seqs, relative, ratio, off)
    kept = seqs_value(t.get("is_weights", torch.ones_like(new)), seqs).abs()
    policy, slope = policy * kept, slope * kept
    kl, bent = _kl_of(call, d, seqs, ratio * relative, off)
    weighted, bent = _weighted(o.get("kl_weight"), kl, bent, ratio * (1 + relative))

    weight = token_weights(seqs, o["reduction"], torch.float64, t.get("sequence_weights")).abs()
    klc, entc = abs(float(o.get("kl_coef", 0.0))), abs(float(o.get("entropy_coef", 0.0)))
    bonus = seqs_value(t.get("entropy", torch.zeros_like(new)), seqs).abs() + off_entropy
    terms = policy + (0.0 if o.get("variant") == "linear" else klc) * weighted + entc * bonus
    sums = {"loss": weight * terms, "policy_loss": weight * policy, "entropy": bonus, "ref_kl": kl}
    size = d.abs() + off
    sums |= {"kl_k1": size, "kl_k2": 1.5 * d.abs() * size, "ratio": ratio * relative}
    sums |= {"kl_k3": d.exp() * (4 + size) + size, "ratio_sq": 2 * ratio**2 * relative}
    adds = 1 + math.sqrt(max(1, int(seqs.keep.sum()))) / 4
    stats = _stats(seqs.keep, sums, adds)
    top = seqs_value(ratio * relative, seqs).flatten()
    for name in ("ratio_min", "ratio_max"):
        stats[STATS_FIELDS.index(name)] = finite(top).max() if top.numel() else 0.0
    divisor = _divisor(o, exact["stats"], "loss_denom")
    factor = weight * float(call.cotangents["loss"].abs()) / divisor if call.cotangents else weight
    return {
        "loss": (4, finite(sums["loss"]).sum() * adds / divisor, False),
        "stats": (4, stats, False),
        "grad_logprobs": (4, seqs_value(factor * (slope + klc * bent), seqs), False),
        "grad_entropy": (4, factor * entc, False),
    }


def _ratio(call: Call, seqs: Sequences, wobble: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The clamped log-ratio, the variant's ratio, and the roundings of that ratio."""
    new, bounds = call.tensors["logprobs"], call.options.get("log_ratio_clamp", 20.0)
    if not isinstance(bounds, tuple):
        bounds = (-math.inf, math.inf) if bounds is None else (-bounds, bounds)
    gap = seqs_value(new - call.tensors.get("old_logprobs", new), seqs)
    d = gap.clamp(*bounds)
    if call.options.get("variant") != "gspo":
        return d, d.exp(), 4 + d.abs() + torch.where(gap == d, wobble, 0.0)
    n = seqs.tokens.clamp(min=1)
    mean = seqs.sum(gap) / n
    bounded = mean.clamp(*bounds)
    size = (2 + n.sqrt() / 4) * seqs.sum(gap.abs() + wobble) / n
    size = bounded.abs() + torch.where(mean == bounded, size, 0.0)
    return d, seqs.spread(bounded.exp()), 4 + seqs.spread(size)


def _kl_of(
    call: Call, d: Tensor, seqs: Sequences, ratio: Tensor, wobble: Tensor
) -> tuple[Tensor, Tensor]:
    """Conditions of the call's KL term; zeros without one."""
    t, o = call.tensors, call.options
    estimator, clamp = o.get("kl_estimator", "k3"), o.get("kl_clamp", 10.0)
    if o.get("variant") == "penalty":
        kl, bent = kl_term(-d, estimator, clamp, wobble)
    elif "ref_logprobs" in t:
        x = seqs_value(t["logprobs"] - t["ref_logprobs"], seqs)
        kl, bent = kl_term(x, estimator, clamp, wobble)
    else:
        return torch.zeros_like(d), torch.zeros_like(d)
    return kl, bent * ratio if o.get("kl_ratio_clip") is not None else bent


def _weighted(
    kl_weight: str | None, kl: Tensor, bent: Tensor, ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """Conditions of the KL term under its weight: W·k, and W·k' + W'·k; `ratio` with its own."""
    if kl_weight is None:
        return kl, bent
    return (kl, bent + kl) if kl_weight == "score" else (ratio * kl, ratio * (bent + kl))


def _stats(keep: Tensor, sums: dict[str, Tensor], adds: float) -> Tensor:
    out = torch.zeros(len(STATS_FIELDS), dtype=torch.float64, device=keep.device)
    for name, x in sums.items():
        out[STATS_FIELDS.index(name)] = finite(torch.where(keep, x, 0.0)).sum() * adds
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
        "loss": (4, finite(size).sum() * adds / divisor, False),
        "stats": (4, stats, False),
    }
    if call.cotangents:
        factor = weight * float(call.cotangents["loss"].abs()) / divisor
        out["grad_values"] = (4, seqs_value(factor * scale * slope, seqs), False)
    return out
