"""Ahead-of-time table of kernels/divergence.py."""

from typing import Any

from aot_axes import ROW_AXES, Aot, absent, given, pointers, tiling_axis, valid_alignment

from ppo_fast.kernels import codes, config
from ppo_fast.kernels.divergence import divergence_kernel
from ppo_fast.kernels.divergence_pair import LEVELS, PER_ROW, STATES
from ppo_fast.kernels.softmax import SEGMENTS

KINDS = (
    codes.DIVERGENCE_REVERSE,
    codes.DIVERGENCE_FORWARD,
    codes.DIVERGENCE_JSD,
    codes.DIVERGENCE_MIXED,
)
WIDE, NARROW = tiling_axis(config.WIDE_PAIR, config.NARROW_PAIR)
SEVERAL = pointers("*fp32", "parts") | pointers("*i32", "counters") | {"SEGMENTS": SEGMENTS}
ONE = absent("parts", "counters") | {"SEGMENTS": 1}


def strides(*names: str) -> dict[str, str]:
    """Types of the two strides of tensors with rows."""
    return {f"{name}_{level}": "i64" for name in names for level in LEVELS}


# Rows of one type.
ROWS = tuple({"logits_ptr": kind, "teacher_ptr": kind} for kind in ROW_AXES["logits_ptr"])
AXES: dict[str, Any] = (
    strides("logits", "teacher")
    | dict.fromkeys(("inner", "V"), "i32")
    | dict.fromkeys(("beta", "rest"), "fp32")
    | {"KIND": tuple(kind.value for kind in KINDS)}
)
NUMBERS: dict[str, Any] = (
    {"mask_ptr": (None, "*u8"), "temperature_ptr": (None, "*fp32")}
    | {"teacher_temperature_ptr": (None, "*fp32")}
    | strides(*PER_ROW)
    | given("*fp32", *STATES)
    | dict.fromkeys(("inv_temperature", "teacher_inv_temperature"), "fp32")
)
ALIGN = (8, 4, 2, 1)


AOT = (
    Aot(
        divergence_kernel,
        AXES
        | NUMBERS
        | {"rows": ROWS, "ALIGN": ALIGN, "n_parts": "i64", "n_segments": "i32"}
        | pointers("*fp32", "divergence")
        | given("*fp32", "kl")
        | {"tiling": (WIDE | SEVERAL, WIDE | ONE, NARROW | ONE)},
        valid_alignment,
    ),
)
