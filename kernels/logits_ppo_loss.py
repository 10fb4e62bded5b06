"""The gradient of a policy loss by the logits, from the logits, in one launch.

A program takes whole rows, one after the other. A first pass forms the softmax's state, in the
segments and the tree of logprobs.py and so with its bits; then comes the token's slope; a second
pass reads the row once more and writes the gradient, over the logits or elsewhere. The number of
programs is such that their rows stay in L2 between the two passes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .codes import VARIANT_GIVEN, VARIANT_GSPO, PolicyCodes, PolicyParams
from .common import (
    LAUNCH,
    MAX_REGISTERS,
    Strided,
    coefficient,
    flag_bytes,
    load_f32,
    on_device,
    row_blocks,
    row_offset,
)
from .softmax import (
    LOWEST,
    RUNTIME,
    SEGMENTS,
    Gradient,
    alignment,
    bf16_rows,
    grad_columns,
    label_rows,
    merged,
    own_grad,
    row_results,
    row_start,
    row_terms,
    scan_columns,
    zero_columns,
)
from .token_loss import At, PolicyOptions, clamped_log_ratio, policy_loss, whitened

# Constants that a RowTiling does not set, or sets for one pass. Rows in flight share the L2, hence
# two of them a multiprocessor; with twice the warps, and half its registers each, they fill it.
TILING_CONSTANTS = {
    config.WIDE: {"SEGMENTS": SEGMENTS, "GRAD_UNROLL": config.WIDE_GRAD.unroll}
    | {"num_warps": 2 * config.WIDE.warps}
    | dict.fromkeys(MAX_REGISTERS, 128),
    config.NARROW: {"SEGMENTS": 1, "GRAD_UNROLL": config.NARROW_GRAD.unroll}
    | dict.fromkeys(MAX_REGISTERS),  # its registers are left to the compiler
}
# Programs per multiprocessor: as many as its registers hold.
PROGRAMS = {config.WIDE: 2, config.NARROW: 20}
# Bytes of rows in flight, in sizes of the L2: a row is on average half read or half written.
L2_ROWS = 2
# Arguments that Triton shall not specialise on: per-token values' strides, options, numbers.
TOKENS = ("old", "adv", "is", "ref", "weight")
TOKEN_STRIDES = [f"{x}_{level}" for x in TOKENS for level in ("outer", "inner")]
CODES = ("variant", "estimator", "straight", "kl_weight")
BOUNDS = ("ratio_low", "ratio_high", "dual_clip", "log_min", "log_max")
NUMBERS = (*BOUNDS, "ent_coef", "kl_coef", "kl_clamp", "kl_ratio_clip")


@triton.jit
def row_state(
    row_ptr,
    live,
    V,
    n_segments,
    inv_temperature,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    SEGMENT: tl.constexpr,
    STAGES: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """(max, sum, dot) of a row as logprobs.py's two kernels form it; dead rows are not read."""
    i = tl.arange(0, SEGMENTS)
    maxima = tl.full([SEGMENTS], LOWEST, tl.float32)
    sums = tl.zeros([SEGMENTS], tl.float32)
    dots = tl.zeros([SEGMENTS], tl.float32)
    for segment in range(tl.where(live, n_segments, 0)):
        start = segment * SEGMENT
        end = tl.minimum(start + SEGMENT, V)
        # The row is wanted again.
        part_max, part_sum, part_dot = scan_columns(
            row_ptr, start, end, V, inv_temperature, LANES, UNROLL, STAGES, "evict_last"
        )
        maxima = tl.where(i == segment, part_max, maxima)
        sums = tl.where(i == segment, part_sum, sums)
        dots = tl.where(i == segment, part_dot, dots)
    return merged(maxima, sums, dots, inv_temperature, SEGMENTS)


