"""The policy loss of one token and its derivative; variants and estimators chosen at run time.

The KL estimates are Schulman's (2020) of KL(π‖π_ref), from x = log π − log π_ref.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .codes import (
    ESTIMATOR_ABS,
    ESTIMATOR_K1,
    ESTIMATOR_K2,
    KL_WEIGHT_NONE,
    KL_WEIGHT_RATIO,
    VARIANT_CISPO,
    VARIANT_GIVEN,
    VARIANT_GSPO,
    VARIANT_LINEAR,
    VARIANT_PENALTY,
)
from .common import clamp, expm1, expm1_minus, load_f32


class PolicyOptions(NamedTuple):
    """A policy loss's options inside a kernel, scalars all."""

    variant: Any
    estimator: Any
    straight: Any  # straight-through gradient of the KL estimate
    kl_weight: Any
    ratio_low: Any  # bounds of the clipped ratio
    ratio_high: Any
    dual_clip: Any
    log_min: Any  # bounds of the log-ratio
    log_max: Any
    kl_coef: Any
    kl_clamp: Any
    kl_ratio_clip: Any


class At(NamedTuple):
    """Optional per-token values at offsets; `ptr` is None where they are absent."""

    ptr: Any
    offset: Any


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
def clamped_log_ratio(logp, old, keep, log_min, log_max):
    """The clamped log π − log π_old, and whether the clamp left it alone, as it does a NaN.

    0 without π_old.
    """
    if old.ptr is None:
        return tl.zeros_like(logp), keep
    else:
        raw = logp - load_f32(old.ptr, old.offset, keep, 0.0)
        return clamp(raw, log_min, log_max), ((raw < log_min) | (raw > log_max)) == 0


@triton.jit
def kl_value(x, estimator):
    """k1, k2, k3 or abs of x, not clamped yet."""
    value = tl.where(estimator == ESTIMATOR_K2, 0.5 * x * x, expm1_minus(-x))
    value = tl.where(estimator == ESTIMATOR_K1, x, value)
    return tl.where(estimator == ESTIMATOR_ABS, tl.abs(x), value)


@triton.jit
def kl_slope(x, estimator):
    """The derivative of `kl_value`."""
    sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # 0, or NaN
    slope = tl.where(estimator == ESTIMATOR_K2, x, -expm1(-x))
    slope = tl.where(estimator == ESTIMATOR_K1, 1.0, slope)
    return tl.where(estimator == ESTIMATOR_ABS, sign, slope)


@triton.jit
def kl_term(x, ratio, unclamped, options):
    """The clamped estimate at x, and its derivative by the token's log-probability.

    Selected, not multiplied: outside the clamp the slope may be infinite.
    """
    kl_clamp, ratio_clip = options.kl_clamp, options.kl_ratio_clip
    value = kl_value(x, options.estimator)
    slope = tl.where(tl.abs(value) > kl_clamp, 0.0, kl_slope(x, options.estimator))
    limit = tl.where(ratio > ratio_clip, ratio_clip, ratio)  # a NaN passes
    limit = tl.where(ratio_clip < float("inf"), limit, 1.0)
    slope = tl.where(options.straight != 0, x * limit, slope)
    # x = −log_ratio in the penalty variant, where the log-ratio may be clamped.
    backwards = tl.where(unclamped, -slope, 0.0)
    slope = tl.where(options.variant == VARIANT_PENALTY, backwards, slope)
    return clamp(value, -kl_clamp, kl_clamp), slope


@triton.jit
def times_ratio(ratio, x):
    """ratio·x; 0 times a ratio that overflows is 0, as the exact product would be."""
    return tl.where((x == 0) & (ratio >= 0), 0.0, ratio * x)


