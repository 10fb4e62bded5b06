"""The policy loss of one token and its derivative; variants and estimators chosen at run time."""

import triton
import triton.language as tl

from .common import expm1_minus, load_f32
from .kl import clamp, kl_slope, kl_value
from .options import VARIANT_CISPO, VARIANT_GSPO, VARIANT_LINEAR, VARIANT_PENALTY
from .reduce_loss import stack8

RATIO = tl.constexpr(10)  # in STATS_FIELDS
RATIO_SQ = tl.constexpr(11)


@triton.jit
def whitened(adv, moments_ptr):
    """(A − mean)/√(var + 1e-8) with Bessel's correction; 0 where there is no variance."""
    if moments_ptr is None:
        return adv
    else:
        n = tl.load(moments_ptr)
        mean = tl.load(moments_ptr + 1)
        var = tl.where(n > 1, tl.load(moments_ptr + 2) / tl.maximum(n - 1, 1.0), 0.0)
        rstd = (1.0 / tl.sqrt(var + 1e-8)).to(tl.float32)
        high = mean.to(tl.float32)
        low = (mean - high).to(tl.float32)
        return tl.where(var != 0, ((adv - high) - low) * rstd, 0.0)


@triton.jit
def log_ratio(logp, old_ptr, offset, keep, log_min, log_max):
    """The clamped log π − log π_old and whether the clamp left it alone, as it does a NaN.

    0 without π_old.
    """
    if old_ptr is None:
        return tl.zeros_like(logp), keep
    else:
        raw = logp - load_f32(old_ptr, offset, keep, 0.0)
        return clamp(raw, log_min, log_max), ((raw < log_min) | (raw > log_max)) == 0


@triton.jit
def surrogate(
    variant, logp, inside, ratio, adv, low, high, dual, kl_coef, excess
):  # fmt: skip
    """The policy term, its derivative, where the clip is active and where the dual clip is.

    `inside`: the token's log-ratio is not clamped. `low`, `high`: the bounds of the ratio.
    `excess`: ρ − ρ' of the linear variant. An advantage of 0 gives 0 beside a ratio that
    overflows, as the exact product would.
    """
    plain = -adv * ratio
    clipped = -adv * clamp(ratio, low, high)
    # At a tie the whole gradient passes, which is what maximum and clamp give together.
    larger = clipped > plain
    term = tl.where(larger, clipped, plain)
    slope = tl.where(larger, 0.0, tl.where(inside, plain, 0.0))
    cap = -adv * dual
    capped = (adv < 0) & (term > cap)
    clips = tl.where(variant <= VARIANT_GSPO, capped, capped & (capped == 0))
    term = tl.where(capped, cap, term)
    slope = tl.where(capped, 0.0, slope)

    straight = tl.where(inside, plain, 0.0)
    linear = variant == VARIANT_LINEAR
    other = tl.where(linear, tl.fma(kl_coef * adv, excess, plain), plain)
    other_slope = tl.where(linear, (1.0 - kl_coef) * straight, straight)
    cispo = variant == VARIANT_CISPO
    other = tl.where(cispo, clipped * logp, other)
    other_slope = tl.where(cispo, clipped, other_slope)
    ppo = variant <= VARIANT_GSPO
    idle = (adv == 0) & (ratio >= 0) & (excess == excess)
    return (
        tl.where(idle, 0.0, tl.where(ppo, term, other)),
        tl.where(idle, 0.0, tl.where(ppo, slope, other_slope)),
        larger,
        clips,
    )


