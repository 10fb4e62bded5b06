"""Policy losses that are a function of a token's terms: `Surrogate`, `TokenTerms`, and built ones.

A surrogate is written once, in PyTorch; every backend runs these lines and differentiates them,
and its own kernels do the rest (KL, entropy, weights, reduction, statistics, the head).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppo_fast._sequences import Sequences


@dataclass(frozen=True, eq=False)
class TokenTerms:
    """The arguments of a surrogate: flat `(R,)` tensors, fp32 (fp64 for fp64 inputs).

    `logprobs`, `log_ratio` and `ratio` carry the gradient; everything else is a constant, None
    where the call has none. Masked slots hold 0, and a ratio of 1.

    Attributes:
        logprobs: of the current policy.
        log_ratio: logprobs − old_logprobs at the call's `ratio_level`, clamped by
            `log_ratio_clamp`; ratio: its exponential.
        old_logprobs: the current ones, detached, where the call has none.
        advantages: whitened where the call whitens.
        weights: `is_weights` times the correction's weights, 1 without both.
        mask: bool.
        rollout_logprobs, ref_logprobs, entropy: as given.
        kl: the clamped estimate of KL(π‖π_ref), for a surrogate that couples.
        sequences: `sum`, `mean`, `min`, `max` (R,) → (S,) and `spread` (S,) → (R,), for one that
            couples, where the call has sequences; over all ranks of a `context_group`.
    """

    logprobs: Tensor
    log_ratio: Tensor
    ratio: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    mask: Tensor
    rollout_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    sequences: Sequences | None = None


Terms = Callable[[TokenTerms], Any]

__all__ = [
    "cispo",
    "clip",
    "clip_cov",
    "dppo",
    "dro",
    "gmpo",
    "kl_cov",
    "reinforce",
    "sapo",
    "vespo",
]


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A policy loss: a function from `TokenTerms` to the loss of every token.

    `fn` returns terms `(R,)` to be minimised, or `(terms, dropped)`, with a bool `(R,)` of the
    tokens that it clips or drops, for `clip_frac`; without it, those with A ≠ 0 whose slope is
    exactly 0. It must be differentiable by `torch.func.vjp`, must not synchronise with the device
    or write into a term, and have finite slopes where its inputs are finite
    (`PPO_FAST_DEBUG=1` checks). It runs in fp32 (fp64) without autocast.

    Args:
        fn: the function.
        couples: False where a token's term depends on its own inputs alone. Then `fn` is called
            on blocks of rows, any number of times, and a fused head takes three matrix products.
            True: it is called once with all of a call's rows and with `sequences`; four products.
        weighted: `fn` has applied `weights` itself.
    """

    fn: Terms
    couples: bool = False
    weighted: bool = False

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"Surrogate: fn must be callable, got {type(self.fn).__name__}")

    @property
    def name(self) -> str:
        """The function's name, for messages."""
        fn = self.fn.func if isinstance(self.fn, partial) else self.fn
        return getattr(fn, "__name__", type(fn).__name__).removeprefix("_")


def sapo(tau_pos: float = 1.0, tau_neg: float = 1.05) -> Surrogate:
    """Soft adaptive policy optimisation, −A·(4/τ)·σ(τ(ρ − 1)) (arXiv 2511.20347, eq. 5).

    τ is `tau_pos` where A > 0, else `tau_neg`. verl and TRL reduce it by sequence means.
    """
    pos, neg = _positive("sapo", tau_pos=tau_pos, tau_neg=tau_neg)
    return Surrogate(partial(_sapo, tau_pos=pos, tau_neg=neg))


def _sapo(t: TokenTerms, tau_pos: float, tau_neg: float) -> Tensor:
    tau = _either(t.advantages > 0, (tau_pos, tau_neg), t.ratio)
    ratio = _acting(t, t.ratio.isinf())
    return -t.advantages * (4.0 / tau) * torch.sigmoid(tau * (ratio - 1.0))


