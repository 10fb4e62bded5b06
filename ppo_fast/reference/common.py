"""Parts that the reference ops share: precision, masks and reductions."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ppo_fast._results import STATS_FIELDS, Stats
from ppo_fast._sequences import Sequences


def compute(x: Tensor) -> Tensor:
    """fp64 stays, every other floating type becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def exact(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """No autocast inside: the precision is the op's own."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def keep_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """The boolean mask in the shape of `x`; no mask keeps everything."""
    if mask is None:
        return torch.ones(x.shape, dtype=torch.bool, device=x.device)
    return mask != 0


def select(keep: Tensor, x: Tensor, other: float = 0.0) -> Tensor:
    """`x` where kept; a masked slot's content reaches neither the value nor the gradient."""
    wide = compute(x)
    return torch.where(keep, wide, torch.full((), other, dtype=wide.dtype, device=x.device))


def token_weights(
    seqs: Sequences,
    reduction: str,
    dtype: torch.dtype,
    sequence_weights: Tensor | None = None,
) -> Tensor:
    """w of every slot, times its sequence's weight; 0 where masked."""
    weights = seqs.keep.to(dtype)
    if sequence_weights is not None:
        weights = select(seqs.keep, seqs.spread(sequence_weights)).to(dtype)
    if reduction == "seq-mean-token-mean":
        weights = weights / seqs.spread(seqs.tokens.clamp(min=1)).to(dtype)
    return weights


def own_denom(seqs: Sequences, reduction: str) -> Tensor:
    """The reduction's own D, float64; 0 for "token-sum"."""
    wide = torch.float64
    if reduction == "token-mean":
        return seqs.kept
    if reduction == "token-sum":
        return torch.zeros((), dtype=wide, device=seqs.keep.device)
    live = (seqs.tokens > 0).sum(dtype=wide)
    return live * seqs.width if reduction == "seq-mean-token-sum-norm" else live


def reduce_loss(
    terms: Tensor,
    seqs: Sequences,
    reduction: str,
    denom: float | Tensor | None,
    sequence_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ w·l / D: the 0-d loss, the weights w, and the reduction's own D (0 for "token-sum").

    Reductions as in verl's `agg_loss` (verl/trainer/ppo/core_algos.py).
    """
    keep, own = seqs.keep, own_denom(seqs, reduction)
    weights = token_weights(seqs, reduction, terms.dtype, sequence_weights)
    if denom is None:
        divisor = torch.ones_like(own) if reduction == "token-sum" else own
    else:
        divisor = torch.as_tensor(denom, device=terms.device)
    total = torch.where(keep, weights * terms, torch.zeros_like(terms)).sum()
    nothing = divisor <= 0  # NaN passes
    loss = torch.where(nothing, total * 0.0, total / divisor.where(~nothing, 1.0).to(total.dtype))
    return loss, weights, own


def clamp(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """As `torch.clamp`, but the slope passes where x is NaN, so that it shows in the gradient."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def stats_of(device: torch.device, **fields: Tensor) -> Stats:
    """The statistics tensor with the given fields; the others are their neutral elements."""
    values = torch.zeros(len(STATS_FIELDS), dtype=torch.float64, device=device)
    neutral = {"ratio_min": float("inf"), "ratio_max": float("-inf")}
    for name, x in (neutral | fields).items():
        slot = values[STATS_FIELDS.index(name)]
        slot.copy_(x.detach()) if isinstance(x, Tensor) else slot.fill_(x)
    return Stats(values)


def whitening(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1/√(var + 1e-8) with Bessel's correction; 0 where there is no variance."""
    n, mean, m2 = moments.unbind()
    var = torch.where(n > 1, m2 / (n - 1).clamp(min=1), torch.zeros_like(m2))
    return mean, torch.where(var == 0, torch.zeros_like(var), (var + 1e-8).rsqrt())


def whitened(
    advantages: Tensor, moments: Tensor | None, keep: Tensor, dtype: torch.dtype
) -> Tensor:
    """The advantages, standardised where there are moments; 0 where masked."""
    adv = select(keep, advantages).to(dtype)
    if moments is None:
        return adv
    mean, rstd = whitening(moments)
    return select(keep, (adv.double() - mean) * rstd).to(dtype)


def kl_terms(
    x: Tensor, estimator: str, clamp: float | None, ratio_clip: Tensor | None = None
) -> Tensor:
    """Estimates of KL(π‖π_ref) from x = log π − log π_ref of samples of π.

    k1, k2, k3: Schulman 2020, "Approximating KL Divergence". A trailing "+" keeps the value and
    takes k2's gradient (the unbiased one), times `ratio_clip` where given.
    """
    name = estimator.rstrip("+")
    # exp of what the clamp keeps: a huge exp would make 0·inf in the gradient.
    if name == "k1":
        value = x
    elif name == "k2":
        value = 0.5 * x * x
    elif name == "k3":
        value = torch.expm1(-x) + x
    else:
        value = x * torch.where(x.isnan(), x, x.sign()).detach()  # |x|; NaN has a NaN slope
    if clamp is not None:
        inside = value.detach().abs() <= clamp
        # NaN is neither inside nor outside: it passes, so that it shows.
        inside = inside | value.detach().isnan()
        safe = torch.where(inside, x, torch.zeros_like(x))
        kept = kl_terms(safe, name, None)
        value = torch.where(inside, kept, value.detach().clamp(-clamp, clamp))
    if not estimator.endswith("+"):
        return value
    surrogate = 0.5 * x * x if ratio_clip is None else 0.5 * x * x * ratio_clip
    return value.detach() + (surrogate - surrogate.detach())