@triton.jit
def kl_term(variant, estimator, straight, x, ratio, inside, kl_clamp, ratio_clip):
    """The clamped estimate at x, and its derivative by the token's log-probability.

    Selected, not multiplied: outside the clamp the slope may be infinite.
    """
    value = kl_value(x, estimator)
    slope = tl.where(tl.abs(value) > kl_clamp, 0.0, kl_slope(x, estimator))
    limit = tl.where(ratio > ratio_clip, ratio_clip, ratio)  # a NaN passes
    limit = tl.where(ratio_clip < float("inf"), limit, 1.0)
    slope = tl.where(straight != 0, x * limit, slope)
    # x = −d in the penalty variant, where d may be clamped.
    backwards = tl.where(inside, -slope, 0.0)
    slope = tl.where(variant == VARIANT_PENALTY, backwards, slope)
    return clamp(value, -kl_clamp, kl_clamp), slope


# fmt: off
@triton.jit
def policy_loss(
    variant, estimator, straight, logp, keep, adv, d, free, ratio,
    old_ptr, old_offset, is_ptr, is_offset, ref_ptr, ref_offset,
    low, high, dual, log_min, log_max, kl_coef, kl_clamp, ratio_clip,
):
    """A token's loss but its entropy, the policy term, KL, the slope, and the active clips.

    `d`, `free` are `log_ratio`'s; `ratio` is e^d, or the sequence's.
    """
    # fmt: on
    excess = tl.zeros_like(ratio)
    x = tl.where(variant == VARIANT_PENALTY, -d, 0.0)
    if ref_ptr is not None:
        ref = load_f32(ref_ptr, ref_offset, keep, 0.0)
        x = logp - ref
        old = logp if old_ptr is None else load_f32(old_ptr, old_offset, keep, 0.0)
        ref_ratio = tl.exp(clamp(ref - old, log_min, log_max))
        both = (ratio >= 0) & (ref_ratio >= 0)
        excess = tl.where((adv == 0) & both, 0.0, ratio - ref_ratio)
    term, slope, clips, capped = surrogate(
        variant, logp, free, ratio, adv, low, high, dual, kl_coef, excess
    )
    is_weight = load_f32(is_ptr, is_offset, keep, 1.0)
    term *= is_weight
    slope *= is_weight
    kl, kl_slope = kl_term(variant, estimator, straight, x, ratio, free, kl_clamp, ratio_clip)
    linear = variant == VARIANT_LINEAR  # its KL is in the policy term
    loss = tl.where(linear, term, tl.fma(kl_coef, kl, term))
    slope = tl.where(linear, slope, tl.fma(kl_coef, kl_slope, slope))
    return loss, term, kl, slope, clips, capped


@triton.jit
def sums_of(
    keep, loss, policy, entropy, kl, d, ratio, clips, capped, low, high, N: tl.constexpr
):  # fmt: skip
    """The first 16 of STATS_FIELDS over a tile of N tokens, (16,) float64."""
    below = ratio < low
    above = ratio > high
    zero = tl.zeros_like(ratio)
    even = stack8(
        tl.where(keep, 1.0, 0.0),
        tl.where(keep, loss, 0.0),
        tl.where(keep, policy, 0.0),
        tl.where(keep, kl, 0.0),
        tl.where(keep, 0.5 * d * d, 0.0),
        tl.where(keep, ratio, 0.0),
        tl.where(keep & clips & below, 1.0, 0.0),
        tl.where(keep & capped, 1.0, 0.0),
    )
    odd = stack8(
        zero,
        zero,
        tl.where(keep, entropy, 0.0),
        tl.where(keep, -d, 0.0),
        tl.where(keep, expm1_minus(d), 0.0),
        zero,
        tl.where(keep & clips & above, 1.0, 0.0),
        tl.where(keep & (below | above), 1.0, 0.0),
    )
    even = tl.sum(tl.reshape(even, [N, 8]), axis=0)
    odd = tl.sum(tl.reshape(odd, [N, 8]), axis=0)
    sums = tl.reshape(tl.join(even, odd), [16]).to(tl.float64)
    wide = tl.where(keep, ratio.to(tl.float64), 0.0)  # fp32 overflows at a log-ratio of 44
    squares = tl.sum(tl.ravel(wide * wide))
    return tl.where(tl.arange(0, 16) == RATIO_SQ, squares, sums)
