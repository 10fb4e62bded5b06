"""Generalised advantages, returns and their moments: one launch, one read, one write."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arrival import counter, leave_moments
from .common import (
    block_moments,
    flag_bytes,
    load_f32,
    load_flag,
    on_device,
)
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
from .options import MASKED_CARRY


@triton.jit
def next_value(
    values_ptr, mask_ptr, boot, later, seq, first, steps, t, seq_stride, step_stride,
    mask_seq, mask_step,
    CARRY: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """V of the next step: the next live one if masked steps are as if absent (CARRY)."""
    inside = t + 1 < steps
    live = load_flag(mask_ptr, at(seq, first, t + 1, mask_seq, mask_step), inside)
    step = t + 1
    end = step == steps
    if CARRY and mask_ptr is not None:
        step, later = next_live(live, t, later, ROWS, CHUNK, WIDE)
        live = step < NO_STEP
        end = step == NO_STEP
    after = load_f32(values_ptr, at(seq, first, step, seq_stride, step_stride), live, 0.0)
    return tl.where(end, boot, after), later


@triton.jit
def decay_of(
    lam_ptr, lam_seq, lam_step, seq, first, t, live, n_seqs, gamma, gamma_low, decay,
    STEPS: tl.constexpr,
):  # fmt: skip
    """γλ formed in double and rounded once; λ is a number, a value per sequence, or per step."""
    if lam_ptr is None:
        return decay
    else:
        if STEPS:
            lam = load_f32(lam_ptr, at(seq, first, t, lam_seq, lam_step), live, 1.0)
        else:
            lam = load_f32(lam_ptr, seq * lam_seq, seq < n_seqs, 0.0)
        lam = lam.to(tl.float64)
        return (lam * gamma + lam * gamma_low).to(tl.float32)


@triton.jit
def load_flags(
    term_ptr, term_seq, term_step, trunc_ptr, trunc_seq, trunc_step, seq, first, t, live
):  # fmt: skip
    """Where a live step terminates, and where it cuts the recursion."""
    cut = live & (live == 0)
    term = cut
    if term_ptr is not None:
        term = load_flag(term_ptr, at(seq, first, t, term_seq, term_step), live)
        cut = term
    if trunc_ptr is not None:
        cut = cut | load_flag(trunc_ptr, at(seq, first, t, trunc_seq, trunc_step), live)
    return term, cut


# fmt: off
@triton.jit
def gae_kernel(
    r_ptr, r_seq: tl.int64, r_step: tl.int64,
    v_ptr, v_seq: tl.int64, v_step: tl.int64,
    mask_ptr, mask_seq: tl.int64, mask_step: tl.int64,
    next_ptr, next_seq: tl.int64, next_step: tl.int64,
    term_ptr, term_seq: tl.int64, term_step: tl.int64,
    trunc_ptr, trunc_seq: tl.int64, trunc_step: tl.int64,
    rho_ptr, rho_seq: tl.int64, rho_step: tl.int64,
    c_ptr, c_seq: tl.int64, c_step: tl.int64,
    lam_ptr, lam_seq: tl.int64, lam_step: tl.int64,
    lam_ret_ptr, lam_ret_seq: tl.int64, lam_ret_step: tl.int64,
    boot_ptr, boot_seq: tl.int64,
    cu_ptr, fails_ptr,  # (S + 1,), and check_offsets'
    adv_ptr, ret_ptr, out_seq: tl.int64, out_step: tl.int64,
    parts_ptr,  # (3, programs) float64
    moments_ptr, counter_ptr,
    n_seqs: tl.int64, length: tl.int64,
    gamma, gamma_low,  # their sum is γ in double
    decay, decay_ret,  # γλ where λ is a number
    CARRY: tl.constexpr,
    LAM_STEPS: tl.constexpr, LAM_RET_STEPS: tl.constexpr,  # a λ per step, not per sequence
    TWO: tl.constexpr,  # the returns have their own λ
    ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, MERGE: tl.constexpr,
):
    # fmt: on
    fails = None
    if cu_ptr is not None:
        fails = tl.load(fails_ptr) != 0
    seq, first, steps = sequences(cu_ptr, fails, n_seqs, length, ROWS, CHUNK, WIDE)
    boot = load_f32(boot_ptr, seq * boot_seq, seq < n_seqs, 0.0)
    state = tl.zeros([ROWS], tl.float32)
    state_ret = tl.zeros([ROWS], tl.float32)
    later = tl.full([ROWS], NO_STEP, tl.int32)
    n = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    n_tiles = tile_count(steps, ROWS, CHUNK, WIDE)
    for done_tiles in range(n_tiles):
        t = tile_steps(n_tiles - 1 - done_tiles, ROWS, CHUNK, WIDE)
        inside = t < steps
        live = load_flag(mask_ptr, at(seq, first, t, mask_seq, mask_step), inside)
        moves = live if CARRY else inside
        r = load_f32(r_ptr, at(seq, first, t, r_seq, r_step), live, 0.0)
        v = load_f32(v_ptr, at(seq, first, t, v_seq, v_step), live, 0.0)
        if next_ptr is None:
            after, later = next_value(
                v_ptr, mask_ptr, boot, later, seq, first, steps, t, v_seq, v_step,
                mask_seq, mask_step, CARRY, ROWS, CHUNK, WIDE,
            )  # fmt: skip
        else:
            after = load_f32(next_ptr, at(seq, first, t, next_seq, next_step), live, 0.0)
        delta = tl.fma(after, gamma, r)
        cut = None
        if term_ptr is not None or trunc_ptr is not None:
            term, cuts = load_flags(
                term_ptr, term_seq, term_step, trunc_ptr, trunc_seq, trunc_step,
                seq, first, t, live,
            )  # fmt: skip
            delta = tl.where(term, r, delta)
            cut = cuts.to(tl.int32)
        delta = delta - v
        if rho_ptr is not None:
            delta *= load_f32(rho_ptr, at(seq, first, t, rho_seq, rho_step), live, 1.0)
        b = tl.where(moves, delta, 0.0)
        a = decay_of(lam_ptr, lam_seq, lam_step, seq, first, t, live, n_seqs,
                     gamma, gamma_low, decay, LAM_STEPS)  # fmt: skip
        c = load_f32(c_ptr, at(seq, first, t, c_seq, c_step), live, 1.0)
        a = tl.where(moves, a * c, 1.0)
        adv, state = recur(cut, a, b, state, ROWS, CHUNK, WIDE)
        ret = adv
        if TWO:
            a = decay_of(lam_ret_ptr, lam_ret_seq, lam_ret_step, seq, first, t, live, n_seqs,
                         gamma, gamma_low, decay_ret, LAM_RET_STEPS)  # fmt: skip
            a = tl.where(moves, a * c, 1.0)
            ret, state_ret = recur(cut, a, b, state_ret, ROWS, CHUNK, WIDE)
        out = at(seq, first, t, out_seq, out_step)
        adv = tl.where(live, adv, 0.0)
        tl.store(adv_ptr + out, poisoned(adv, fails), mask=inside)
        tl.store(ret_ptr + out, poisoned(tl.where(live, ret + v, 0.0), fails), mask=inside)
        n_tile, mean_tile, m2_tile = block_moments(adv, live)
        n, mean, m2 = chan(n, mean, m2, n_tile, mean_tile, m2_tile)
    leave_moments(
        parts_ptr, moments_ptr, counter_ptr, poisoned(n, fails), poisoned(mean, fails),
        poisoned(m2, fails), MERGE,
    )  # fmt: skip


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    next_values: Tensor | None,
    bootstrap: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    cu_seqlens: Tensor | None,
    rho: Tensor | None,
    c: Tensor | None,
    lam: Tensor | None,
    lam_returns: Tensor | None,
    codes: list[int],
    params: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """See ppo_fast/_schema.py; (advantages, returns, moments)."""
    masked, time_major, lam_steps, lam_ret_steps = codes
    gamma, lam_number, lam_ret_number = params
    adv, ret = (torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
                for _ in range(2))  # fmt: skip
    grid = grid_of(rewards, cu_seqlens, bool(time_major))
    if rewards.numel() == 0 or grid.n_seqs == 0:
        return adv, ret, torch.zeros(3, dtype=torch.float64, device=rewards.device)
    tensors = (
        rewards, values, flag_bytes(mask), next_values, flag_bytes(terminated),
        flag_bytes(truncated), rho, c,
    )  # fmt: skip
    strided = [arg for x in tensors for arg in steps_of(x, bool(time_major))]
    for tensor, per_step in ((lam, lam_steps), (lam_returns, lam_ret_steps)):
        if tensor is not None and tensor.dim() == 1 and not per_step:
            strided += (tensor, tensor.stride(0), 0)  # a λ per packed sequence
        else:
            strided += steps_of(tensor, bool(time_major))
    parts = torch.empty(3, grid.programs, dtype=torch.float64, device=rewards.device)
    moments = torch.empty(3, dtype=torch.float64, device=rewards.device)
    gamma_high = struct.unpack("f", struct.pack("f", gamma))[0]
    with on_device(rewards):
        gae_kernel[(grid.programs,)](
            *strided, bootstrap, 0 if bootstrap is None else bootstrap.stride(0),
            cu_seqlens, check_offsets(cu_seqlens, grid.length),
            adv, ret, *steps_of(adv, bool(time_major))[1:], parts, moments, counter(rewards),
            grid.n_seqs, grid.length, gamma_high, gamma - gamma_high,
            gamma * lam_number, gamma * lam_ret_number,
            CARRY=mask is None or masked == MASKED_CARRY.value, LAM_STEPS=bool(lam_steps),
            LAM_RET_STEPS=bool(lam_ret_steps),
            TWO=lam_returns is not lam or lam_number != lam_ret_number,
            **grid.options(),
        )  # fmt: skip
    return adv, ret, moments
