"""A row's softmax: one pass for its state, one for its gradient, and how rows are taken."""

import math

import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import load_flag, pair_sum, row_offset

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: a state without a logit has m - m = 0
# exp(-200) is 0 in fp32, so clamping there changes nothing but 0 * -inf. It drops a NaN
# (max(NaN, x) = x), which is why the factor beside it comes from the unclamped argument.
ZERO_EXP = tl.constexpr(-200.0)
INTERPRETED = tl.constexpr(config.INTERPRETED)

# The row arguments of the kernels, which share their names, that Triton shall not specialise on.
TENSORS = ("logits", "tokens", "mask", "temp", "grad_logprobs", "grad_entropy", "out")
STRIDES = [f"{x}_{level}" for x in TENSORS for level in ("outer", "inner")]
RUNTIME = [*STRIDES, "inner", "n_rows", "n_parts", "n_segments", "inv_temp", "ignore_index"]


@triton.jit
def inverse_temperature(temp_ptr, offset, inside, inv_temp):
    """1 / temperature of the row or rows: the tensor's, or the number given."""
    if temp_ptr is None:
        return inv_temp
    else:
        return tl.div_rn(1.0, tl.load(temp_ptr + offset, mask=inside, other=1.0).to(tl.float32))


@triton.jit
def rescale(m, top, s, t):
    """The sums (s, t) of a state with maximum m, restated for the maximum top >= m."""
    shift = tl.maximum(m - top, ZERO_EXP)
    r = tl.exp2(shift * LOG2E)
    return s * r, tl.fma(shift, s, t) * r