def dppo(kind: str, low: float, high: float, ratio_cap: float | None = None) -> Surrogate:
    """Divergence PPO: −A·ρ where the token's binary divergence allows it (arXiv 2602.04879).

    With p = exp(logprobs) and q = exp(old_logprobs), a token is dropped if it moves the way of
    its advantage, A > 0 and p > q or A ≤ 0 and p < q, by more than `high` or `low`: of p − q
    ("tv"), or of KL(q‖p) of the two-sided coin ("kl"). With `ratio_cap` c the term is
    −A·sg(min(ρ, c))·logprobs (verl), without one −A·ρ (prime-rl, SkyRL).
    """
    if kind not in ("tv", "kl"):
        raise ValueError(f"dppo: kind must be tv or kl, got {kind!r}")
    low, high = _positive("dppo", zero=True, low=low, high=high)
    return Surrogate(partial(_dppo, kind, low, high, _cap("dppo", ratio_cap)))


def _dppo(kind: str, low: float, high: float, cap: float | None, t: TokenTerms) -> Any:
    p, q = t.logprobs.detach().exp(), t.old_logprobs.exp()
    # A NaN log-probability compares as False: its token is not dropped, so that the loss shows it.
    if kind == "tv":
        dropped = torch.where(t.advantages > 0, p - q > high, p - q < -low)
    else:
        shift = t.old_logprobs - t.logprobs.detach()
        kl = q * shift + (1.0 - q) * ((1.0 - q + 1e-8) / (1.0 - p + 1e-8)).log()
        up, down = ~(kl <= high) & (p > q), ~(kl <= low) & (p < q)
        dropped = torch.where(t.advantages > 0, up, down)
    return torch.where(dropped, 0.0, _weighted_logprobs(t, cap, dropped)), dropped


def reinforce(ratio_cap: float | None = None) -> Surrogate:
    """Policy gradient: −A·ρ, or with `ratio_cap` c −A·sg(min(ρ, c))·logprobs (Williams 1992).

    `old_logprobs=None` makes ρ exactly 1: −A·logprobs is then `ratio_cap=1.0`.
    """
    return Surrogate(partial(_reinforce, _cap("reinforce", ratio_cap)))


def _reinforce(cap: float | None, t: TokenTerms) -> Tensor:
    return _weighted_logprobs(t, cap)


def dro(beta: float) -> Surrogate:
    """Direct reward optimisation, −(A·logprobs − β/2·d²), d the log-ratio (arXiv 2405.19107)."""
    (beta,) = _positive("dro", zero=True, beta=beta)
    return Surrogate(partial(_dro, beta))


def _dro(beta: float, t: TokenTerms) -> Tensor:
    return -(t.advantages * t.logprobs - 0.5 * beta * t.log_ratio * t.log_ratio)


def gmpo(clip_low: float = 0.4, clip_high: float = 0.4) -> Surrogate:
    """Geometric-mean PPO: one ratio e^mean(clipped d) of the sequence (arXiv 2507.20673, eq. 4).

    d is clipped to [−clip_low, clip_high] on the side that the token's advantage forbids. Each
    token has the whole sequence's term −mean A · ratio · (geometric mean of the weights): as verl
    and TRL have it under "seq-mean-token-mean" with `denom=B`. Takes `log_ratio_clamp=None`.
    """
    low, high = _positive("gmpo", zero=True, clip_low=clip_low, clip_high=clip_high)
    return Surrogate(partial(_gmpo, low, high), couples=True, weighted=True)


def _gmpo(low: float, high: float, t: TokenTerms) -> Any:
    seqs = _sequences("gmpo", t)
    d, sign = t.log_ratio, t.advantages.sign()
    clipped = d.detach().clamp(-low, high)
    dropped = sign * clipped < sign * d.detach()
    held = torch.where(dropped, clipped, torch.where(sign == 0, 0.0, d))
    geometric = t.weights.clamp(min=1e-10).log()
    term = -seqs.mean(t.advantages) * (seqs.mean(held) + seqs.mean(geometric)).exp()
    return seqs.spread(term), dropped & t.mask


def vespo(k: tuple[float, float] = (2.0, 3.0), lam: tuple[float, float] = (3.0, 2.0)) -> Surrogate:
    """Variational sequence-level soft PPO: −φ(W)·A·logprobs (arXiv 2602.10693).

    log W is the sequence's Σ clamp(d, ±20), and Σ log weights, clamped to [log 1e-8, 20];
    φ = exp(λ + k·log W − λ·W), detached, of the first (k, λ) where A ≥ 0, else of the second.
    The weights are the tokens' own: one of the sequence, `(B, 1)`, would count once a token.
    """
    return Surrogate(
        partial(_vespo, _two("vespo", "k", k), _two("vespo", "lam", lam)),
        couples=True,
        weighted=True,
    )


