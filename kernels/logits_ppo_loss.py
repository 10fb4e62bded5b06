"""From logits to a policy loss's gradient by the logits, in one launch.

A program takes whole rows, one after the other: a pass for the softmax's state, in the segments
and the tree of logprobs.py and so with its bits, then the token's slopes, then a pass that reads
the row once more and writes the gradient, over the logits or elsewhere. Only as many programs run
as have their rows in L2 between the two passes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import (
    LAUNCH,
    ROOMY,
    flag_bytes,
    load_f32,
    on_device,
    pair_sum,
    row_blocks,
    row_offset,
)
from .kl import coefficient
from .logprobs_grad import row_terms
from .softmax import (
    LOWEST,
    RUNTIME,
    aligned,
    alignment,
    grad_columns,
    label_rows,
    outcome,
    rescale,
    scan_columns,
    zero_columns,
)  # fmt: skip
from .token_loss import log_ratio, policy_loss, whitened

# What a row's config leaves open. More segments than a row has leave the bits of its sums alone.
MORE = {
    config.WIDE: {"SEGMENTS": 16, "GRAD_UNROLL": config.WIDE_GRAD.unroll} | ROOMY,
    config.NARROW: {"SEGMENTS": 1, "GRAD_UNROLL": config.NARROW_GRAD.unroll}
    | dict.fromkeys(ROOMY),  # its registers are left to the compiler
}
# Programs of a multiprocessor: as many as its registers hold.
PROGRAMS = {config.WIDE: 2, config.NARROW: 20}
# A row under way is on average half read or half written: so many times the L2 may be under way.
L2_ROWS = 2
# The per-token arguments of the loss, and the numbers it takes.
TOKEN_STRIDES = [f"{x}_{level}" for x in ("old", "adv", "is", "ref", "weight") for level in
                 ("outer", "inner")]  # fmt: skip
CODES = ("variant", "estimator", "straight")
NUMBERS = ("ratio_low", "ratio_high", "dual", "log_min", "log_max", "ent_coef", "kl_coef",
           "kl_clamp", "ratio_clip")  # fmt: skip


@triton.jit
def row_state(
    row_ptr, live, V, n_segments, inv_t, LANES: tl.constexpr, UNROLL: tl.constexpr,
    SEGMENT: tl.constexpr, STAGES: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """(m, s, t) of a whole row, as logprobs.py's two kernels form it; reads none that is dead."""
    i = tl.arange(0, SEGMENTS)
    m = tl.full([SEGMENTS], LOWEST, tl.float32)
    s = tl.zeros([SEGMENTS], tl.float32)
    t = tl.zeros([SEGMENTS], tl.float32)
    for segment in range(tl.where(live, n_segments, 0)):
        start = segment * SEGMENT
        end = tl.minimum(start + SEGMENT, V)
        # The row is wanted again.
        top, part_s, part_t = scan_columns(
            row_ptr, start, end, V, inv_t, LANES, UNROLL, STAGES, "evict_last"
        )
        m = tl.where(i == segment, top, m)
        s = tl.where(i == segment, part_s, s)
        t = tl.where(i == segment, part_t, t)
    top = tl.max(m, axis=0)
    s, t = rescale(m, top, s, t)
    return top, pair_sum(s, SEGMENTS), pair_sum(t, SEGMENTS)


