"""The softmax of a row of logits: a pass for its state, a pass for its gradient.

The state is (max, sum, dot) = (max x, sum 2^d, sum d 2^d) of the logits x, where d = (x - max)
scale and scale = log2(e) / temperature: an element's power of two takes one multiply-add. With
z = x / temperature and p = e^(z - max z - log_sum), the gradient is dz_j = p_j (slope ln p_j +
offset), to which the label's adds a term of its own.
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
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: a state without a logit has max - max = 0
# e^-200 and 2^-200 are 0 in fp32, so clamping there changes nothing but 0 * -inf. It drops a NaN
# (max(NaN, x) = x), which is why its factor comes from the unclamped argument.
ZERO_EXP = tl.constexpr(-200.0)
# A lane subtracts max * scale, rounded, so its sum is off by the factor 2^error until its segment
# ends. At this bound the error, half an ulp, is 32; beyond, sums might overflow.
HUGE = tl.constexpr(536870912.0)
# A row of several segments is merged as if of this many, or of a power of two beyond: padding adds
# zeros and does not change a row's sums.
SEGMENTS = 16
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
    at_label: Any  # dz of the label


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
def widened(x):
    """fp32 from any type of logits; of bf16 in a form that costs one instruction an element."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def rescale(shift, total, dot):
    """The (sum, dot) of a state with every d moved by `shift`."""
    shift = tl.maximum(shift, ZERO_EXP)
    factor = tl.exp2(shift)
    return total * factor, tl.fma(shift, total, dot) * factor


@triton.jit
def pair_sums(x, y, N: tl.constexpr):
    """`pair_sum` of two vectors, with the barriers of one."""
    return tl.split(pair_sum(tl.trans(tl.join(x, y)), N))


@triton.jit
def merged(maxima, sums, dots, inv_temperature, SEGMENTS: tl.constexpr):
    """The state of a row from those of its segments, in a fixed tree."""
    row_max = tl.max(maxima, axis=0)
    shift = (maxima - row_max) * (inv_temperature * LOG2E)
    sums, dots = rescale(shift, sums, dots)
    return row_max, pair_sum(sums, SEGMENTS), pair_sum(dots, SEGMENTS)


@triton.jit
def scan_step(
    row_ptr,
    col,
    end,
    lane_max,
    lane_shift,
    lane_sum,
    lane_dot,
    scale,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    MASKED: tl.constexpr,
    EVICT: tl.constexpr,
):
    """A step of the scan: UNROLL logits per lane, from column `col` on, into the lanes' state.

    lane_shift is what lanes subtract, their maximum times scale, rounded and at least -HUGE.
    """
    lanes = tl.arange(0, LANES)
    xs = ()
    for u in tl.static_range(UNROLL):
        at = row_ptr + col + u * LANES + lanes
        if MASKED:
            inside = col + u * LANES + lanes < end
            x = tl.load(at, mask=inside, other=float("-inf"), eviction_policy=EVICT)
        else:
            x = tl.load(at, eviction_policy=EVICT)
        xs = xs + (widened(x),)
    for u in tl.static_range(UNROLL):
        lane_max = tl.maximum(lane_max, xs[u])
    shift = tl.maximum(lane_max * scale, -HUGE)
    lane_sum, lane_dot = rescale(lane_shift - shift, lane_sum, lane_dot)
    for u in tl.static_range(UNROLL):
        d = tl.fma(xs[u], scale, -shift)
        e = tl.exp2(d)
        lane_sum += e
        lane_dot = tl.fma(e, tl.maximum(d, ZERO_EXP), lane_dot)
    return lane_max, shift, lane_sum, lane_dot