@triton.jit
def scan_step(
    row_ptr, col, end, m, s, t, inv_t,
    LANES: tl.constexpr, UNROLL: tl.constexpr, MASKED: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Take UNROLL logits per lane from column `col` on into the lanewise state."""
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
    top = xs[0]
    for u in tl.static_range(1, UNROLL):
        top = tl.maximum(top, xs[u])
    top = tl.maximum(m, top * inv_t)
    s, t = rescale(m, top, s, t)
    for u in tl.static_range(UNROLL):
        d = tl.fma(xs[u], inv_t, -top)
        e = tl.exp2(d * LOG2E)
        s += e
        t = tl.fma(e, tl.maximum(d, ZERO_EXP), t)
    return top, s, t


@triton.jit
def scan_columns(
    row_ptr, start, end, V, inv_t,
    LANES: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """(max z, sum e^(z-max), sum (z-max) e^(z-max)) of a row's columns [start, end).

    `end` is V, or start plus a multiple of the step. Nothing crosses lanes before the end.
    """
    m = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    STEP: tl.constexpr = LANES * UNROLL
    full_end = start + (end - start) // STEP * STEP
    for col in tl.range(start, full_end, STEP, num_stages=STAGES):
        m, s, t = scan_step(row_ptr, col, V, m, s, t, inv_t, LANES, UNROLL, False, EVICT)
    if full_end < end:
        m, s, t = scan_step(row_ptr, full_end, V, m, s, t, inv_t, LANES, UNROLL, True, EVICT)
    top = tl.max(m, axis=0)
    s, t = rescale(m, top, s, t)
    return top, pair_sum(s, LANES), pair_sum(t, LANES)


@triton.jit
def outcome(top, s, t, x, inv_t, legal):
    """Of whole rows' states and labels' logits: sound, m, log_sum, log-probability, entropy."""
    sound = s > 0  # a finite logit, and neither NaN nor +inf
    s = tl.where(sound, s, 1.0)
    log_sum = tl.log(s)
    top = tl.where(sound, top, float("nan"))
    logprob = tl.where(legal, tl.fma(x, inv_t, -top) - log_sum, float("nan"))
    entropy = tl.where(legal & sound, log_sum - tl.div_rn(t, s), float("nan"))
    return sound, top, log_sum, logprob, entropy


@triton.jit
def label_rows(
    rows, inside, inner, V,
    logits_ptr, logits_outer, logits_inner, tokens_ptr, tokens_outer, tokens_inner,
    mask_ptr, mask_outer, mask_inner, temp_ptr, temp_outer, temp_inner, inv_temp, ignore_index,
):  # fmt: skip
    """Of a vector of rows: live, the label is legal, the label, its logit, 1 / temperature."""
    offset = row_offset(rows, inner, tokens_outer, tokens_inner)
    token = tl.load(tokens_ptr + offset, mask=inside, other=0)
    live = inside & (token != ignore_index)
    live = load_flag(mask_ptr, row_offset(rows, inner, mask_outer, mask_inner), live)
    legal = live & (token >= 0) & (token < V)
    offset = row_offset(rows, inner, logits_outer, logits_inner)
    x = tl.load(logits_ptr + offset + token, mask=legal, other=0.0).to(tl.float32)
    offset = row_offset(rows, inner, temp_outer, temp_inner)
    return live, legal, token, x, inverse_temperature(temp_ptr, offset, live, inv_temp)


@triton.jit
def aligned(offset, ALIGN: tl.constexpr):
    """An offset that is a multiple of ALIGN, spelled so that the compiler knows it.

    Triton 3.6 drops `tl.multiple_of` from a scalar, and with it 16-byte loads.
    """
    return offset // ALIGN * ALIGN


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
def grad_step(
    row_ptr, to_ptr, col, end, label, m, log_sum, inv_t, a, b, c,
    LANES: tl.constexpr, UNROLL: tl.constexpr, MASKED: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Read UNROLL * LANES logits from column `col` on, write their gradient."""
    lanes = tl.arange(0, LANES)
    xs = ()
    for u in tl.static_range(UNROLL):
        at = col + u * LANES
        inside = at + lanes < end if MASKED else None
        x = tl.load(row_ptr + at + lanes, mask=inside, eviction_policy=EVICT)
        xs = xs + (x.to(tl.float32),)
    for u in tl.static_range(UNROLL):
        at = col + u * LANES
        log_p = tl.fma(xs[u], inv_t, -m) - log_sum
        p = tl.exp2(log_p * LOG2E)
        dz = p * tl.fma(b, tl.maximum(log_p, ZERO_EXP), a)
        dz = tl.where(lanes == label - at, dz + c, dz)
        inside = at + lanes < end if MASKED else None
        dz = rounded(dz, to_ptr.dtype.element_ty)
        tl.store(to_ptr + at + lanes, dz, mask=inside, eviction_policy=EVICT)


@triton.jit
def grad_columns(
    row_ptr, to_ptr, start, end, V, label, m, log_sum, inv_t, a, b, c,
    LANES: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Read a row's columns [start, end) and write their gradient; `end` as in scan_columns."""
    STEP: tl.constexpr = LANES * UNROLL
    full_end = start + (end - start) // STEP * STEP
    for col in tl.range(start, full_end, STEP, num_stages=STAGES):
        grad_step(
            row_ptr, to_ptr, col, V, label, m, log_sum, inv_t, a, b, c,
            LANES, UNROLL, False, EVICT,
        )  # fmt: skip
    for col in tl.range(full_end, end, 2 * LANES):  # 2: more would spill where ALIGN is 1
        grad_step(
            row_ptr, to_ptr, col, V, label, m, log_sum, inv_t, a, b, c, LANES, 2, True, EVICT
        )  # fmt: skip


@triton.jit
def zero_columns(to_ptr, start, end, V, STEP: tl.constexpr):
    """Write zeros to a row's columns [start, end)."""
    full_end = start + (end - start) // STEP * STEP
    cols = tl.arange(0, STEP)
    none = tl.zeros([STEP], to_ptr.dtype.element_ty)
    for col in tl.range(start, full_end, STEP):
        tl.store(to_ptr + col + cols, none)
    if full_end < end:
        tl.store(to_ptr + full_end + cols, none, mask=full_end + cols < V)


def alignment(base: Tensor, *strides: int) -> int:
    """Elements, at most 16 bytes of them, that the start of every row is a multiple of."""
    size = base.element_size()
    return math.gcd(16, *(s * size for s in strides)) // size if base.data_ptr() % 16 == 0 else 1
