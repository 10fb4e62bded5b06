"""Policy loss, gradients and all statistics: one launch, one read.

Where a token needs its whole sequence first (gspo, seq-mean-token-mean, a weight per sequence), or
sequences are packed, a launch that counts goes before it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .codes import (
    N_SUMS,
    REDUCTION_SEQ_MEAN_TOKEN_MEAN,
    VARIANT_GIVEN,
    VARIANT_GSPO,
    PolicyCodes,
    PolicyParams,
)
from .common import (
    MAX_REGISTERS,
    Strided,
    clamp,
    coefficient,
    counter,
    expm1_minus,
    flag_bytes,
    is_last,
    load_f32,
    on_device,
    strided,
    unspecialised,
)
from .loss_tiles import (
    DIMS,
    PARTS,
    SHARED_INTEGERS,
    SHARED_POINTERS,
    TWO_RESIDENT,
    Counts,
    Divisor,
    empty_outputs,
    live_rows,
    load_token,
    load_token_flag,
    merge_loss,
    plan,
    sequence_of,
    stack8,
    token_offset,
    token_slots,
)
from .token_loss import At, PolicyOptions, clamped_log_ratio, policy_loss, whitened

# Positions in STATS_FIELDS. Of its first 16 sums, N_SEQS and LOSS_DENOM are formed at the end; a
# program's partial results hold the ratio's extremes in their place.
N_SEQS = tl.constexpr(1)
LOSS = tl.constexpr(2)
LOSS_DENOM = tl.constexpr(3)
RATIO = tl.constexpr(10)
RATIO_SQ = tl.constexpr(11)
WIDTH = tl.constexpr(16)
# Tensors of tokens, as the kernel's arguments name them, and integers of its own.
TOKENS = ("logp", "old", "adv", "mask", "is", "ent", "ref")
CODES = ("variant", "estimator", "straight", "kl_weight", "seq_weight_step")


@triton.jit
def tile_sums(
    keep,
    loss,
    policy,
    entropy,
    kl,
    log_ratio,
    ratio,
    clips,
    dual_clips,
    options,
    N: tl.constexpr,
):
    """The first 16 of STATS_FIELDS over a tile of N tokens, (16,) float64."""
    below = ratio < options.ratio_low
    above = ratio > options.ratio_high
    zero = tl.zeros_like(ratio)
    even = stack8(
        tl.where(keep, 1.0, 0.0),
        tl.where(keep, loss, 0.0),
        tl.where(keep, policy, 0.0),
        tl.where(keep, kl, 0.0),
        tl.where(keep, 0.5 * log_ratio * log_ratio, 0.0),
        tl.where(keep, ratio, 0.0),
        tl.where(keep & clips & below, 1.0, 0.0),
        tl.where(keep & dual_clips, 1.0, 0.0),
    )
    odd = stack8(
        zero,
        zero,
        tl.where(keep, entropy, 0.0),
        tl.where(keep, -log_ratio, 0.0),
        tl.where(keep, expm1_minus(log_ratio), 0.0),
        zero,
        tl.where(keep & clips & above, 1.0, 0.0),
        tl.where(keep & (below | above), 1.0, 0.0),
    )
    sums = tl.sum(tl.reshape(tl.join(even, odd), [N, 16]), axis=0).to(tl.float64)
    wide = tl.where(keep, ratio.to(tl.float64), 0.0)  # fp32 overflows at a log-ratio of 44
    squares = tl.sum(tl.ravel(wide * wide))
    return tl.where(tl.arange(0, 16) == RATIO_SQ, squares, sums)


@triton.jit
def least_ratios(keep, ratio):
    """(2,) the least ratio and the least negative one: one reduction for both extremes."""
    low, high = tl.where(keep, ratio, float("inf")), tl.where(keep, -ratio, float("inf"))
    return tl.min(tl.join(low, high), axis=0)


@triton.jit
def pair_of(x):
    """Both scalars of a (2,) tensor."""
    i = tl.arange(0, 2)
    return tl.sum(tl.where(i == 0, x, 0.0)), tl.sum(tl.where(i == 1, x, 0.0))


@triton.jit
def extremes_of_parts(parts_ptr, n_parts):
    """(PARTS, 2) what `least_ratios` gave each program."""
    part = tl.arange(0, PARTS)
    at = parts_ptr + part * WIDTH
    low = tl.load(at + N_SEQS, mask=part < n_parts, other=float("inf"))
    high = tl.load(at + LOSS_DENOM, mask=part < n_parts, other=float("inf"))
    return tl.join(low.to(tl.float32), high.to(tl.float32))


@triton.jit
def store_stats(stats_ptr, sums, low, high, n_seqs, own):
    i = tl.arange(0, WIDTH)
    sums = tl.where(i == N_SEQS, n_seqs, tl.where(i == LOSS_DENOM, own, sums))
    tl.store(stats_ptr + i, sums)
    tl.store(stats_ptr + WIDTH + i, tl.zeros([WIDTH], tl.float64), mask=i < N_SUMS - WIDTH)
    # Minima drop a NaN ratio; the sum of ratios has kept it.
    ratios = tl.sum(tl.where(i == RATIO, sums, 0.0))
    tl.store(stats_ptr + N_SUMS, tl.where(ratios == ratios, low, ratios))
    tl.store(stats_ptr + N_SUMS + 1, tl.where(ratios == ratios, high, ratios))


# fmt: off
@triton.jit(
    **unspecialised(
        TOKENS,
        DIMS,
        (*SHARED_POINTERS, "moments", "seq_weight", "ent_coef", "kl_coef", "grad_ent"),
        (*SHARED_INTEGERS, *CODES),
    )
)
def ppo_kernel(
    logp_ptr, logp_row: tl.int64, logp_col: tl.int64,
    old_ptr, old_row: tl.int64, old_col: tl.int64,
    adv_ptr, adv_row: tl.int64, adv_col: tl.int64,
    mask_ptr, mask_row: tl.int64, mask_col: tl.int64,
    is_ptr, is_row: tl.int64, is_col: tl.int64,
    ent_ptr, ent_row: tl.int64, ent_col: tl.int64,
    ref_ptr, ref_row: tl.int64, ref_col: tl.int64,
    moments_ptr,  # (3,) float64
    cu_ptr,  # (S + 1,)
    counts_ptr,  # int32, see Counts
    means_ptr,  # (S,) fp32, where the ratio is the sequence's
    seq_weight_ptr, seq_weight_step: tl.int64,  # (S,)
    ent_coef_ptr, kl_coef_ptr, denom_ptr,
    grad_ptr, grad_ent_ptr, loss_ptr, scale_ptr, stats_ptr,
    parts_ptr,  # (programs, 16) float64
    counter_ptr,
    n_rows: tl.int64, n_cols: tl.int64, n_tiles: tl.int32, n_counts: tl.int32, n_pieces: tl.int32,
    n_seqs: tl.int64,
    variant: tl.int32, estimator: tl.int32, straight: tl.int32, reduction: tl.int32,
    kl_weight: tl.int32,
    ratio_low, ratio_high, dual_clip, log_min, log_max,
    ent_coef, kl_coef, kl_clamp, kl_ratio_clip, denom,
    PER_SEQUENCE: tl.constexpr,  # counts holds the tokens of each sequence
    LOOK_UP: tl.constexpr,  # and tokens need them
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    # fmt: on
    logprobs = Strided(logp_ptr, logp_row, logp_col)
    old_logprobs = Strided(old_ptr, old_row, old_col)
    advantages = Strided(adv_ptr, adv_row, adv_col)
    mask = Strided(mask_ptr, mask_row, mask_col)
    is_weights = Strided(is_ptr, is_row, is_col)
    entropies = Strided(ent_ptr, ent_row, ent_col)
    ref_logprobs = Strided(ref_ptr, ref_row, ref_col)
    kl_coef = coefficient(kl_coef_ptr, kl_coef)
    ent_coef = coefficient(ent_coef_ptr, ent_coef)
    options = PolicyOptions(
        variant,
        estimator,
        straight,
        kl_weight,
        ratio_low,
        ratio_high,
        dual_clip,
        log_min,
        log_max,
        kl_coef,
        kl_clamp,
        kl_ratio_clip,
    )

    acc = tl.zeros([WIDTH], tl.float64)
    least = tl.full([2], float("inf"), tl.float32)
    i = tl.arange(0, WIDTH)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        row, col, inside = token_slots(tile, n_rows, n_cols, ROWS, COLS)
        keep = load_token_flag(mask, row, col, inside)
        logp = load_token(logprobs, row, col, keep, 0.0)
        adv = load_token(advantages, row, col, keep, 0.0)
        adv = tl.where(variant == VARIANT_GIVEN, adv, whitened(adv, moments_ptr))
        old = At(old_ptr, token_offset(old_logprobs, row, col))
        log_ratio, unclamped = clamped_log_ratio(logp, old, keep, log_min, log_max)
        ratio = tl.exp(log_ratio)
        weight = 1.0
        if LOOK_UP:
            seq = sequence_of(cu_ptr, n_seqs, row, col)
            count = tl.load(counts_ptr + seq, mask=keep, other=1).to(tl.float32)
            means = reduction == REDUCTION_SEQ_MEAN_TOKEN_MEAN
            weight = tl.where(means, tl.div_rn(1.0, count), 1.0)
            if seq_weight_ptr is not None:
                weight *= load_f32(seq_weight_ptr, seq * seq_weight_step, keep, 1.0)
            if means_ptr is not None:
                mean = tl.load(means_ptr + seq, mask=keep, other=0.0)
                ratio = tl.exp(clamp(mean, log_min, log_max))
                unclamped = ((mean < log_min) | (mean > log_max)) == 0
        is_weight = At(is_ptr, token_offset(is_weights, row, col))
        ref = At(ref_ptr, token_offset(ref_logprobs, row, col))
        loss, term, kl, slope, clips, dual_clips = policy_loss(
            logp, keep, adv, log_ratio, unclamped, ratio, old, is_weight, ref, options
        )
        entropy = load_token(entropies, row, col, keep, 0.0)
        if ent_ptr is not None:
            loss = tl.fma(-ent_coef, entropy, loss)
        if grad_ent_ptr is not None:
            to_ptr = grad_ent_ptr + row * n_cols + col
            tl.store(to_ptr, tl.where(keep, -(weight * ent_coef), 0.0), mask=inside)
        if grad_ptr is not None:
            to_ptr = grad_ptr + row * n_cols + col
            tl.store(to_ptr, tl.where(keep, weight * slope, 0.0), mask=inside)
        loss, term = weight * loss, weight * term
        acc += tile_sums(
            keep,
            loss,
            term,
            entropy,
            kl,
            log_ratio,
            ratio,
            clips,
            dual_clips,
            options,
            ROWS * COLS,
        )
        least = tl.minimum(least, least_ratios(keep, ratio))
        if not PER_SEQUENCE:
            tl.store(counts_ptr + tile, live_rows(keep, ROWS, COLS))
    low, minus_high = pair_of(least)
    acc = tl.where(i == N_SEQS, low, tl.where(i == LOSS_DENOM, minus_high, acc))
    tl.store(parts_ptr + tl.program_id(0) * WIDTH + i, acc)
    if is_last(counter_ptr):
        counts = Counts(counts_ptr, n_counts, n_pieces)
        divisor = Divisor(reduction, denom_ptr, denom)
        extremes = extremes_of_parts(parts_ptr, tl.num_programs(0))
        sums, n_live, own = merge_loss(
            parts_ptr, counts, divisor, n_cols, loss_ptr, scale_ptr, LOSS, WIDTH, PER_SEQUENCE
        )
        low, minus_high = pair_of(tl.min(extremes, axis=0))
        store_stats(stats_ptr, sums, low, -minus_high, n_live, own)


def registers(*operands: bool) -> dict[str, int]:
    """Limit of registers: two programs are resident only if none of these operands is there."""
    return MAX_REGISTERS if any(operands) else TWO_RESIDENT


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    is_weights: Tensor | None,
    moments: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_weights: Tensor | None,
    entropy_coef_tensor: Tensor | None,
    kl_coef_tensor: Tensor | None,
    denom_tensor: Tensor | None,
    codes: list[int],
    params: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of ppo_fast/_boundary/schema.py: (loss, stats, scale, grads)."""
    c, p = PolicyCodes(*codes), PolicyParams(*params)
    by_sequence = c.variant == VARIANT_GSPO.value or bool(c.by_sequence)
    weighted = sequence_weights is not None
    loss, stats, scale, grads = outputs = empty_outputs(logprobs, c.n_grads)
    mask = flag_bytes(mask)
    optional = [x is not None for x in (is_weights, entropy, ref_logprobs)]
    tensors = (logprobs, old_logprobs, advantages, mask, is_weights, entropy, ref_logprobs)
    with on_device(logprobs):
        tiles = plan(
            logprobs,
            old_logprobs,
            mask,
            cu_seqlens,
            c.reduction,
            means=by_sequence,
            weighted=weighted,
        )
        parts = stats.new_empty(tiles.programs, WIDTH.value)
        ppo_kernel[(tiles.programs,)](
            *(arg for x in tensors for arg in strided(x)),
            *(moments, cu_seqlens, tiles.counts, tiles.means),
            *(sequence_weights, sequence_weights.stride(0) if weighted else 0),
            *(entropy_coef_tensor, kl_coef_tensor, denom_tensor),
            *(*grads, *[None] * (2 - c.n_grads), loss, scale, stats, parts, counter(logprobs)),
            *(*tiles.sizes, c.variant, c.estimator, c.straight_through, c.reduction),
            c.kl_weight,
            *(1.0 - p.clip_low, 1.0 + p.clip_high, p.dual_clip, p.log_ratio_min, p.log_ratio_max),
            *(p.entropy_coef, p.kl_coef, p.kl_clamp, p.kl_ratio_clip, p.denom),
            **tiles.constants | registers(tiles.constants["LOOK_UP"], *optional),
        )
    return outputs