# fmt: off
@triton.jit(do_not_specialize=[*RUNTIME, *TOKEN_STRIDES, *CODES, *NUMBERS])
def logits_ppo_kernel(
    logits_ptr, logits_outer: tl.int64, logits_inner: tl.int64,  # (rows, V)
    tokens_ptr, tokens_outer: tl.int64, tokens_inner: tl.int64,  # (rows,), as those below
    mask_ptr, mask_outer: tl.int64, mask_inner: tl.int64,
    temperature_ptr, temperature_outer: tl.int64, temperature_inner: tl.int64,
    old_ptr, old_outer: tl.int64, old_inner: tl.int64,
    adv_ptr, adv_outer: tl.int64, adv_inner: tl.int64,
    is_ptr, is_outer: tl.int64, is_inner: tl.int64,
    ref_ptr, ref_outer: tl.int64, ref_inner: tl.int64,
    weight_ptr, weight_outer: tl.int64, weight_inner: tl.int64,
    out_ptr, out_outer: tl.int64, out_inner: tl.int64,  # (rows, V): in place, the logits' memory
    moments_ptr, ent_coef_ptr, kl_coef_ptr,  # (3,) float64, 0-d, 0-d
    logprobs_ptr, entropy_ptr,  # (rows,) fp32 contiguous
    inner, V, n_rows, n_segments, inv_temperature, ignore_index: tl.int64,
    variant: tl.int32, estimator: tl.int32, straight: tl.int32, kl_weight: tl.int32,
    ratio_low, ratio_high, dual_clip, log_min, log_max,
    ent_coef, kl_coef, kl_clamp, kl_ratio_clip,
    LANES: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTS: tl.constexpr,  # a power of two >= n_segments
    GRAD_UNROLL: tl.constexpr,
    ALIGN: tl.constexpr,  # every row starts at a multiple of this many elements
):
    # fmt: on
    logits = Strided(logits_ptr, logits_outer, logits_inner)
    tokens = Strided(tokens_ptr, tokens_outer, tokens_inner)
    mask = Strided(mask_ptr, mask_outer, mask_inner)
    temperature = Strided(temperature_ptr, temperature_outer, temperature_inner)
    old_logprobs = Strided(old_ptr, old_outer, old_inner)
    advantages = Strided(adv_ptr, adv_outer, adv_inner)
    is_weights = Strided(is_ptr, is_outer, is_inner)
    ref_logprobs = Strided(ref_ptr, ref_outer, ref_inner)
    weights = Strided(weight_ptr, weight_outer, weight_inner)
    outs = Strided(out_ptr, out_outer, out_inner)
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
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        inside = row < n_rows
        live, legal, label, label_logit, inv_temp = label_rows(
            row, inside, inner, V, logits, tokens, mask, temperature, inv_temperature, ignore_index
        )
        row_ptr = row_start(logits, row, inner, ALIGN)
        row_max, row_sum, row_dot = row_state(
            row_ptr, live, V, n_segments, inv_temp, LANES, UNROLL, SEGMENT, STAGES, SEGMENTS
        )
        valid, row_max, log_sum, logp, entropy = row_results(
            row_max, row_sum, row_dot, label_logit, inv_temp, legal
        )
        tl.store(logprobs_ptr + row, tl.where(live, logp, 0.0))
        tl.store(entropy_ptr + row, tl.where(live, entropy, 0.0))

        adv = load_f32(adv_ptr, row_offset(advantages, row, inner), live, 0.0)
        adv = whitened(adv, moments_ptr)
        old = At(old_ptr, row_offset(old_logprobs, row, inner))
        log_ratio, unclamped = clamped_log_ratio(logp, old, live, log_min, log_max)
        ratio = tl.exp(log_ratio)
        is_weight = At(is_ptr, row_offset(is_weights, row, inner))
        ref = At(ref_ptr, row_offset(ref_logprobs, row, inner))
        _, _, _, policy_slope, _, _ = policy_loss(
            logp, live, adv, log_ratio, unclamped, ratio, old, is_weight, ref, options
        )
        weight = load_f32(weight_ptr, row_offset(weights, row, inner), live, 0.0)
        grad_logprob = weight * policy_slope
        grad_entropy = -(weight * ent_coef)
        zero, offset, slope, at_label = row_terms(
            grad_logprob, grad_entropy, label_logit, inv_temp, row_max, log_sum, entropy, legal
        )
        # A clamp drops a NaN, and with it the slope: the row is NaN all the same.
        zero = (zero & legal & valid) | (live == 0)

        to_ptr = row_start(outs, row, inner, ALIGN)
        tl.debug_barrier()  # every read of the row, the label's too, precedes the first write
        if zero:
            zero_columns(to_ptr, 0, V, V, LANES * GRAD_UNROLL)
        else:
            column = tl.where(legal, label, 0).to(tl.int32)
            gradient = Gradient(column, row_max, log_sum, inv_temp, offset, slope, at_label)
            grad_columns(
                *(row_ptr, None, to_ptr, 0, V, V, gradient, own_grad, None),
                *(LANES, GRAD_UNROLL, STAGES, "evict_first"),
            )