def _vespo(k: tuple[float, float], lam: tuple[float, float], t: TokenTerms) -> Tensor:
    seqs, least = _sequences("vespo", t), math.log(1e-8)
    d = (t.logprobs.detach() - t.old_logprobs).clamp(-20.0, 20.0)
    d = d + t.weights.log().clamp(least, 20.0)
    log_w = seqs.spread(seqs.sum(d)).clamp(least, 20.0)
    good = t.advantages >= 0
    shape, rate = _either(good, k, d), _either(good, lam, d).clamp(min=1e-4)
    phi = (rate + shape * log_w - rate * log_w.exp()).exp()
    phi = torch.where(phi.isinf(), 0.0, phi)
    return -phi * t.advantages * t.logprobs


def clip_cov(
    fraction: float = 2e-4,
    bounds: tuple[float, float] = (1.0, 5.0),
    seed: int | Tensor = 0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Surrogate:
    """The clipped loss without a few tokens of high covariance (arXiv 2505.22617, eq. 10).

    Of the tokens whose (A − mean A)·(logprobs − mean) lies within `bounds` and which the clip
    leaves alone, max(1, ⌊fraction·tokens⌋) chosen at random (by `seed`, a number or a 0-d int64
    tensor on the device, to be changed every call) are dropped. The means are the call's own.
    """
    (share,) = _positive("clip_cov", zero=True, fraction=fraction)
    low, high = _positive("clip_cov", zero=True, clip_low=clip_low, clip_high=clip_high)
    within = _two("clip_cov", "bounds", bounds, least=-math.inf)
    if isinstance(seed, bool) or not isinstance(seed, int | Tensor):
        raise TypeError(f"clip_cov: seed must be an int or a 0-d tensor, got {seed!r}")
    return Surrogate(partial(_clip_cov, share, within, seed, low, high), couples=True)


def _clip_cov(
    share: float,
    bounds: tuple[float, float],
    seed: int | Tensor,
    low: float,
    high: float,
    t: TokenTerms,
) -> Any:
    terms, clipped = clip(low, high).fn(t)
    cov = _covariance("clip_cov", t)
    eligible = t.mask & ~clipped & (cov > bounds[0]) & (cov < bounds[1])
    key = torch.where(eligible, _hash(cov, seed), -1)
    dropped = eligible & (_rank(key) < _count(t.mask, share))
    return torch.where(dropped, 0.0, terms), dropped


def kl_cov(fraction: float = 2e-4, coef: float = 0.1) -> Surrogate:
    """−A·ρ, and `coef`·|d| on the tokens of the highest covariance (arXiv 2505.22617, eq. 12).

    They are max(1, ⌊fraction·tokens⌋) of the call's, by (A − mean A)·(logprobs − mean).
    """
    share, coef = _positive("kl_cov", zero=True, fraction=fraction, coef=coef)
    return Surrogate(partial(_kl_cov, share, coef), couples=True)


def _kl_cov(share: float, coef: float, t: TokenTerms) -> Tensor:
    cov = torch.where(t.mask, _covariance("kl_cov", t), -math.inf)
    chosen = t.mask & (_rank(cov) < _count(t.mask, share))
    plain = -t.advantages * _acting(t)
    return torch.where(chosen, plain + coef * t.log_ratio.abs(), plain)


def clip(
    clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None
) -> Surrogate:
    """max(−Aρ, −A·clip(ρ, 1 − clip_low, 1 + clip_high)) (Schulman et al. 2017, eq. 7).

    The kernels' "clip" as a surrogate, for a ratio that they do not form.
    """
    return Surrogate(partial(_clip, clip_low, clip_high, dual_clip))


def _clip(low: float, high: float, dual: float | None, t: TokenTerms) -> Any:
    ratio = _acting(t).detach()
    plain, bounded = -t.advantages * ratio, -t.advantages * ratio.clamp(1.0 - low, 1.0 + high)
    cut = bounded > plain
    held, constant = torch.where(cut, bounded, plain), cut
    if dual is not None:
        cap = -t.advantages * dual
        capped = (t.advantages < 0) & (held > cap)
        held, constant = torch.where(capped, cap, held), cut | capped
    return torch.where(constant, held, -t.advantages * _acting(t, constant)), cut


def cispo(clip_low: float = 0.2, clip_high: float = 0.2) -> Surrogate:
    """−sg(clip ρ)·A·logprobs (MiniMax-M1 2025, eq. 4); the kernels' "cispo" likewise."""
    return Surrogate(partial(_cispo, clip_low, clip_high))


def _cispo(low: float, high: float, t: TokenTerms) -> Any:
    ratio = _acting(t).detach()
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    cut = -t.advantages * bounded > -t.advantages * ratio
    return -bounded * t.advantages * t.logprobs, cut


def _either(first: Tensor, values: tuple[float, float], like: Tensor) -> Tensor:
    """One of two numbers, in the precision of `like`."""
    return torch.where(first, like.new_full((), values[0]), values[1])


def _acting(t: TokenTerms, constant: Tensor | None = None) -> Tensor:
    """The ratio, without a slope where `constant`, and 1 where the advantage is 0.

    0 times a ratio that overflows is 0: the exponent is selected, because inf·0 is NaN.
    """
    log_ratio = t.log_ratio
    if constant is not None:
        log_ratio = torch.where(constant, log_ratio.detach(), log_ratio)
    idle = (t.advantages == 0) & (t.ratio >= 0)  # NaN is not idle
    return torch.where(idle, 0.0, log_ratio).exp()


def _weighted_logprobs(t: TokenTerms, cap: float | None, constant: Tensor | None = None) -> Tensor:
    """−A·ρ, or −A·sg(min(ρ, cap))·logprobs."""
    if cap is None:
        return -t.advantages * _acting(t, constant)
    return -t.advantages * _acting(t).detach().clamp(max=cap) * t.logprobs


def _covariance(name: str, t: TokenTerms) -> Tensor:
    """(A − mean A)·(logprobs − mean logprobs), the means over unmasked tokens."""
    if t.sequences is not None and t.sequences.group is not None:
        raise ValueError(
            f"{name}: context_group must be None, because the tokens of the whole call are"
            f" ranked, got {t.sequences.group}"
        )
    n = t.mask.sum().clamp(min=1)
    logprobs = t.logprobs.detach()
    means = (torch.where(t.mask, x, 0.0).sum() / n for x in (t.advantages, logprobs))
    return (t.advantages - next(means)) * (logprobs - next(means))


def _count(mask: Tensor, share: float) -> Tensor:
    """max(1, ⌊share·tokens⌋), on the device."""
    return (mask.sum().double() * share).floor().clamp(min=1)


def _rank(key: Tensor) -> Tensor:
    """Each slot's place in the falling order of `key`."""
    order = key.argsort(descending=True, stable=True)
    return order.argsort()


def _hash(x: Tensor, seed: int | Tensor) -> Tensor:
    """A random-looking number ≥ 0 of each slot (a 64-bit finaliser; Steele et al. 2014)."""
    bits = torch.arange(1, x.numel() + 1, device=x.device) * -7046029254386353131
    step = seed * -4658895280553007687
    bits = bits + (step if isinstance(step, Tensor) else (step + 2**63) % 2**64 - 2**63)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        bits = (bits ^ (bits >> shift)) * factor
    return (bits ^ (bits >> 31)) & (2**62 - 1)


def _sequences(name: str, t: TokenTerms) -> Sequences:
    if t.sequences is None:
        raise ValueError(f"{name}: cu_seqlens must be given for flat inputs, got None")
    return t.sequences


def _positive(op: str, *, zero: bool = False, **given: Any) -> tuple[float, ...]:
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (value >= 0 if zero else value > 0):
            bound = "at least 0" if zero else "above 0"
            raise ValueError(f"{op}: {name} must be a number {bound}, got {value!r}")
    return tuple(float(value) for value in given.values())


def _cap(op: str, cap: float | None) -> float | None:
    return None if cap is None else _positive(op, ratio_cap=cap)[0]


def _two(op: str, name: str, value: Any, least: float = 0.0) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{op}: {name} must be two numbers, got {value!r}")
    low, high = value
    if not (isinstance(low, int | float) and isinstance(high, int | float)):
        raise ValueError(f"{op}: {name} must be two numbers, got {value!r}")
    if min(low, high) < least or math.isnan(low) or math.isnan(high):
        raise ValueError(f"{op}: {name} must be at least {least:g}, got {value!r}")
    return float(low), float(high)