@triton.jit
def huge_sums(row_ptr, start, end, maximum, scale, LANES: tl.constexpr, EVICT: tl.constexpr):
    """(sum, dot) of columns [start, end), whose maximum is known, from differences."""
    lanes = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float32)
    dot = tl.zeros([LANES], tl.float32)
    for col in tl.range(start, end, LANES):
        inside = col + lanes < end
        x = tl.load(row_ptr + col + lanes, mask=inside, other=float("-inf"), eviction_policy=EVICT)
        d = (widened(x) - maximum) * scale
        e = tl.exp2(d)
        total += e
        dot = tl.fma(e, tl.maximum(d, ZERO_EXP), dot)
    return pair_sums(total, dot, LANES)


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
    scale = inv_temperature * LOG2E
    top = tl.full([LANES], LOWEST, tl.float32)
    shift = tl.full([LANES], -HUGE, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    dot = tl.zeros([LANES], tl.float32)
    STEP: tl.constexpr = LANES * UNROLL
    full_end = start + (end - start) // STEP * STEP
    for col in tl.range(start, full_end, STEP, num_stages=STAGES):
        top, shift, total, dot = scan_step(
            row_ptr, col, V, top, shift, total, dot, scale, LANES, UNROLL, False, EVICT
        )
    if full_end < end:
        top, shift, total, dot = scan_step(
            row_ptr, full_end, V, top, shift, total, dot, scale, LANES, UNROLL, True, EVICT
        )
    maximum = tl.max(top, axis=0)
    # From here on relative to the exact product, in one rounding.
    total, dot = rescale(tl.fma(maximum, -scale, shift), total, dot)
    part_sum, part_dot = pair_sums(total, dot, LANES)
    if tl.abs(maximum) * scale > HUGE:
        part_sum, part_dot = huge_sums(row_ptr, start, end, maximum, scale, LANES, EVICT)
    return maximum, part_sum, part_dot


@triton.jit
def row_results(row_max, row_sum, row_dot, label_logit, inv_temperature, legal):
    """Results of whole rows: validity, max z, log_sum, log-probability of the label, entropy."""
    valid = row_sum > 0  # a finite logit, and neither NaN nor +inf
    # The maximum's own share is 1 and its dot 0, rounded or not: no log-probability is above 0 and
    # no entropy below.
    row_sum = tl.where(valid, tl.maximum(row_sum, 1.0), 1.0)
    row_dot = tl.minimum(row_dot, 0.0)
    own_log_sum = tl.log(row_sum)  # beside the exact maximum of z
    entropy = own_log_sum - tl.div_rn(row_dot * LN2, row_sum)
    largest = tl.where(valid, row_max, float("nan"))
    row_max = largest * inv_temperature
    log_sum = own_log_sum + tl.fma(largest, inv_temperature, -row_max)
    logprob = tl.fma(label_logit, inv_temperature, -row_max) - log_sum
    logprob = tl.where(legal, logprob, float("nan"))
    entropy = tl.where(legal & valid, entropy, float("nan"))
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
def log_probability(x, inv_temperature, row_max, log_sum):
    """ln p of a logit x."""
    return tl.fma(x, inv_temperature, -row_max) - log_sum


@triton.jit
def grad_of(x, inv_temperature, row_max, log_sum, offset, slope):
    """dz of a logit x that is not the label."""
    log_p = log_probability(x, inv_temperature, row_max, log_sum)
    return tl.exp2(log_p * LOG2E) * tl.fma(slope, tl.maximum(log_p, ZERO_EXP), offset)


@triton.jit
def own_grad(x, y, row, KIND: tl.constexpr):
    """The same from a Gradient, of a row beside which there is no other."""
    return grad_of(x, row.inv_temperature, row.row_max, row.log_sum, row.offset, row.slope)


@triton.jit
def row_terms(
    grad_logprob, grad_entropy, label_logit, inv_temperature, row_max, log_sum, entropy, legal
):
    """Terms of rows' gradients: whether all of it is 0, offset, slope, dz of the label."""
    # A label at -inf stays impossible: no gradient through its log-probability.
    impossible = tl.fma(label_logit, inv_temperature, -row_max) == float("-inf")
    grad_logprob = tl.where(legal & impossible, 0.0, grad_logprob)
    zero = (grad_logprob == 0.0) & (grad_entropy == 0.0)
    offset = -tl.fma(grad_entropy, entropy, grad_logprob) * inv_temperature
    offset = tl.where(legal, offset, float("nan"))
    slope = -grad_entropy * inv_temperature
    at_label = grad_of(label_logit, inv_temperature, row_max, log_sum, offset, slope)
    return zero, offset, slope, at_label + grad_logprob * inv_temperature


@triton.jit
def grad_step(
    row_ptr,
    other_ptr,
    to_ptr,
    col,
    end,
    row,
    GRAD: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    MASKED: tl.constexpr,
    EVICT: tl.constexpr,
):
    """A step of the gradient but the label's: UNROLL * LANES columns from `col` on.

    A gradient half as wide as its logits starts where their row does: the bytes of its columns
    [c, c + n) are those of the logits' columns [c / 2, (c + n) / 2), which this step or an earlier
    one has read. The barrier keeps all threads' reads up to here before any thread's writes.
    """
    OVERLAP: tl.constexpr = to_ptr.dtype.element_ty != row_ptr.dtype.element_ty
    lanes = tl.arange(0, LANES)
    xs = ()
    ys = ()
    for u in tl.static_range(UNROLL):
        at = col + u * LANES
        inside = at + lanes < end if MASKED else None
        x = widened(tl.load(row_ptr + at + lanes, mask=inside, eviction_policy=EVICT))
        y = x
        if other_ptr is not None:
            y = widened(tl.load(other_ptr + at + lanes, mask=inside, eviction_policy=EVICT))
        xs = xs + (x,)
        ys = ys + (y,)
    if OVERLAP:
        tl.debug_barrier()
    for u in tl.static_range(UNROLL):
        at = col + u * LANES
        dz = GRAD(xs[u], ys[u], row, KIND)
        inside = at + lanes < end if MASKED else None
        dz = rounded(dz, to_ptr.dtype.element_ty)
        tl.store(to_ptr + at + lanes, dz, mask=inside, eviction_policy=EVICT)


@triton.jit
def grad_columns(
    row_ptr,
    other_ptr,
    to_ptr,
    start,
    end,
    V,
    row,
    GRAD: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The gradient of a row's columns [start, end); `end` as in scan_columns.

    GRAD(x, y, row, KIND) is dz of a logit x and, where there is another row, its y; `row` holds
    their terms, and `label` and `at_label` as a Gradient.
    """
    STEP: tl.constexpr = LANES * UNROLL
    full_end = start + (end - start) // STEP * STEP
    for col in tl.range(start, full_end, STEP, num_stages=STAGES):
        grad_step(row_ptr, other_ptr, to_ptr, col, V, row, GRAD, KIND, LANES, UNROLL, False, EVICT)
    for col in tl.range(full_end, end, 2 * LANES):  # 2: more would spill where ALIGN is 1
        grad_step(row_ptr, other_ptr, to_ptr, col, V, row, GRAD, KIND, LANES, 2, True, EVICT)
    if (row.label >= start) & (row.label < end):
        tl.debug_barrier()  # over what was just stored there
        tl.store(to_ptr + row.label, rounded(row.at_label, to_ptr.dtype.element_ty))


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