@functools.cache
def programs(device: torch.device, row_bytes: int, most: int) -> int:
    """Number of programs: at most `most` per multiprocessor, and with their rows in L2."""
    if device.type != "cuda":
        return 2
    about = torch.cuda.get_device_properties(device)
    fit = L2_ROWS * about.L2_cache_size // (row_bytes * about.multi_processor_count)
    return int(about.multi_processor_count * max(1, min(most, fit)))


def tiling_constants(tiling: config.RowTiling, segments: int) -> dict[str, Any]:
    """The launch's constants, but ALIGN, for rows of that many segments."""
    constants = TILING_CONSTANTS[tiling]
    padded = max(constants["SEGMENTS"], triton.next_power_of_2(segments))
    return tiling.constants() | constants | {"SEGMENTS": padded} | LAUNCH


def _run(out: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The launch. Fills `out`: (part of) the logits, or like them; `args` are the schema's."""
    logits, tokens, mask, temperatures, old, adv, is_weights, moments, ref, weights, *rest = args
    entropy_coef, kl_coef, temperature, ignore_index, codes, params = rest
    c, p = PolicyCodes(*codes), PolicyParams(*params)
    if c.variant in (VARIANT_GSPO.value, VARIANT_GIVEN.value):
        raise ValueError("logits_ppo_loss: gspo and given need whole sequences")
    vocab = logits.shape[-1]
    tiling = config.forward_tiling(vocab)
    segments = max(1, triton.cdiv(vocab, tiling.segment))
    constants = tiling_constants(tiling, segments)
    weights = weights.expand(tokens.shape)
    per_token = (temperatures, old, adv, is_weights, ref, weights)
    logprobs, entropy = (
        torch.empty(tokens.shape, dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    count = programs(logits.device, max(1, vocab) * logits.element_size(), PROGRAMS[tiling])
    with on_device(logits):
        for block in row_blocks(tokens.shape, logits, tokens, flag_bytes(mask), *per_token, out):
            n_rows = block.outer * block.inner
            if n_rows == 0:
                break
            source, target = block.args[:3], block.args[-3:]
            logits_ppo_kernel[(min(n_rows, count),)](
                *(*block.args, moments, entropy_coef, kl_coef),
                *(x.view(-1)[block.start :] for x in (logprobs, entropy)),
                *(block.inner, vocab, n_rows, segments, 1.0 / temperature, ignore_index),
                *(c.variant, c.estimator, c.straight_through, c.kl_weight),
                *(1.0 - p.clip_low, 1.0 + p.clip_high, p.dual_clip),
                *(p.log_ratio_min, p.log_ratio_max),
                *(p.entropy_coef, p.kl_coef, p.kl_clamp, p.kl_ratio_clip),
                ALIGN=min(alignment(*source), alignment(*target)),
                **constants,
            )
    return logprobs, entropy


def logits_ppo_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op of ppo_fast/_boundary/schema.py: (logprobs, entropy, contiguous dlogits)."""
    logits = args[0]
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return *_run(out, *args), out


def logits_ppo_loss_(*args: Any) -> tuple[Tensor, Tensor]:
    """The same, dlogits written over the logits."""
    return _run(args[0], *args)


def logits_ppo_loss_bf16_(*args: Any) -> tuple[Tensor, Tensor]:
    """The same over fp32 logits, in bf16: each row of dlogits starts where the row does."""
    return _run(bf16_rows(args[0]), *args)
