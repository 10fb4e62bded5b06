"""Generalised advantages, returns and their moments: one launch, one read, one write."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import MASKED_CARRY
from .common import (
    Strided,
    add_to_moments,
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
    tile_flags,
    tile_span,
    tile_steps,
    unit_steps,
)

# Tensors of steps, as the kernel's arguments name them.
STEPS = ("rewards", "values", "mask", "next", "term", "trunc", "rho", "c", "lam", "lam_ret")


@triton.jit
def next_value(
    values,
    mask,
    bootstrap,
    later,
    span,
    step,
    tile,
    CARRY: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """V of the next step: the next live one if masked steps are as if absent (CARRY)."""
    inside = step + 1 < span.n_steps
    live = load_step_flag(mask, span, step + 1, inside)
    following = step + 1
    end = following == span.n_steps
    if CARRY and mask.ptr is not None:
        following, later = next_live(live, step, tile, later, ROWS, CHUNK, WIDE)
        live = following < NO_STEP
        end = following == NO_STEP
    after = load_step(values, span, following, live, 0.0)
    return tl.where(end, bootstrap, after), later


@triton.jit
def decay_of(lam, span, step, live, n_seqs, gamma, gamma_low, decay, STEPS: tl.constexpr):
    """γλ formed in double and rounded once; λ is a number, a value per sequence, or per step."""
    if lam.ptr is None:
        return decay
    else:
        if STEPS:
            value = load_step(lam, span, step, live, 1.0)
        else:
            value = load_f32(lam.ptr, span.seq * lam.outer, span.seq < n_seqs, 0.0)
        value = value.to(tl.float64)
        return (value * gamma + value * gamma_low).to(tl.float32)


@triton.jit
def load_ends(terminated, truncated, span, step, live):
    """Live steps that terminate, and those that cut the recursion."""
    cut = live & (live == 0)
    ends = cut
    if terminated.ptr is not None:
        ends = load_step_flag(terminated, span, step, live)
        cut = ends
    if truncated.ptr is not None:
        cut = cut | load_step_flag(truncated, span, step, live)
    return ends, cut


# fmt: off
@triton.jit(**unspecialised(STEPS, ("seq", "step"), SHARED_POINTERS, SHARED_INTEGERS))
def gae_kernel(
    rewards_ptr, rewards_seq: tl.int64, rewards_step: tl.int64,
    values_ptr, values_seq: tl.int64, values_step: tl.int64,
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
    CARRY: tl.constexpr,  # masked steps are as if absent
    LAM_STEPS: tl.constexpr, LAM_RET_STEPS: tl.constexpr,  # a λ per step, not per sequence
    OWN_LAMBDA: tl.constexpr,  # the returns have a λ of their own
    UNIT: tl.constexpr,  # neighbouring steps are neighbours in memory
    ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, MERGE: tl.constexpr,
):
    # fmt: on
    rewards = Strided(rewards_ptr, rewards_seq, step_stride(rewards_step, UNIT))
    values = Strided(values_ptr, values_seq, step_stride(values_step, UNIT))
    mask = Strided(mask_ptr, mask_seq, step_stride(mask_step, UNIT))
    next_values = Strided(next_ptr, next_seq, step_stride(next_step, UNIT))
    terminated = Strided(term_ptr, term_seq, step_stride(term_step, UNIT))
    truncated = Strided(trunc_ptr, trunc_seq, step_stride(trunc_step, UNIT))
    rhos = Strided(rho_ptr, rho_seq, step_stride(rho_step, UNIT))
    cs = Strided(c_ptr, c_seq, step_stride(c_step, UNIT))
    lam = Strided(lam_ptr, lam_seq, step_stride(lam_step, UNIT))
    lam_ret = Strided(lam_ret_ptr, lam_ret_seq, step_stride(lam_ret_step, UNIT))
    outs = Strided(adv_ptr, out_seq, step_stride(out_step, UNIT))

    fails = None
    if cu_ptr is not None:
        fails = tl.load(fails_ptr) != 0
    span = tile_span(cu_ptr, fails, n_seqs, length, ROWS, CHUNK, WIDE)
    bootstrap = load_f32(boot_ptr, span.seq * boot_seq, span.seq < n_seqs, 0.0)
    state = tl.zeros([ROWS], tl.float32)
    state_ret = tl.zeros([ROWS], tl.float32)
    later = tl.full([ROWS], NO_STEP, tl.int32)
    n = tl.zeros([ROWS * CHUNK], tl.int32)
    pivot = tl.zeros([ROWS * CHUNK], tl.float32)
    total = tl.zeros([ROWS * CHUNK], tl.float64)
    squares = tl.zeros([ROWS * CHUNK], tl.float64)
    n_tiles = tile_count(span.n_steps, ROWS, CHUNK, WIDE)
    ahead = tile_flags(mask, span, n_tiles - 1, ROWS, CHUNK, WIDE)
    for done_tiles in range(n_tiles):
        tile = n_tiles - 1 - done_tiles
        step = tile_steps(tile, ROWS, CHUNK, WIDE)
        inside = step < span.n_steps
        live = ahead  # masked steps are not read, so that all other loads wait for the flags
        ahead = tile_flags(mask, span, tile - 1, ROWS, CHUNK, WIDE)
        moves = live if CARRY else inside
        reward = load_step(rewards, span, step, live, 0.0)
        value = load_step(values, span, step, live, 0.0)
        if next_ptr is None:
            after, later = next_value(
                values, mask, bootstrap, later, span, step, tile, CARRY, ROWS, CHUNK, WIDE
            )
        else:
            after = load_step(next_values, span, step, live, 0.0)
        delta = tl.fma(after, gamma, reward)
        cut = None
        if term_ptr is not None or trunc_ptr is not None:
            ends, cuts = load_ends(terminated, truncated, span, step, live)
            delta = tl.where(ends, reward, delta)
            cut = cuts.to(tl.int32)
        delta = delta - value
        if rho_ptr is not None:
            delta *= load_step(rhos, span, step, live, 1.0)
        b = tl.where(moves, delta, 0.0)
        a = decay_of(lam, span, step, live, n_seqs, gamma, gamma_low, decay, LAM_STEPS)
        c = load_step(cs, span, step, live, 1.0)
        a = tl.where(moves, a * c, 1.0)
        adv, state = recur(cut, a, b, state, ROWS, CHUNK, WIDE)
        ret = adv
        if OWN_LAMBDA:
            a = decay_of(
                lam_ret, span, step, live, n_seqs, gamma, gamma_low, decay_ret, LAM_RET_STEPS
            )
            a = tl.where(moves, a * c, 1.0)
            ret, state_ret = recur(cut, a, b, state_ret, ROWS, CHUNK, WIDE)
        out = step_offset(outs, span, step)
        adv = tl.where(live, adv, 0.0)
        tl.store(adv_ptr + out, poisoned(adv, fails), mask=inside)
        tl.store(ret_ptr + out, poisoned(tl.where(live, ret + value, 0.0), fails), mask=inside)
        n, pivot, total, squares = add_to_moments(n, pivot, total, squares, adv, live)
    count, mean, m2 = moments_of(n, pivot, total, squares)
    count, mean, m2 = poisoned(count, fails), poisoned(mean, fails), poisoned(m2, fails)
    reduce_moments(parts_ptr, moments_ptr, counter_ptr, count, mean, m2, MERGE)


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
    lam_adv_tensor: Tensor | None,
    lam_ret_tensor: Tensor | None,
    masked: int,
    time_major: bool,
    lam_adv_per_step: bool,
    lam_ret_per_step: bool,
    gamma: float,
    lam_adv: float,
    lam_ret: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of ppo_fast/_boundary/schema.py: (advantages, returns, moments)."""
    f32, f64 = ({"dtype": t, "device": rewards.device} for t in (torch.float32, torch.float64))
    adv, ret = (torch.empty(rewards.shape, **f32) for _ in range(2))
    grid = grid_of(rewards, cu_seqlens, time_major)
    if rewards.numel() == 0 or grid.n_seqs == 0:
        return adv, ret, torch.zeros(3, **f64)
    flags = [flag_bytes(x) for x in (mask, terminated, truncated)]
    tensors = (rewards, values, flags[0], next_values, *flags[1:], rho, c)
    arguments = [arg for x in tensors for arg in strided(x, time_major)]
    steps = [adv, *tensors]
    for tensor, per_step in (
        (lam_adv_tensor, lam_adv_per_step),
        (lam_ret_tensor, lam_ret_per_step),
    ):
        if tensor is not None and tensor.dim() == 1 and not per_step:
            arguments += (tensor, tensor.stride(0), 0)  # a λ per packed sequence
        else:
            arguments += strided(tensor, time_major)
            steps += [tensor] if per_step else []
    parts, moments = torch.empty(3, grid.programs, **f64), torch.empty(3, **f64)
    gamma_high = struct.unpack("f", struct.pack("f", gamma))[0]
    numbers = (gamma_high, gamma - gamma_high, gamma * lam_adv, gamma * lam_ret)
    constants = grid.constants() | {
        "UNIT": unit_steps(steps, time_major),
        "CARRY": mask is None or masked == MASKED_CARRY.value,
        "LAM_STEPS": lam_adv_per_step,
        "LAM_RET_STEPS": lam_ret_per_step,
        "OWN_LAMBDA": lam_ret_tensor is not lam_adv_tensor or lam_adv != lam_ret,
    }
    with on_device(rewards):
        gae_kernel[(grid.programs,)](
            *arguments,
            *(bootstrap, 0 if bootstrap is None else bootstrap.stride(0)),
            *(cu_seqlens, check_offsets(cu_seqlens, grid.length)),
            *(adv, ret, *strided(adv, time_major)[1:], parts, moments, counter(rewards)),
            *(grid.n_seqs, grid.length, *numbers),
            **constants,
        )
    return adv, ret, moments
