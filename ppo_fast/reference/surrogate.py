"""A surrogate's terms and slopes from a call's log-probabilities; the ops run these lines too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast._sequences import Sequences
from ppo_fast.reference.common import clamp, exact, kl_terms
from ppo_fast.surrogates import Surrogate, TokenTerms

LEVELS = ("token", "sequence", "sequence-token")


class TermInputs(NamedTuple):
    """A call's constants, flat `(R,)`, 0 in masked slots; `seqs` of a call that has sequences.

    `acting`: the unmasked slots whose policy term no rejection has dropped.
    """

    old: Tensor | None
    advantages: Tensor
    weights: Tensor
    keep: Tensor
    acting: Tensor
    rollout: Tensor | None
    ref: Tensor | None
    entropy: Tensor | None
    seqs: Sequences | None


class TermOptions(NamedTuple):
    """The options of a loss that a surrogate's terms depend on."""

    level: str
    bounds: tuple[float, float]  # of the log-ratio
    kl_estimator: str
    kl_clamp: float | None
    # The weight of a KL term that is part of the terms, because its ratio is the sequence's, and
    # the bound on that ratio where it multiplies the gradient alone.
    kl_coef: float | Tensor | None
    kl_ratio_clip: float | None = None


class Evaluated(NamedTuple):
    """Terms with their weights, slopes by log-probability, and the tokens clipped or dropped."""

    value: Tensor
    policy: Tensor  # the value without a KL term
    slope: Tensor
    clipped: Tensor
    log_ratio: Tensor  # clamped, at the loss's level


def log_ratio_at(
    level: str, new: Tensor, old: Tensor, bounds: tuple[float, float], seqs: Sequences | None
) -> Tensor:
    """The clamped log-ratio: the token's, or the mean over its sequence.

    "sequence" has the gradient of the mean, "sequence-token" each token's own (GSPO-token).
    """
    raw = new - old
    if level == "token" or seqs is None:
        return clamp(raw, *bounds)
    if level == "sequence":
        mean = seqs.mean(raw.double()).to(raw.dtype)
        return seqs.spread(clamp(mean, *bounds))
    mean = seqs.mean(raw.detach().double()).to(raw.dtype)
    unclamped = ~((mean < bounds[0]) | (mean > bounds[1]))
    # inf − inf is NaN: an infinite log-ratio has a value alone.
    passing = seqs.spread(unclamped) & ~raw.isinf()
    own = torch.where(passing, new - new.detach(), 0.0)
    return seqs.spread(clamp(mean, *bounds)) + own


def terms_of(
    new: Tensor, x: TermInputs, options: TermOptions, surrogate: Surrogate
) -> tuple[TokenTerms, Tensor | None]:
    """The terms of the log-probabilities `new` (R,), and the KL term that goes with them.

    Where an elementwise surrogate's term is dropped, its terms have no gradient: 0·inf is NaN.
    """
    old = new.detach() if x.old is None else x.old
    log_ratio = log_ratio_at(options.level, new, old, options.bounds, x.seqs)
    inside = None
    if options.kl_coef is not None and x.ref is not None:
        inside = options.kl_coef * _weighted_kl(new - x.ref, log_ratio, options)
    if not surrogate.couples:
        counts = _counts(surrogate, x)
        new, log_ratio = (torch.where(counts, part, part.detach()) for part in (new, log_ratio))
    kl = None
    if x.ref is not None and surrogate.couples:
        kl = kl_terms(new.detach() - x.ref, options.kl_estimator.rstrip("+"), options.kl_clamp)
    terms = TokenTerms(
        logprobs=new,
        log_ratio=log_ratio,
        ratio=log_ratio.exp(),
        old_logprobs=old,
        advantages=x.advantages,
        weights=x.weights,
        mask=x.keep,
        rollout_logprobs=x.rollout,
        ref_logprobs=x.ref,
        entropy=x.entropy,
        kl=kl,
        sequences=x.seqs if surrogate.couples else None,
    )
    return terms, inside


def _weighted_kl(x: Tensor, log_ratio: Tensor, options: TermOptions) -> Tensor:
    """The estimate times the ratio, or with the bounded ratio in its gradient."""
    name, bound = options.kl_estimator, options.kl_ratio_clip
    if bound is None:
        return log_ratio.exp() * kl_terms(x, name, options.kl_clamp)
    return kl_terms(x, name, options.kl_clamp, log_ratio.detach().exp().clamp(max=bound))


def call(surrogate: Surrogate, terms: TokenTerms) -> tuple[Tensor, Tensor | None]:
    """The function's terms and what it drops; TypeError or ValueError for anything else."""
    with exact(terms.logprobs.device):
        out: Any = surrogate.fn(terms)
    value, dropped = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    like, name = terms.logprobs, f"Surrogate {surrogate.name!r}"
    for what, x, dtype in (("terms", value, like.dtype), ("dropped", dropped, torch.bool)):
        if what == "dropped" and x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: {what} must be a tensor, got {type(x).__name__}")
        if x.dtype != dtype:
            raise TypeError(f"{name}: {what} must be {dtype}, got {x.dtype}")
        if x.shape != like.shape:
            shape = tuple(like.shape)
            raise ValueError(
                f"{name}: {what} must have shape (R,) = {shape}, got {tuple(x.shape)}"
            )
    return value, dropped


def weighted(surrogate: Surrogate, value: Tensor, x: TermInputs) -> Tensor:
    """The terms times their weights; 0 where dropped, and where a weight is 0, as a select."""
    product = value if surrogate.weighted else value * x.weights
    return torch.where(_counts(surrogate, x), product, 0.0)


def _counts(surrogate: Surrogate, x: TermInputs) -> Tensor:
    """The slots whose policy term counts: neither rejected nor of weight 0."""
    return x.acting if surrogate.weighted else x.acting & (x.weights != 0)


def evaluate(
    surrogate: Surrogate,
    new: Tensor,
    x: TermInputs,
    options: TermOptions,
    cotangent: Tensor | None = None,
) -> Evaluated:
    """Terms and slopes at `new` (R,), detached. `cotangent` weights the terms (None: 1 each)."""

    def weighted_terms(new: Tensor) -> Any:
        terms, kl = terms_of(new, x, options, surrogate)
        value, dropped = call(surrogate, terms)
        policy = weighted(surrogate, value, x)
        both = policy if kl is None else policy + torch.where(x.keep, kl, 0.0)
        return both, (policy, terms.log_ratio, *(() if dropped is None else (dropped,)))

    value, pull, aux = torch.func.vjp(  # type: ignore[misc]
        weighted_terms, new.detach(), has_aux=True
    )
    policy, log_ratio, *dropped = aux
    (slope,) = pull(torch.ones_like(value) if cotangent is None else cotangent)
    slope = torch.where(x.keep, slope, 0.0)
    if dropped:
        clipped = x.keep & dropped[0]
    else:
        clipped = x.acting & (x.advantages != 0) & (x.weights != 0) & (slope == 0)
        if cotangent is not None:
            clipped = clipped & (cotangent != 0)
    return Evaluated(*(part.detach() for part in (value, policy, slope, clipped, log_ratio)))