# fmt: off
@triton.jit(do_not_specialize=[*RUNTIME, *TOKEN_STRIDES, *CODES, *NUMBERS])
def logits_ppo_kernel(
    logits_ptr, logits_outer: tl.int64, logits_inner: tl.int64,  # (rows, V)
    tokens_ptr, tokens_outer: tl.int64, tokens_inner: tl.int64,  # (rows,), as those below
    mask_ptr, mask_outer: tl.int64, mask_inner: tl.int64,
    temp_ptr, temp_outer: tl.int64, temp_inner: tl.int64,
    old_ptr, old_outer: tl.int64, old_inner: tl.int64,
    adv_ptr, adv_outer: tl.int64, adv_inner: tl.int64,
    is_ptr, is_outer: tl.int64, is_inner: tl.int64,
    ref_ptr, ref_outer: tl.int64, ref_inner: tl.int64,
    weight_ptr, weight_outer: tl.int64, weight_inner: tl.int64,
    out_ptr, out_outer: tl.int64, out_inner: tl.int64,  # (rows, V): the logits too in place
    moments_ptr, ent_coef_ptr, kl_coef_ptr,  # (3,) float64, 0-d, 0-d
    logprobs_ptr, entropy_ptr,  # (rows,) fp32 contiguous
    inner, V, n_rows, n_segments, inv_temp, ignore_index: tl.int64,
    variant: tl.int32, estimator: tl.int32, straight: tl.int32,
    ratio_low, ratio_high, dual, log_min, log_max, ent_coef, kl_coef, kl_clamp, ratio_clip,
    LANES: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTS: tl.constexpr,  # a power of two >= n_segments
    GRAD_UNROLL: tl.constexpr,
    ALIGN: tl.constexpr,  # every row starts at a multiple of this many elements
):
    # fmt: on
    kl_coef = coefficient(kl_coef_ptr, kl_coef)
    ent_coef = coefficient(ent_coef_ptr, ent_coef)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        live, legal, token, x, inv_t = label_rows(
            row, row < n_rows, inner, V, logits_ptr, logits_outer, logits_inner,
            tokens_ptr, tokens_outer, tokens_inner, mask_ptr, mask_outer, mask_inner,
            temp_ptr, temp_outer, temp_inner, inv_temp, ignore_index,
        )  # fmt: skip
        row_ptr = logits_ptr + aligned(row_offset(row, inner, logits_outer, logits_inner), ALIGN)
        m, s, t = row_state(
            row_ptr, live, V, n_segments, inv_t, LANES, UNROLL, SEGMENT, STAGES, SEGMENTS
        )
        sound, m, log_sum, logp, entropy = outcome(m, s, t, x, inv_t, legal)
        tl.store(logprobs_ptr + row, tl.where(live, logp, 0.0))
        tl.store(entropy_ptr + row, tl.where(live, entropy, 0.0))

        adv = load_f32(adv_ptr, row_offset(row, inner, adv_outer, adv_inner), live, 0.0)
        adv = whitened(adv, moments_ptr)
        offset = row_offset(row, inner, old_outer, old_inner)
        d, free = log_ratio(logp, old_ptr, offset, live, log_min, log_max)
        _, _, _, slope, _, _ = policy_loss(
            variant, estimator, straight, logp, live, adv, d, free, tl.exp(d), old_ptr, offset,
            is_ptr, row_offset(row, inner, is_outer, is_inner),
            ref_ptr, row_offset(row, inner, ref_outer, ref_inner),
            ratio_low, ratio_high, dual, log_min, log_max, kl_coef, kl_clamp, ratio_clip,
        )  # fmt: skip
        offset = row_offset(row, inner, weight_outer, weight_inner)
        weight = load_f32(weight_ptr, offset, live, 0.0)
        g = weight * slope
        h = -(weight * ent_coef)
        zero, a, b, c = row_terms(g, h, x, inv_t, m, entropy, legal)
        # A clamp drops a NaN, and with it the slope: the row is NaN all the same.
        zero = (zero & legal & sound) | (live == 0)

        to_ptr = out_ptr + aligned(row_offset(row, inner, out_outer, out_inner), ALIGN)
        tl.debug_barrier()  # every read of the row, the label's too, precedes the first write
        if zero:
            zero_columns(to_ptr, 0, V, V, LANES * GRAD_UNROLL)
        else:
            label = tl.where(legal, token, 0).to(tl.int32)
            grad_columns(
                row_ptr, to_ptr, 0, V, V, label, m, log_sum, inv_t, a, b, c,
                LANES, GRAD_UNROLL, STAGES, "evict_first",
            )  # fmt: skip


@functools.cache
def programs(device: torch.device, row_bytes: int, most: int) -> int:
    """How many run: at most `most` per multiprocessor, and with their rows in L2."""
    if device.type != "cuda":
        return 2
    about = torch.cuda.get_device_properties(device)
    fit = L2_ROWS * about.L2_cache_size // (row_bytes * about.multi_processor_count)
    return int(about.multi_processor_count * max(1, min(most, fit)))


def _run(out: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Fill `out`, of the logits' shape and dtype or they themselves; `args` are the schema's."""
    logits, tokens, mask, heat, old, adv, is_weights, moments, ref, weights, *rest = args
    ent_coef, kl_coef, (ignore_index, *codes), params = rest
    temperature, clip_low, clip_high, *numbers = params
    vocab = logits.shape[-1]
    how = config.scan(vocab)
    segments = max(1, triton.cdiv(vocab, how.segment))
    more = MORE[how] | {"SEGMENTS": max(MORE[how]["SEGMENTS"], triton.next_power_of_2(segments))}
    weights = weights.expand(tokens.shape)
    tensors = (logits, tokens, flag_bytes(mask), heat, old, adv, is_weights, ref, weights, out)
    logprobs, entropy = (
        torch.empty(tokens.shape, dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    count = programs(logits.device, max(1, vocab) * logits.element_size(), PROGRAMS[how])
    with on_device(logits):
        for block in row_blocks(tokens.shape, *tensors):
            n_rows = block.outer * block.inner
            if n_rows == 0:
                break
            source, target = block.args[:3], block.args[-3:]
            logits_ppo_kernel[(min(n_rows, count),)](
                *block.args, moments, ent_coef, kl_coef,
                *(x.view(-1)[block.start :] for x in (logprobs, entropy)),
                block.inner, vocab, n_rows, segments, 1.0 / temperature, ignore_index, *codes,
                1.0 - clip_low, 1.0 + clip_high, *numbers,
                LANES=how.lanes, UNROLL=how.unroll, SEGMENT=how.segment, STAGES=how.stages,
                ALIGN=min(alignment(*source), alignment(*target)),
                num_warps=how.warps, **more, **LAUNCH,
            )  # fmt: skip
    return logprobs, entropy


def logits_ppo_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See ppo_fast/_schema.py; (logprobs, entropy, dlogits), the last contiguous."""
    logits = args[0]
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return *_run(out, *args), out


def logits_ppo_loss_(*args: Any) -> tuple[Tensor, Tensor]:
    """The same, dlogits written over the logits."""
    return _run(args[0], *args)