@triton.jit
def weighted_kl(value, slope, ratio, unclamped, options):
    """The KL term under `kl_weight`: W·k, and its derivative W·k' + W'·k.

    W is the ratio, whose derivative is 0 where its log-ratio is clamped (TRL's
    use_bias_correction_kl), or exp(l − sg l), which is 1 (NeMo-RL).
    """
    by_ratio = options.kl_weight == KL_WEIGHT_RATIO
    both = slope + tl.where(by_ratio & (unclamped == 0), 0.0, value)
    both = tl.where(by_ratio, times_ratio(ratio, both), both)
    term = tl.where(by_ratio, times_ratio(ratio, value), value)
    return term, tl.where(options.kl_weight == KL_WEIGHT_NONE, slope, both)


@triton.jit
def surrogate(logp, unclamped, ratio, adv, excess, options):
    """The policy term, its derivative, and whether the clip and the dual clip are active.

    `unclamped`: the ratio's logarithm is not clamped. `excess`: ρ − ρ' of the linear variant. An
    advantage of 0 gives 0 even if the ratio overflows, as the exact product would.
    """
    variant, kl_coef = options.variant, options.kl_coef
    plain = -adv * ratio
    clipped = -adv * clamp(ratio, options.ratio_low, options.ratio_high)
    # At a tie the whole gradient passes, which is what maximum and clamp give together.
    larger = clipped > plain
    term = tl.where(larger, clipped, plain)
    slope = tl.where(larger, 0.0, tl.where(unclamped, plain, 0.0))
    cap = -adv * options.dual_clip
    capped = (adv < 0) & (term > cap)
    dual_clips = tl.where(variant <= VARIANT_GSPO, capped, capped & (capped == 0))
    term = tl.where(capped, cap, term)
    slope = tl.where(capped, 0.0, slope)

    straight = tl.where(unclamped, plain, 0.0)
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
        dual_clips,
    )


@triton.jit
def policy_loss(logp, keep, adv, log_ratio, unclamped, ratio, old, is_weights, ref, options):
    """A token's loss without its entropy, policy term, KL, slope, and the two clips' activity.

    `log_ratio`, `unclamped`: see `clamped_log_ratio`; `ratio` is e^log_ratio. Where the ratio is
    the sequence's, so is `unclamped`. An is_weight of 0 drops the policy term, whatever it is.
    `old`, `is_weights`, `ref`: each an At.
    """
    excess = tl.zeros_like(ratio)
    x = tl.where(options.variant == VARIANT_PENALTY, -log_ratio, 0.0)
    if ref.ptr is not None:
        ref_logp = load_f32(ref.ptr, ref.offset, keep, 0.0)
        x = logp - ref_logp
        old_logp = logp if old.ptr is None else load_f32(old.ptr, old.offset, keep, 0.0)
        ref_ratio = tl.exp(clamp(ref_logp - old_logp, options.log_min, options.log_max))
        both = (ratio >= 0) & (ref_ratio >= 0)
        excess = tl.where((adv == 0) & both, 0.0, ratio - ref_ratio)
    term, slope, clips, dual_clips = surrogate(logp, unclamped, ratio, adv, excess, options)
    is_weight = load_f32(is_weights.ptr, is_weights.offset, keep, 1.0)
    term = tl.where(is_weight == 0, 0.0, term * is_weight)
    slope = tl.where(is_weight == 0, 0.0, slope * is_weight)
    given = options.variant == VARIANT_GIVEN
    term = tl.where(given, is_weight, term)
    slope = tl.where(given, adv, slope)
    clips = tl.where(given, clips & (clips == 0), clips)
    kl, kl_derivative = kl_term(x, ratio, unclamped, options)
    weighted = kl
    if ref.ptr is not None:
        weighted, kl_derivative = weighted_kl(kl, kl_derivative, ratio, unclamped, options)
    linear = options.variant == VARIANT_LINEAR  # its KL is in the policy term
    loss = tl.where(linear, term, tl.fma(options.kl_coef, weighted, term))
    slope = tl.where(linear, slope, tl.fma(options.kl_coef, kl_derivative, slope))
    return loss, term, kl, slope, clips, dual_clips
