"""KL-shaped rewards, score placement, advantages, returns and moments in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arrival import counter, leave_moments
from .common import block_moments, flag_bytes, load_f32, load_flag, on_device
from .gae_grid import grid_of, steps_of
from .gae_scan import (
    NO_STEP,
    at,
    chan,
    check_offsets,
    next_live,
    poisoned,
    recur,
    sequences,
    tile_count,
    tile_steps,
)
from .kl import clamp, coefficient, kl_value
from .options import MASKED_CARRY, SCORE_AT_FIRST_PAD, SCORE_AT_PER_TOKEN


@triton.jit
def score_slots(live, later, t, steps, mask_ptr, seq, first, mask_seq, mask_step, place):
    """Where the score stands; whether it makes a masked slot live; and whether that is t + 1.

    A live step that no live one follows is the last; first-pad is the slot after it.
    """
    first_pad = place == SCORE_AT_FIRST_PAD
    room = t + 1 < steps
    last = live & (later == NO_STEP)
    before = (t > 0) & (t < steps)
    before = load_flag(mask_ptr, at(seq, first, t - 1, mask_seq, mask_step), before)
    # Selected rather than and-ed: the interpreter turns a boolean tensor & scalar into integers.
    none = live & (live == 0)
    pad = tl.where(first_pad, before & (live == 0) & (later == NO_STEP), none)
    pad_next = tl.where(first_pad, last & room, none)
    slot = tl.where(place == SCORE_AT_PER_TOKEN, live, (last & (pad_next == 0)) | pad)
    return slot, pad, pad_next


@triton.jit
def next_value(
    v_ptr, v_seq, v_step, boot, live_next, pad_next, later, t, seq, first, steps, masked
):  # fmt: skip
    """V of the next step ("zero"), or of the next live one ("carry"), the pad slot included."""
    follows = tl.where(masked == MASKED_CARRY, tl.where(pad_next, t + 1, later), t + 1)
    near = follows == t + 1
    live = tl.where(near, live_next | pad_next, follows < NO_STEP)
    end = tl.where(near, t + 1 == steps, follows == NO_STEP)
    after = load_f32(v_ptr, at(seq, first, follows, v_seq, v_step), live, 0.0)
    return tl.where(end, boot, after)


# fmt: off
@triton.jit
def rlhf_kernel(
    score_ptr, score_seq: tl.int64, score_step: tl.int64,
    logp_ptr, logp_seq: tl.int64, logp_step: tl.int64,
    ref_ptr, ref_seq: tl.int64, ref_step: tl.int64,
    v_ptr, v_seq: tl.int64, v_step: tl.int64,
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
    ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, MERGE: tl.constexpr,
):
    # fmt: on
    fails = None
    if cu_ptr is not None:
        fails = tl.load(fails_ptr) != 0
    seq, first, steps = sequences(cu_ptr, fails, n_seqs, length, ROWS, CHUNK, WIDE)
    boot = load_f32(boot_ptr, seq * boot_seq, seq < n_seqs, 0.0)
    coef = coefficient(kl_coef_ptr, kl_coef)
    state = tl.zeros([ROWS], tl.float32)
    later_state = tl.full([ROWS], NO_STEP, tl.int32)
    n = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    n_tiles = tile_count(steps, ROWS, CHUNK, WIDE)
    for done_tiles in range(n_tiles):
        t = tile_steps(n_tiles - 1 - done_tiles, ROWS, CHUNK, WIDE)
        inside = t < steps
        live = load_flag(mask_ptr, at(seq, first, t, mask_seq, mask_step), inside)
        live_next = t + 1 < steps
        live_next = load_flag(mask_ptr, at(seq, first, t + 1, mask_seq, mask_step), live_next)
        later, later_state = next_live(live_next, t, later_state, ROWS, CHUNK, WIDE)
        slot, pad, pad_next = score_slots(
            live, later, t, steps, mask_ptr, seq, first, mask_seq, mask_step, place
        )

        x = load_f32(logp_ptr, at(seq, first, t, logp_seq, logp_step), live, 0.0)
        x -= load_f32(ref_ptr, at(seq, first, t, ref_seq, ref_step), live, 0.0)
        kl = tl.where(live, clamp(kl_value(x, estimator), -kl_clamp, kl_clamp), 0.0)
        score = load_f32(score_ptr, at(seq, first, t, score_seq, score_step), slot, 0.0)
        score = tl.where(slot, clamp(score, score_min, score_max), 0.0)
        reward = tl.where(live, -(coef * kl), 0.0) + score

        v = load_f32(v_ptr, at(seq, first, t, v_seq, v_step), live | pad, 0.0)
        after = next_value(
            v_ptr, v_seq, v_step, boot, live_next, pad_next, later, t, seq, first, steps, masked
        )
        delta = tl.fma(after, gamma, reward) - v
        moves = tl.where(masked == MASKED_CARRY, live | pad, inside)
        a = tl.where(moves, decay, 1.0)
        adv, state = recur(None, a, tl.where(moves, delta, 0.0), state, ROWS, CHUNK, WIDE)

        out = at(seq, first, t, out_seq, out_step)
        ret = tl.where(live | pad, adv + v, 0.0)
        adv = tl.where(live, adv, 0.0)
        tl.store(adv_ptr + out, poisoned(adv, fails), mask=inside)
        tl.store(ret_ptr + out, poisoned(ret, fails), mask=inside)
        tl.store(reward_ptr + out, poisoned(reward, fails), mask=inside)
        tl.store(kl_ptr + out, poisoned(kl, fails), mask=inside)
        n_tile, mean_tile, m2_tile = block_moments(adv, live)
        n, mean, m2 = chan(n, mean, m2, n_tile, mean_tile, m2_tile)
    leave_moments(
        parts_ptr, moments_ptr, counter_ptr, poisoned(n, fails), poisoned(mean, fails),
        poisoned(m2, fails), MERGE,
    )  # fmt: skip


def rlhf_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef: Tensor | None,
    codes: list[int],
    params: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ppo_fast/_schema.py; (advantages, returns, rewards, kl, moments)."""
    gamma, lam, *numbers = params
    device, place = logprobs.device, codes[2]
    outs = [torch.empty(logprobs.shape, dtype=torch.float32, device=device) for _ in range(4)]
    grid = grid_of(logprobs, cu_seqlens)
    if logprobs.numel() == 0 or grid.n_seqs == 0:
        return (*outs, torch.zeros(3, dtype=torch.float64, device=device))
    if place == SCORE_AT_PER_TOKEN.value:
        score = steps_of(scores)
    else:
        score = (scores, scores.stride(0), 0)
    tensors = (logprobs, ref_logprobs, values, flag_bytes(mask))
    strided = [arg for x in tensors for arg in steps_of(x)]
    parts = torch.empty(3, grid.programs, dtype=torch.float64, device=device)
    moments = torch.empty(3, dtype=torch.float64, device=device)
    with on_device(logprobs):
        rlhf_kernel[(grid.programs,)](
            *score, *strided, bootstrap, 0 if bootstrap is None else bootstrap.stride(0),
            cu_seqlens, check_offsets(cu_seqlens, grid.length), kl_coef,
            *outs, *steps_of(outs[0])[1:], parts, moments, counter(logprobs),
            grid.n_seqs, grid.length, *codes, gamma, gamma * lam, *numbers, **grid.options(),
        )  # fmt: skip
    return (*outs, moments)
