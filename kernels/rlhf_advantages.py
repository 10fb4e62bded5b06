"""KL-shaped rewards, score placement, advantages, returns and moments in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import MASKED_CARRY, SCORE_AT_FIRST_PAD, SCORE_AT_PER_TOKEN
from .common import (
    Strided,
    add_to_moments,
    clamp,
    coefficient,
    counter,
    flag_bytes,
    load_f32,
    moments_of,
    on_device,
    reduce_moments,
    strided,
    unspecialised,
)
from .scan import (
    NO_STEP,
    SHARED_INTEGERS,
    SHARED_POINTERS,
    check_offsets,
    grid_of,
    load_step,
    load_step_flag,
    next_live,
    poisoned,
    recur,
    step_offset,
    step_stride,
    tile_count,
    tile_span,
    tile_steps,
    unit_steps,
)
from .token_loss import kl_value

# Tensors of steps, as the kernel's arguments name them.
STEPS = ("score", "logp", "ref", "values", "mask")


@triton.jit
def score_slots(live, later, mask, span, step, place):
    """Slots that take the score, the masked slot it makes live, and the step before that slot.

    A live step that no live one follows is the last; first-pad is the slot after it.
    """
    first_pad = place == SCORE_AT_FIRST_PAD
    room = step + 1 < span.n_steps
    last = live & (later == NO_STEP)
    before = (step > 0) & (step < span.n_steps)
    before = load_step_flag(mask, span, step - 1, before)
    # Selected rather than and-ed: the interpreter turns a boolean tensor & scalar into integers.
    none = live & (live == 0)
    pad = tl.where(first_pad, before & (live == 0) & (later == NO_STEP), none)
    pad_next = tl.where(first_pad, last & room, none)
    slot = tl.where(place == SCORE_AT_PER_TOKEN, live, (last & (pad_next == 0)) | pad)
    return slot, pad, pad_next


@triton.jit
def next_value(values, bootstrap, live_next, pad_next, later, span, step, masked):
    """V of the next step ("zero"), or of the next live one ("carry"), the pad slot included."""
    live_step = tl.where(pad_next, step + 1, later)
    following = tl.where(masked == MASKED_CARRY, live_step, step + 1)
    near = following == step + 1
    live = tl.where(near, live_next | pad_next, following < NO_STEP)
    end = tl.where(near, step + 1 == span.n_steps, following == NO_STEP)
    after = load_step(values, span, following, live, 0.0)
    return tl.where(end, bootstrap, after)


# fmt: off
@triton.jit(
    **unspecialised(
        STEPS,
        ("seq", "step"),
        (*SHARED_POINTERS, "kl_coef"),
        (*SHARED_INTEGERS, "masked", "estimator", "place"),
    )
)
def rlhf_kernel(
    score_ptr, score_seq: tl.int64, score_step: tl.int64,
    logp_ptr, logp_seq: tl.int64, logp_step: tl.int64,
    ref_ptr, ref_seq: tl.int64, ref_step: tl.int64,
    values_ptr, values_seq: tl.int64, values_step: tl.int64,
    mask_ptr, mask_seq: tl.int64, mask_step: tl.int64,
    boot_ptr, boot_seq: tl.int64,
    cu_ptr, fails_ptr,  # (S + 1,), and check_offsets'
    kl_coef_ptr,
    adv_ptr, ret_ptr, reward_ptr, kl_ptr, out_seq: tl.int64, out_step: tl.int64,
    parts_ptr,  # (3, programs) float64
    moments_ptr, counter_ptr,
    n_seqs: tl.int64, length: tl.int64,
    masked: tl.int32, estimator: tl.int32, place: tl.int32,
    gamma, decay, kl_coef, kl_clamp, score_min, score_max,
    UNIT: tl.constexpr,  # neighbouring steps are neighbours in memory, scores aside
    ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, MERGE: tl.constexpr,
):
    # fmt: on
    scores = Strided(score_ptr, score_seq, score_step)  # 0 unless per token
    logprobs = Strided(logp_ptr, logp_seq, step_stride(logp_step, UNIT))
    ref_logprobs = Strided(ref_ptr, ref_seq, step_stride(ref_step, UNIT))
    values = Strided(values_ptr, values_seq, step_stride(values_step, UNIT))
    mask = Strided(mask_ptr, mask_seq, step_stride(mask_step, UNIT))
    outs = Strided(adv_ptr, out_seq, step_stride(out_step, UNIT))

    fails = None
    if cu_ptr is not None:
        fails = tl.load(fails_ptr) != 0
    span = tile_span(cu_ptr, fails, n_seqs, length, ROWS, CHUNK, WIDE)
    bootstrap = load_f32(boot_ptr, span.seq * boot_seq, span.seq < n_seqs, 0.0)
    kl_coef = coefficient(kl_coef_ptr, kl_coef)
    state = tl.zeros([ROWS], tl.float32)
    later_state = tl.full([ROWS], NO_STEP, tl.int32)
    n = tl.zeros([ROWS * CHUNK], tl.int32)
    pivot = tl.zeros([ROWS * CHUNK], tl.float32)
    total = tl.zeros([ROWS * CHUNK], tl.float64)
    squares = tl.zeros([ROWS * CHUNK], tl.float64)
    n_tiles = tile_count(span.n_steps, ROWS, CHUNK, WIDE)
    for done_tiles in range(n_tiles):
        tile = n_tiles - 1 - done_tiles
        step = tile_steps(tile, ROWS, CHUNK, WIDE)
        inside = step < span.n_steps
        live = load_step_flag(mask, span, step, inside)
        log_ratio = load_step(logprobs, span, step, live, 0.0)
        log_ratio -= load_step(ref_logprobs, span, step, live, 0.0)
        live_next = step + 1 < span.n_steps
        live_next = load_step_flag(mask, span, step + 1, live_next)
        later, later_state = next_live(live_next, step, tile, later_state, ROWS, CHUNK, WIDE)
        slot, pad, pad_next = score_slots(live, later, mask, span, step, place)

        kl = clamp(kl_value(log_ratio, estimator), -kl_clamp, kl_clamp)
        kl = tl.where(live, kl, 0.0)
        score = load_step(scores, span, step, slot, 0.0)
        score = tl.where(slot, clamp(score, score_min, score_max), 0.0)
        reward = tl.where(live, -(kl_coef * kl), 0.0) + score

        value = load_step(values, span, step, live | pad, 0.0)
        after = next_value(values, bootstrap, live_next, pad_next, later, span, step, masked)
        delta = tl.fma(after, gamma, reward) - value
        moves = tl.where(masked == MASKED_CARRY, live | pad, inside)
        a = tl.where(moves, decay, 1.0)
        adv, state = recur(None, a, tl.where(moves, delta, 0.0), state, ROWS, CHUNK, WIDE)

        out = step_offset(outs, span, step)
        ret = tl.where(live | pad, adv + value, 0.0)
        adv = tl.where(live, adv, 0.0)
        tl.store(adv_ptr + out, poisoned(adv, fails), mask=inside)
        tl.store(ret_ptr + out, poisoned(ret, fails), mask=inside)
        tl.store(reward_ptr + out, poisoned(reward, fails), mask=inside)
        tl.store(kl_ptr + out, poisoned(kl, fails), mask=inside)
        n, pivot, total, squares = add_to_moments(n, pivot, total, squares, adv, live)
    count, mean, m2 = moments_of(n, pivot, total, squares)
    count, mean, m2 = poisoned(count, fails), poisoned(mean, fails), poisoned(m2, fails)
    reduce_moments(parts_ptr, moments_ptr, counter_ptr, count, mean, m2, MERGE)


def rlhf_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef_tensor: Tensor | None,
    masked: int,
    estimator: int,
    score_at: int,
    gamma: float,
    lam: float,
    kl_coef: float,
    kl_clamp: float,
    reward_min: float,
    reward_max: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op of ppo_fast/_boundary/schema.py: (advantages, returns, rewards, kl, moments)."""
    device = logprobs.device
    outs = [torch.empty(logprobs.shape, dtype=torch.float32, device=device) for _ in range(4)]
    grid = grid_of(logprobs, cu_seqlens)
    if logprobs.numel() == 0 or grid.n_seqs == 0:
        return (*outs, torch.zeros(3, dtype=torch.float64, device=device))
    if score_at == SCORE_AT_PER_TOKEN.value:
        score = strided(scores)
    else:
        score = (scores, scores.stride(0), 0)
    tensors = (logprobs, ref_logprobs, values, flag_bytes(mask))
    arguments = [arg for x in tensors for arg in strided(x)]
    parts = torch.empty(3, grid.programs, dtype=torch.float64, device=device)
    moments = torch.empty(3, dtype=torch.float64, device=device)
    with on_device(logprobs):
        rlhf_kernel[(grid.programs,)](
            *score,
            *arguments,
            *(bootstrap, 0 if bootstrap is None else bootstrap.stride(0)),
            *(cu_seqlens, check_offsets(cu_seqlens, grid.length), kl_coef_tensor),
            *(*outs, *strided(outs[0])[1:], parts, moments, counter(logprobs)),
            *(grid.n_seqs, grid.length, masked, estimator, score_at, gamma, gamma * lam),
            *(kl_coef, kl_clamp, reward_min, reward_max),
            **grid.constants() | {"UNIT": unit_steps((outs[0], *tensors))},
        )
    return (*outs, moments)
