"""The policy loss: five surrogates, KL and entropy terms, five reductions, all statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast._results import Loss
from ppo_fast._sequences import Sequences
from ppo_fast.reference.common import (
    clamp,
    compute,
    keep_of,
    kl_terms,
    reduce_loss,
    select,
    stats_of,
    whitening,
)


class Surrogate(NamedTuple):
    """Per-token policy term, and where the dual clip is active."""

    terms: Tensor
    dual: Tensor


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    variant: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: tuple[float, float] | None = (-20.0, 20.0),
    is_weights: Tensor | None = None,
    sequence_weights: Tensor | None = None,
    advantage_moments: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float | Tensor = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_estimator: str = "k3",
    kl_clamp: float | None = 10.0,
    kl_ratio_clip: float | None = None,
    kl_weight: str | None = None,
    reduction: str = "token-mean",
    denom: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Loss:
    """Σ w·(policy + kl_coef·kl − entropy_coef·entropy) / D over the unmasked tokens."""
    keep = keep_of(logprobs, mask)
    seqs = Sequences(keep, cu_seqlens)
    new = select(keep, logprobs)
    old = new.detach() if old_logprobs is None else select(keep, old_logprobs)
    ref = None if ref_logprobs is None else select(keep, ref_logprobs)
    adv = select(keep, advantages).to(new.dtype)
    if advantage_moments is not None:
        mean, rstd = whitening(advantage_moments)
        adv = select(keep, (adv.double() - mean) * rstd).to(new.dtype)
    if isinstance(kl_coef, Tensor):  # a copy, as autograd saves none that inference mode made
        kl_coef = kl_coef.to(new.dtype, copy=True)

    bounds = log_ratio_clamp or (float("-inf"), float("inf"))
    d = clamp(new - old, *bounds)
    log_ratio = d if variant != "gspo" else _sequence_log_ratio(new, old, bounds, seqs)
    weight, dropped = torch.ones_like(new), torch.zeros_like(keep)
    if is_weights is not None:
        weight = select(keep, is_weights).to(new.dtype)
        dropped = weight == 0
    clip = (1.0 - clip_low, 1.0 + clip_high)
    linear = None
    if variant == "linear" and ref is not None:
        linear = kl_coef * (ref - old).clamp(*bounds).exp()
    # A dropped term keeps neither value nor gradient: 0·inf is NaN.
    acting = (torch.where(dropped, x.detach(), x) for x in (new, log_ratio))
    policy, dual = _surrogate(variant, *acting, adv, clip, dual_clip, kl_coef, linear)
    policy, ratio = torch.where(dropped, torch.zeros_like(new), policy * weight), log_ratio.exp()

    ratio_clip = None if kl_ratio_clip is None else ratio.detach().clamp(max=kl_ratio_clip)
    kl = torch.zeros_like(new)
    if variant == "penalty":
        kl = kl_terms(-d, kl_estimator, kl_clamp, ratio_clip)
    elif ref is not None:
        kl = kl_terms(new - ref, kl_estimator, kl_clamp, ratio_clip)
    weighted = kl if kl_weight is None else _weighted_kl(kl, kl_weight, new, log_ratio)
    terms = policy if variant == "linear" else policy + kl_coef * weighted
    bonus = torch.zeros_like(new) if entropy is None else select(keep, entropy).to(new.dtype)
    if entropy is not None:
        if isinstance(entropy_coef, Tensor):
            entropy_coef = entropy_coef.to(new.dtype, copy=True)
        terms = terms - entropy_coef * bonus
    loss, weights, own = reduce_loss(terms, seqs, reduction, denom, sequence_weights)

    sums = {"loss": weights * terms, "policy_loss": weights * policy, "entropy": bonus}
    sums |= {"ref_kl": kl, "clip_dual": dual} | _ratio_sums(d, ratio, adv, clip)
    stats = {name: torch.where(keep, x.detach().double(), 0.0).sum() for name, x in sums.items()}
    inf = torch.full((1,), float("inf"), dtype=new.dtype, device=new.device)
    return Loss(
        loss,
        stats_of(
            new.device,
            n_tokens=keep.sum(),
            n_seqs=(seqs.tokens > 0).sum(),
            loss_denom=own,
            ratio_min=torch.cat([inf, select(keep, ratio, float("inf")).flatten()]).amin(),
            ratio_max=torch.cat([-inf, select(keep, ratio, float("-inf")).flatten()]).amax(),
            **stats,
        ),
    )


def _sequence_log_ratio(
    new: Tensor, old: Tensor, bounds: tuple[float, float], seqs: Sequences
) -> Tensor:
    """The mean log-ratio of each token's sequence, clamped (Zheng et al. 2025).

    Differentiated through the token's own log-probability, where the clamp does not hold.
    """
    mean = seqs.sum((new - old).detach()) / seqs.tokens.clamp(min=1).to(new.dtype)
    own = torch.where(new.isinf(), torch.zeros_like(new), new - new.detach())  # inf − inf is NaN
    return clamp(seqs.spread(mean) + own, *bounds)


def _weighted_kl(kl: Tensor, kl_weight: str, new: Tensor, log_ratio: Tensor) -> Tensor:
    """The KL estimate times the ratio (TRL's use_bias_correction_kl), or times e^(l − sg l) = 1.

    The gradient flows through both factors. An estimate of 0 gives 0 beside a ratio that
    overflows, as the exact product would.
    """
    if kl_weight == "score":
        own = torch.where(new.isinf(), torch.zeros_like(new), new - new.detach())
        return own.exp() * kl
    idle = (kl.detach() == 0) & log_ratio.detach().exp().isposinf()
    return torch.where(idle, torch.zeros_like(log_ratio), log_ratio).exp() * kl


def _surrogate(
    variant: str,
    new: Tensor,
    log_ratio: Tensor,
    adv: Tensor,
    clip: tuple[float, float],
    dual_clip: float | None,
    kl_coef: float | Tensor,
    linear: Tensor | None,
) -> Surrogate:
    """The policy term of each token.

    An advantage of 0 gives 0 beside a ratio that overflows, as the exact product would: the
    exponent is selected, not the product, because inf·0 is NaN.

    clip: Schulman et al. 2017, eq. 7; dual clip: Ye et al. 2020, eq. 5; gspo: Zheng et al. 2025;
    cispo: MiniMax-M1 2025, eq. 4; penalty: Schulman et al. 2017, eq. 8.
    """
    zero, dual = torch.zeros_like(log_ratio), torch.zeros_like(log_ratio, dtype=torch.bool)
    idle = (adv == 0) & (log_ratio.detach().exp() >= 0)  # NaN is not idle
    if linear is not None:
        idle = idle & ~linear.isnan()
    log_ratio = torch.where(idle, zero, log_ratio)
    acting = log_ratio.exp()
    if variant == "cispo":
        terms = -acting.clamp(*clip).detach() * adv * new
        return Surrogate(torch.where(idle, zero, terms), dual)
    if variant == "penalty":
        return Surrogate(-acting * adv, dual)
    if variant == "linear":
        penalty = 0.0 if linear is None else (kl_coef * acting - linear) * adv
        return Surrogate(torch.where(idle, zero, -(acting * adv - penalty)), dual)
    plain, bounded = (-adv * r for r in (acting.detach(), acting.detach().clamp(*clip)))
    # At a tie the whole gradient passes, which is what maximum and clamp give together.
    cut = bounded > plain
    terms = torch.where(cut, bounded, plain)
    if dual_clip is not None:
        cap = -adv * dual_clip
        dual = (adv < 0) & (terms > cap)
        terms = torch.where(dual, cap, terms)
    cut = cut | dual
    passing = torch.where(cut, log_ratio.detach(), log_ratio).exp()
    return Surrogate(torch.where(cut, terms, -adv * passing), dual)


def _ratio_sums(
    d: Tensor, ratio: Tensor, adv: Tensor, clip: tuple[float, float]
) -> dict[str, Tensor]:
    below, above = ratio < clip[0], ratio > clip[1]
    active = -adv * ratio.clamp(*clip) > -adv * ratio
    return {
        "kl_k1": -d,
        "kl_k2": 0.5 * d * d,
        "kl_k3": torch.expm1(compute(d)) - d,
        "ratio": ratio,
        "ratio_sq": ratio.double() ** 2,
        "clip_low": active & below,
        "clip_high": active & above,
        "clip_eps": below | above,
    }
