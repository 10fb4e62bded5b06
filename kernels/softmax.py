"""What the forward and the backward of a row's softmax share."""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import load_flag, row_offset

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: a state without a logit has m - m = 0
# exp(-200) is 0 in fp32, so clamping there changes nothing but 0 * -inf. It drops a NaN
# (max(NaN, x) = x), which is why the factor beside it comes from the unclamped argument.
ZERO_EXP = tl.constexpr(-200.0)
INTERPRETED = tl.constexpr(config.INTERPRETED)

# The row arguments of the kernels, which share their names: those Triton shall not specialise
# on, and the AOT alternatives of all of them.
TENSORS = ("logits", "tokens", "mask", "temp", "grad_logprobs", "grad_entropy", "out")
STRIDES = [f"{x}_{level}" for x in TENSORS for level in ("outer", "inner")]
RUNTIME = [*STRIDES, "inner", "n_rows", "n_parts", "n_segments", "inv_temp", "ignore_index"]
ROW_AXES = {
    "logits_ptr": ("*bf16:16", "*fp16:16", "*fp32:16", "*bf16"),
    "tokens_ptr": ("*i64:16", "*i32:16"),
    "mask_ptr": (None, "*u8:16"),
    "temp_ptr": (None, "*fp32:16"),
    **dict.fromkeys([*STRIDES[:8], "ignore_index"], "i64"),
    **dict.fromkeys(["inner", "V", "n_rows", "n_segments"], "i32"),
    "inv_temp": "fp32",
    "parts_ptr": "*fp32:16",
}


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


def alignment(base: Tensor, *strides: int) -> int:
    """Elements, at most 16 bytes of them, that the start of every row is a multiple of."""
    size = base.element_size()
    return math.gcd(16, *(s * size for s in strides)) // size if base.data_ptr() % 16 == 0 else 1


def valid_alignment(case: dict[str, Any]) -> bool:
    """Whether the launchers make this AOT case: see `alignment`, and one column is narrow."""
    pointer = case["logits_ptr"]
    widest = (4 if "32" in pointer else 8) if pointer.endswith(":16") else 1
    narrow = config.NARROW.warps == case["num_warps"]
    return case["ALIGN"] <= widest and (case["V"] != 1 or narrow)


def how_axis(*hows: config.Rows) -> tuple[dict[str, int], ...]:
    """The AOT alternatives of the constants that a `config.Rows` sets."""
    names = ("LANES", "UNROLL", "SEGMENT", "num_warps", "STAGES")
    return tuple(dict(zip(names, how, strict=True)) for how in hows)
