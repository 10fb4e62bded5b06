"""Policy loss, gradients and all statistics: one launch, one read.

Where a token needs its whole sequence first (gspo, seq-mean-token-mean), or sequences are packed,
a launch that counts goes before it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .arrival import counter, is_last
from .common import flag_bytes, load_f32, load_flag, on_device
from .kl import coefficient
from .options import N_SUMS, REDUCTION_SEQ_MEAN_TOKEN_MEAN, VARIANT_GSPO
from .reduce_loss import empty_outputs, live_rows, merge_loss, plan, token_slots
from .sequences import sequence_of, strided
from .token_loss import RATIO, log_ratio, policy_loss, sums_of, whitened

# Of the 16 sums, in the order of STATS_FIELDS, two are formed elsewhere; a program's partial
# results hold the ratio's extremes in their place.
LOSS = tl.constexpr(2)
N_SEQS = tl.constexpr(1)
LOSS_DENOM = tl.constexpr(3)
WIDTH = tl.constexpr(16)


@triton.jit
def store_stats(stats_ptr, sums, low, high, n_seqs, own):
    i = tl.arange(0, WIDTH)
    sums = tl.where(i == N_SEQS, n_seqs, tl.where(i == LOSS_DENOM, own, sums))
    tl.store(stats_ptr + i, sums)
    tl.store(stats_ptr + WIDTH + i, tl.zeros([WIDTH], tl.float64), mask=i < N_SUMS - WIDTH)
    # Minima drop a NaN ratio; the sum of ratios has kept it.
    ratios = tl.sum(tl.where(i == RATIO, sums, 0.0))
    low = tl.sum(tl.where(i == N_SEQS, low, 0.0))
    high = tl.sum(tl.where(i == LOSS_DENOM, high, 0.0))
    tl.store(stats_ptr + N_SUMS, tl.where(ratios == ratios, low, ratios))
    tl.store(stats_ptr + N_SUMS + 1, tl.where(ratios == ratios, high, ratios))


# fmt: off
@triton.jit
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
    counts_ptr,  # int32, see live_sequences
    means_ptr,  # (S,) fp32, gspo only
    ent_coef_ptr, kl_coef_ptr, denom_ptr,
    grad_ptr, grad_ent_ptr, loss_ptr, scale_ptr, stats_ptr,
    parts_ptr,  # (programs, 16) float64
    counter_ptr,
    n_rows: tl.int64, n_cols: tl.int64, n_tiles: tl.int64, n_counts: tl.int64, n_pieces: tl.int64,
    n_seqs: tl.int64,
    variant: tl.int32, estimator: tl.int32, straight: tl.int32, reduction: tl.int32,
    ratio_low, ratio_high, dual, log_min, log_max,
    ent_coef, kl_coef, kl_clamp, ratio_clip, denom,
    PER_SEQUENCE: tl.constexpr,  # counts holds the tokens of each sequence
    LOOK_UP: tl.constexpr,  # and tokens need them
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    # fmt: on
    kl_coef = coefficient(kl_coef_ptr, kl_coef)
    ent_coef = coefficient(ent_coef_ptr, ent_coef)
    acc = tl.zeros([WIDTH], tl.float64)
    low = tl.full([], float("inf"), tl.float32)
    high = tl.full([], float("-inf"), tl.float32)
    i = tl.arange(0, WIDTH)
    for tile in range(tl.program_id(0).to(tl.int64), n_tiles, tl.num_programs(0)):
        row, col, inside = token_slots(tile, n_rows, n_cols, ROWS, COLS)
        keep = load_flag(mask_ptr, row * mask_row + col * mask_col, inside)
        logp = load_f32(logp_ptr, row * logp_row + col * logp_col, keep, 0.0)
        adv = load_f32(adv_ptr, row * adv_row + col * adv_col, keep, 0.0)
        adv = whitened(adv, moments_ptr)
        offset = row * old_row + col * old_col
        d, free = log_ratio(logp, old_ptr, offset, keep, log_min, log_max)
        ratio = tl.exp(d)
        weight = 1.0
        if LOOK_UP:
            seq = sequence_of(cu_ptr, n_seqs, row, col)
            count = tl.load(counts_ptr + seq, mask=keep, other=1).to(tl.float32)
            means = reduction == REDUCTION_SEQ_MEAN_TOKEN_MEAN
            weight = tl.where(means, tl.div_rn(1.0, count), 1.0)
            if means_ptr is not None:
                ratio = tl.exp(tl.load(means_ptr + seq, mask=keep, other=0.0))
        loss, term, kl, slope, clips, capped = policy_loss(
            variant, estimator, straight, logp, keep, adv, d, free, ratio, old_ptr, offset,
            is_ptr, row * is_row + col * is_col, ref_ptr, row * ref_row + col * ref_col,
            ratio_low, ratio_high, dual, log_min, log_max, kl_coef, kl_clamp, ratio_clip,
        )  # fmt: skip
        entropy = load_f32(ent_ptr, row * ent_row + col * ent_col, keep, 0.0)
        if ent_ptr is not None:
            loss = tl.fma(-ent_coef, entropy, loss)
        if grad_ent_ptr is not None:
            tl.store(grad_ent_ptr + row * n_cols + col,
                     tl.where(keep, -(weight * ent_coef), 0.0), mask=inside)  # fmt: skip
        if grad_ptr is not None:
            tl.store(grad_ptr + row * n_cols + col,
                     tl.where(keep, weight * slope, 0.0), mask=inside)  # fmt: skip
        acc += sums_of(keep, weight * loss, weight * term, entropy, kl, d, ratio, clips, capped,
                       ratio_low, ratio_high, ROWS * COLS)  # fmt: skip
        low = tl.minimum(low, tl.min(tl.where(keep, ratio, float("inf"))))
        high = tl.maximum(high, tl.max(tl.where(keep, ratio, float("-inf"))))
        if not PER_SEQUENCE:
            tl.store(counts_ptr + tile, live_rows(keep, ROWS, COLS))
    acc = tl.where(i == N_SEQS, low, tl.where(i == LOSS_DENOM, high, acc))
    tl.store(parts_ptr + tl.program_id(0) * WIDTH + i, acc)
    if is_last(counter_ptr):
        sums, lows, highs, n_live, own = merge_loss(
            parts_ptr, counts_ptr, n_counts, n_pieces, n_cols, reduction, denom_ptr, denom,
            loss_ptr, scale_ptr, LOSS, WIDTH, PER_SEQUENCE,
        )  # fmt: skip
        store_stats(stats_ptr, sums, lows, highs, n_live, own)


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
    entropy_coef: Tensor | None,
    kl_coef: Tensor | None,
    denom: Tensor | None,
    codes: list[int],
    params: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ppo_fast/_schema.py; (loss, stats, scale, grads)."""
    clip_low, clip_high, dual, log_min, log_max, *coefs = params
    bounds = (log_min, log_max) if codes[0] == VARIANT_GSPO.value else None
    *codes, n_grads = codes
    loss, stats, scale, grads = outputs = empty_outputs(logprobs, n_grads)
    tensors = (
        logprobs, old_logprobs, advantages, flag_bytes(mask), is_weights, entropy, ref_logprobs
    )  # fmt: skip
    with on_device(logprobs):
        how = plan(logprobs, old_logprobs, mask, cu_seqlens, codes[3], bounds)
        parts = stats.new_empty(how.programs, WIDTH.value)
        ppo_kernel[(how.programs,)](
            *(arg for x in tensors for arg in strided(x)),
            moments, cu_seqlens, how.counts, how.means, entropy_coef, kl_coef, denom,
            *grads, *[None] * (2 - n_grads), loss, scale, stats, parts, counter(logprobs),
            *how.sizes, *codes,
            1.0 - clip_low, 1.0 + clip_high, dual, log_min, log_max, *coefs, **how.options,
        )  # fmt: skip
    return outputs
