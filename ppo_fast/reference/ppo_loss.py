"""The policy loss: surrogates, KL and entropy terms, five reductions, all statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast._results import Loss, Stats
from ppo_fast._sequences import Sequences
from ppo_fast.corrections import Correction
from ppo_fast.reference.common import (
    clamp,
    compute,
    keep_of,
    kl_terms,
    own_denom,
    reduce_loss,
    select,
    stats_of,
    token_weights,
    whitened,
)
from ppo_fast.reference.correction import corrected, counted, is_late, recounts, rollout_sums
from ppo_fast.reference.surrogate import (
    TermInputs,
    TermOptions,
    call,
    evaluate,
    log_ratio_at,
    terms_of,
    weighted,
)
from ppo_fast.surrogates import Surrogate


class Policy(NamedTuple):
    """Per-token policy term, the log-ratio at its level, and where clip and dual clip act.

    `cut` is None where it follows from ratio and advantage.
    """

    terms: Tensor
    log_ratio: Tensor
    dual: Tensor
    cut: Tensor | None = None


class _Tokens(NamedTuple):
    """The call's tokens: the log-probabilities with their gradient, everything else constant."""

    keep: Tensor
    seqs: Sequences
    new: Tensor
    old: Tensor
    adv: Tensor
    weight: Tensor
    accepted: Tensor  # no rejection has dropped the policy term
    ref: Tensor | None
    bounds: tuple[float, float]


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
    surrogate: Surrogate | None = None,
    ratio_level: str = "token",
    rollout_logprobs: Tensor | None = None,
    correction: Correction | None = None,
    context_group: dist.ProcessGroup | None = None,
    all_tokens: Tensor | None = None,
    others: Mapping[str, tuple[Tensor, float | Tensor]] | None = None,
) -> Loss:
    """Σ w·(policy + kl_coef·kl − entropy_coef·entropy) / D over the unmasked tokens.

    `all_tokens`, where given, are those that count in D. `others` are further terms and their
    coefficients, by the names of their statistics. With a `context_group`, every rank of which
    holds a part of every sequence, the loss is this part's share.
    """
    split: dict[str, Any] = {"cu_seqlens": cu_seqlens, "context_group": context_group}
    keep, extra = keep_of(logprobs, mask), {}
    every, accepted = keep if all_tokens is None else all_tokens, torch.ones_like(keep)
    if correction is not None and rollout_logprobs is not None:
        late = is_late(correction, old_logprobs)
        now, known = (logprobs, keep) if late or old_logprobs is None else (old_logprobs, every)
        found = corrected(correction, now, rollout_logprobs, is_weights, known, **split)
        is_weights, extra = found.is_weights, rollout_sums(found.stats)
        accepted = found.kept if correction.drops == "policy" else accepted
        if recounts(correction):
            given = {"reduction": reduction, "denom": denom, "sequence_weights": sequence_weights}
            new_count = counted(correction, found.kept, keep, every, **split, **given)
            keep, reduction, denom, extra["loss_denom"], sequence_weights, _ = new_count
    if denom is None and all_tokens is not None:
        own = own_denom(Sequences(every, cu_seqlens, context_group), reduction)
        denom = torch.ones_like(own) if reduction == "token-sum" else own
    seqs = Sequences(keep, cu_seqlens, context_group)
    t = _tokens(logprobs, old_logprobs, advantages, seqs, is_weights, advantage_moments)
    t = t._replace(
        accepted=accepted,
        ref=None if ref_logprobs is None else select(keep, ref_logprobs),
        bounds=log_ratio_clamp or (float("-inf"), float("inf")),
    )
    if isinstance(kl_coef, Tensor):  # a copy, as autograd saves none that inference mode made
        kl_coef = kl_coef.to(t.new.dtype, copy=True)
    clip = (1.0 - clip_low, 1.0 + clip_high)
    if surrogate is None:
        policy = _by_variant(variant, t, clip, dual_clip, kl_coef)
    else:
        options = TermOptions(ratio_level, t.bounds, kl_estimator, kl_clamp, None)
        w = token_weights(t.seqs, reduction, t.new.dtype, sequence_weights)
        policy = _by_surrogate(surrogate, t, options, rollout_logprobs, entropy, w)
    kl = _kl(variant, t, policy.log_ratio, kl_estimator, kl_clamp, kl_ratio_clip)
    weighted = kl if kl_weight is None else _weighted_kl(kl, kl_weight, t.new, policy.log_ratio)
    terms = policy.terms if variant == "linear" else policy.terms + kl_coef * weighted
    bonus = torch.zeros_like(t.new)
    if entropy is not None:
        bonus = select(keep, entropy).to(t.new.dtype)
        if isinstance(entropy_coef, Tensor):
            entropy_coef = entropy_coef.to(t.new.dtype, copy=True)
        terms = terms - entropy_coef * bonus
    sums = {"policy_loss": policy.terms, "entropy": bonus}
    for name, (value, coef) in (others or {}).items():
        sums[name] = select(keep, value)
        coef = coef.to(t.new.dtype, copy=True) if isinstance(coef, Tensor) else coef
        terms = terms + coef * sums[name]
    loss, weights, own = reduce_loss(terms, t.seqs, reduction, denom, sequence_weights)
    sums |= {"loss": weights * terms, "policy_loss": weights * policy.terms}
    sums |= {"ref_kl": kl, "clip_dual": policy.dual} | _ratio_sums(t, policy, clip)
    return Loss(loss, _stats(t, policy, {"loss_denom": own} | extra, sums))


