"""The softmax of a row of logits: a pass for its state, a pass for its gradient.

The state is (max, sum, dot) = (max z, sum e^(z-max), sum (z-max) e^(z-max)) of z = logit /
temperature. With p = e^(z - max - log_sum), the gradient is dz_j = p_j (slope ln p_j + offset) +
[j = label] label_term.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import load_flag, pair_sum, row_offset

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: a state without a logit has max - max = 0
# exp(-200) is 0 in fp32, so clamping there changes nothing but 0 * -inf. It drops a NaN
# (max(NaN, x) = x), which is why its factor comes from the unclamped argument.
ZERO_EXP = tl.constexpr(-200.0)
INTERPRETED = tl.constexpr(common.INTERPRETED)

# Arguments of the row kernels, which share their names, that Triton shall not specialise on.
TENSORS = ("logits", "tokens", "mask", "temperature", "grad_logprobs", "grad_entropy", "out")
STRIDES = [f"{x}_{level}" for x in TENSORS for level in ("outer", "inner")]
RUNTIME = [*STRIDES, "inner", "n_rows", "n_parts", "n_segments", "inv_temperature", "ignore_index"]


class Gradient(NamedTuple):
    """A row's gradient inside a kernel: its softmax, and the terms of dz_j."""

    label: Any  # int32 column
    row_max: Any
    log_sum: Any
    inv_temperature: Any
    offset: Any
    slope: Any
    label_term: Any


@triton.jit
def inverse_temperature(temperature, row, inner, inside, number):
    """1 / temperature of the row or rows: the tensor's, or the number given."""
    offset = row_offset(temperature, row, inner)
    if temperature.ptr is None:
        return number
    else:
        value = tl.load(temperature.ptr + offset, mask=inside, other=1.0).to(tl.float32)
        return tl.div_rn(1.0, value)


@triton.jit
def rescale(old_max, new_max, total, dot):
    """The (sum, dot) of a state with maximum old_max, restated for the maximum new_max >= it."""
    shift = tl.maximum(old_max - new_max, ZERO_EXP)
    factor = tl.exp2(shift * LOG2E)
    return total * factor, tl.fma(shift, total, dot) * factor


@triton.jit
def scan_step(
    row_ptr,
    col,
    end,
    lane_max,
    lane_sum,
    lane_dot,
    inv_temperature,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    MASKED: tl.constexpr,
    EVICT: tl.constexpr,
):
    """A step of the scan: UNROLL logits per lane, from column `col` on, into the lanes' state."""
    lanes = tl.arange(0, LANES)
    xs = ()
    for u in tl.static_range(UNROLL):
        at = row_ptr + col + u * LANES + lanes
        if MASKED:
            inside = col + u * LANES + lanes < end
            x = tl.load(at, mask=inside, other=float("-inf"), eviction_policy=EVICT)
        else:
            x = tl.load(at, eviction_policy=EVICT)
        xs = xs + (x.to(tl.float32),)
    new_max = xs[0]
    for u in tl.static_range(1, UNROLL):
        new_max = tl.maximum(new_max, xs[u])
    new_max = tl.maximum(lane_max, new_max * inv_temperature)
    lane_sum, lane_dot = rescale(lane_max, new_max, lane_sum, lane_dot)
    for u in tl.static_range(UNROLL):
        d = tl.fma(xs[u], inv_temperature, -new_max)
        e = tl.exp2(d * LOG2E)
        lane_sum += e
        lane_dot = tl.fma(e, tl.maximum(d, ZERO_EXP), lane_dot)
    return new_max, lane_sum, lane_dot


