"""Codes of the options for Triton. Written by `python -m ppo_fast._boundary.emit`."""

from typing import NamedTuple

import triton.language as tl

VARIANT_CLIP = tl.constexpr(0)
VARIANT_GSPO = tl.constexpr(1)
VARIANT_CISPO = tl.constexpr(2)
VARIANT_PENALTY = tl.constexpr(3)
VARIANT_LINEAR = tl.constexpr(4)
VARIANT_GIVEN = tl.constexpr(5)

ESTIMATOR_K1 = tl.constexpr(0)
ESTIMATOR_K2 = tl.constexpr(1)
ESTIMATOR_K3 = tl.constexpr(2)
ESTIMATOR_ABS = tl.constexpr(3)

REDUCTION_TOKEN_MEAN = tl.constexpr(0)
REDUCTION_TOKEN_SUM = tl.constexpr(1)
REDUCTION_SEQ_MEAN_TOKEN_MEAN = tl.constexpr(2)
REDUCTION_SEQ_MEAN_TOKEN_SUM = tl.constexpr(3)
REDUCTION_SEQ_MEAN_TOKEN_SUM_NORM = tl.constexpr(4)

KL_WEIGHT_NONE = tl.constexpr(0)
KL_WEIGHT_RATIO = tl.constexpr(1)
KL_WEIGHT_SCORE = tl.constexpr(2)

FORM_UNCLIPPED = tl.constexpr(0)
FORM_MAX = tl.constexpr(1)
FORM_CLIPPED = tl.constexpr(2)

MASKED_CARRY = tl.constexpr(0)
MASKED_ZERO = tl.constexpr(1)

SCORE_AT_LAST_TOKEN = tl.constexpr(0)
SCORE_AT_FIRST_PAD = tl.constexpr(1)
SCORE_AT_PER_TOKEN = tl.constexpr(2)

DIVERGENCE_REVERSE = tl.constexpr(0)
DIVERGENCE_FORWARD = tl.constexpr(1)
DIVERGENCE_JSD = tl.constexpr(2)
DIVERGENCE_MIXED = tl.constexpr(3)

# The statistics: N_SUMS sums, then the smallest and the largest ratio.
N_STATS = tl.constexpr(34)
N_SUMS = tl.constexpr(32)


class PolicyCodes(NamedTuple):
    """`codes` of a policy loss, in order."""

    variant: int
    estimator: int
    straight_through: int
    reduction: int
    kl_weight: int
    by_sequence: int
    n_grads: int


class PolicyParams(NamedTuple):
    """`params` of a policy loss, in order."""

    clip_low: float
    clip_high: float
    dual_clip: float
    log_ratio_min: float
    log_ratio_max: float
    entropy_coef: float
    kl_coef: float
    kl_clamp: float
    kl_ratio_clip: float
    denom: float


class ValueCodes(NamedTuple):
    """`codes` of a value loss, in order."""

    form: int
    reduction: int
    n_grads: int


class ValueParams(NamedTuple):
    """`params` of a value loss, in order."""

    clip: float
    scale: float
    denom: float