def _tokens(
    logprobs: Tensor,
    old: Tensor | None,
    advantages: Tensor,
    seqs: Sequences,
    is_weights: Tensor | None,
    moments: Tensor | None,
) -> _Tokens:
    keep = seqs.keep
    new = select(keep, logprobs)
    adv = whitened(advantages, moments, keep, new.dtype)
    weight = keep.to(new.dtype) if is_weights is None else select(keep, is_weights).to(new.dtype)
    old = new.detach() if old is None else select(keep, old)
    unbounded = (float("-inf"), float("inf"))
    return _Tokens(keep, seqs, new, old, adv, weight, keep, None, unbounded)


def _kl(
    variant: str,
    t: _Tokens,
    log_ratio: Tensor,
    estimator: str,
    kl_clamp: float | None,
    ratio_clip: float | None,
) -> Tensor:
    """The clamped estimate of KL(π‖π_ref), or of KL(π_old‖π) in the penalty variant."""
    limit = None if ratio_clip is None else log_ratio.detach().exp().clamp(max=ratio_clip)
    if variant == "penalty":
        return kl_terms(-clamp(t.new - t.old, *t.bounds), estimator, kl_clamp, limit)
    if t.ref is None:
        return torch.zeros_like(t.new)
    return kl_terms(t.new - t.ref, estimator, kl_clamp, limit)


def _stats(
    t: _Tokens, policy: Policy, fields: dict[str, Tensor], sums: dict[str, Tensor]
) -> Stats:
    ratio, device = policy.log_ratio.detach().exp(), t.new.device
    fields["loss_denom"] = t.seqs.once(fields["loss_denom"])
    found = {name: torch.where(t.keep, x.detach().double(), 0.0).sum() for name, x in sums.items()}
    inf = torch.full((1,), float("inf"), dtype=t.new.dtype, device=device)
    return stats_of(
        device,
        n_tokens=t.keep.sum(),
        n_seqs=t.seqs.once((t.seqs.tokens > 0).sum()),
        ratio_min=torch.cat([inf, select(t.keep, ratio, float("inf")).flatten()]).amin(),
        ratio_max=torch.cat([-inf, select(t.keep, ratio, float("-inf")).flatten()]).amax(),
        **fields,
        **found,
    )


def _by_surrogate(
    surrogate: Surrogate,
    t: _Tokens,
    options: TermOptions,
    rollout: Tensor | None,
    entropy: Tensor | None,
    w: Tensor,
) -> Policy:
    """The policy term of a surrogate, differentiated by autograd."""

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else select(t.keep, x.detach()).to(t.new.dtype).reshape(-1)

    keep = t.keep.reshape(-1)
    x = TermInputs(
        old=t.old.reshape(-1),
        advantages=t.adv.reshape(-1),
        weights=t.weight.reshape(-1),
        keep=keep,
        acting=(t.keep & t.accepted).reshape(-1),
        rollout=flat(rollout),
        ref=flat(t.ref),
        entropy=flat(entropy),
        seqs=t.seqs.flat(),
    )
    new = t.new.reshape(-1)
    given, _ = terms_of(new, x, options, surrogate)
    value, _ = call(surrogate, given)
    clipped = evaluate(surrogate, new, x, options, w.reshape(-1)).clipped
    value = weighted(surrogate, value, x).view(t.new.shape)
    log_ratio = log_ratio_at(options.level, t.new, t.old, t.bounds, t.seqs)
    return Policy(value, log_ratio, torch.zeros_like(t.keep), clipped.view(t.new.shape))


def _by_variant(
    variant: str,
    t: _Tokens,
    clip: tuple[float, float],
    dual_clip: float | None,
    kl_coef: float | Tensor,
) -> Policy:
    """The policy term of a variant that has kernels. A weight of 0 drops it, whatever it is."""
    level = "sequence-token" if variant == "gspo" else "token"
    log_ratio = log_ratio_at(level, t.new, t.old, t.bounds, t.seqs)
    linear = None
    if variant == "linear" and t.ref is not None:
        linear = kl_coef * (t.ref - t.old).clamp(*t.bounds).exp()
    # A dropped term keeps neither value nor gradient: 0·inf is NaN.
    dropped = t.keep & (t.weight == 0)
    new, acting = (torch.where(dropped, x.detach(), x) for x in (t.new, log_ratio))
    terms, dual = _surrogate(variant, new, acting, t.adv, clip, dual_clip, kl_coef, linear)
    return Policy(torch.where(dropped, 0.0, terms * t.weight), log_ratio, dual)


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
) -> tuple[Tensor, Tensor]:
    """The policy term of each token, and where the dual clip is active.

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
        return torch.where(idle, zero, terms), dual
    if variant == "penalty":
        return -acting * adv, dual
    if variant == "linear":
        penalty = 0.0 if linear is None else (kl_coef * acting - linear) * adv
        return torch.where(idle, zero, -(acting * adv - penalty)), dual
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
    return torch.where(cut, terms, -adv * passing), dual


def _ratio_sums(t: _Tokens, policy: Policy, clip: tuple[float, float]) -> dict[str, Tensor]:
    d, ratio = clamp(t.new - t.old, *t.bounds), policy.log_ratio.exp()
    below, above = ratio < clip[0], ratio > clip[1]
    if policy.cut is None:
        active = -t.adv * ratio.clamp(*clip) > -t.adv * ratio
        low, high = active & below, active & above
    else:
        shrinks = policy.log_ratio < 0
        low, high = policy.cut & shrinks, policy.cut & ~shrinks
    return {
        "kl_k1": -d,
        "kl_k2": 0.5 * d * d,
        "kl_k3": torch.expm1(compute(d)) - d,
        "ratio": ratio,
        "ratio_sq": ratio.double() ** 2,
        "clip_low": low,
        "clip_high": high,
        "clip_eps": below | above,
    }