@triton.jit
def scan_columns(
    row_ptr,
    start,
    end,
    V,
    inv_temperature,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The state (max, sum, dot) of a row's columns [start, end).

    `end` is V, or start plus a multiple of the step. Nothing crosses lanes before the end.
    """
    top = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    dot = tl.zeros([LANES], tl.float32)
    STEP: tl.constexpr = LANES * UNROLL
    full_end = start + (end - start) // STEP * STEP
    for col in tl.range(start, full_end, STEP, num_stages=STAGES):
        top, total, dot = scan_step(
            row_ptr, col, V, top, total, dot, inv_temperature, LANES, UNROLL, False, EVICT
        )
    if full_end < end:
        top, total, dot = scan_step(
            row_ptr, full_end, V, top, total, dot, inv_temperature, LANES, UNROLL, True, EVICT
        )
    all_max = tl.max(top, axis=0)
    total, dot = rescale(top, all_max, total, dot)
    return all_max, pair_sum(total, LANES), pair_sum(dot, LANES)


@triton.jit
def row_results(row_max, row_sum, row_dot, label_logit, inv_temperature, legal):
    """Results of whole rows: validity, maximum, log_sum, log-probability of the label, entropy."""
    valid = row_sum > 0  # a finite logit, and neither NaN nor +inf
    row_sum = tl.where(valid, row_sum, 1.0)
    log_sum = tl.log(row_sum)
    row_max = tl.where(valid, row_max, float("nan"))
    logprob = tl.fma(label_logit, inv_temperature, -row_max) - log_sum
    logprob = tl.where(legal, logprob, float("nan"))
    entropy = tl.where(legal & valid, log_sum - tl.div_rn(row_dot, row_sum), float("nan"))
    return valid, row_max, log_sum, logprob, entropy


@triton.jit
def label_rows(
    rows, inside, inner, V, logits, tokens, mask, temperature, inv_temperature, ignore_index
):
    """Rows' flags "live" and "label legal", their label, its logit, and 1 / temperature."""
    label = tl.load(tokens.ptr + row_offset(tokens, rows, inner), mask=inside, other=0)
    live = inside & (label != ignore_index)
    live = load_flag(mask.ptr, row_offset(mask, rows, inner), live)
    legal = live & (label >= 0) & (label < V)
    offset = row_offset(logits, rows, inner)
    label_logit = tl.load(logits.ptr + offset + label, mask=legal, other=0.0).to(tl.float32)
    row_inv_temperature = inverse_temperature(temperature, rows, inner, live, inv_temperature)
    return live, legal, label, label_logit, row_inv_temperature


@triton.jit
def aligned(offset, ALIGN: tl.constexpr):
    """An offset that is a multiple of ALIGN, spelled so that the compiler knows it.

    Triton 3.6 drops `tl.multiple_of` from a scalar, and with it 16-byte loads.
    """
    return offset // ALIGN * ALIGN


@triton.jit
def row_start(x, row, inner, ALIGN: tl.constexpr):
    """Pointer to a row, whose offset is a multiple of ALIGN."""
    return x.ptr + aligned(row_offset(x, row, inner), ALIGN)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 to the dtype, to nearest; the interpreter's own conversion to bf16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x10000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def row_terms(grad_logprob, grad_entropy, label_logit, inv_temperature, row_max, entropy, legal):
    """Terms of rows' gradients: whether all of it is 0, offset, slope, label_term."""
    # A label at -inf stays impossible: no gradient through its log-probability.
    impossible = tl.fma(label_logit, inv_temperature, -row_max) == float("-inf")
    grad_logprob = tl.where(legal & impossible, 0.0, grad_logprob)
    zero = (grad_logprob == 0.0) & (grad_entropy == 0.0)
    offset = -tl.fma(grad_entropy, entropy, grad_logprob) * inv_temperature
    offset = tl.where(legal, offset, float("nan"))
    return zero, offset, -grad_entropy * inv_temperature, grad_logprob * inv_temperature


@triton.jit
def grad_step(
    row_ptr,
    to_ptr,
    col,
    end,
    row,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    MASKED: tl.constexpr,
    EVICT: tl.constexpr,
):
    """A step of the gradient: UNROLL * LANES columns from `col` on; `row` is a Gradient.

    A gradient half as wide as its logits starts where their row does: the bytes of its columns
    [c, c + n) are those of the logits' columns [c / 2, (c + n) / 2), which this step or an earlier
    one has read. The barrier keeps all threads' reads up to here before any thread's writes.
    """
    OVERLAP: tl.constexpr = to_ptr.dtype.element_ty != row_ptr.dtype.element_ty
    lanes = tl.arange(0, LANES)
    xs = ()
    for u in tl.static_range(UNROLL):
        at = col + u * LANES
        inside = at + lanes < end if MASKED else None
        x = tl.load(row_ptr + at + lanes, mask=inside, eviction_policy=EVICT)
        xs = xs + (x.to(tl.float32),)
    if OVERLAP:
        tl.debug_barrier()
    for u in tl.static_range(UNROLL):
        at = col + u * LANES
        log_p = tl.fma(xs[u], row.inv_temperature, -row.row_max) - row.log_sum
        p = tl.exp2(log_p * LOG2E)
        dz = p * tl.fma(row.slope, tl.maximum(log_p, ZERO_EXP), row.offset)
        dz = tl.where(lanes == row.label - at, dz + row.label_term, dz)
        inside = at + lanes < end if MASKED else None
        dz = rounded(dz, to_ptr.dtype.element_ty)
        tl.store(to_ptr + at + lanes, dz, mask=inside, eviction_policy=EVICT)


@triton.jit
def grad_columns(
    row_ptr,
    to_ptr,
    start,
    end,
    V,
    row,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The gradient of a row's columns [start, end); `end` as in scan_columns."""
    STEP: tl.constexpr = LANES * UNROLL
    full_end = start + (end - start) // STEP * STEP
    for col in tl.range(start, full_end, STEP, num_stages=STAGES):
        grad_step(row_ptr, to_ptr, col, V, row, LANES, UNROLL, False, EVICT)
    for col in tl.range(full_end, end, 2 * LANES):  # 2: more would spill where ALIGN is 1
        grad_step(row_ptr, to_ptr, col, V, row, LANES, 2, True, EVICT)


@triton.jit
def zero_columns(to_ptr, start, end, V, STEP: tl.constexpr):
    """Zeros in a row's columns [start, end)."""
    full_end = start + (end - start) // STEP * STEP
    cols = tl.arange(0, STEP)
    none = tl.zeros([STEP], to_ptr.dtype.element_ty)
    for col in tl.range(start, full_end, STEP):
        tl.store(to_ptr + col + cols, none)
    if full_end < end:
        tl.store(to_ptr + full_end + cols, none, mask=full_end + cols < V)


def bf16_rows(logits: Tensor) -> Tensor:
    """A bf16 tensor like fp32 logits, in their memory: each row starts where theirs does."""
    if logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    return logits.view(torch.bfloat16)[..., : logits.shape[-1]]


def alignment(base: Tensor, *strides: int) -> int:
    """Alignment of every row's start in elements, at most 16 bytes of them."""
    size = base.element_size()
    return math.gcd(16, *(s * size for s in strides)) // size if base.data_ptr() % 16 == 0 else 1
