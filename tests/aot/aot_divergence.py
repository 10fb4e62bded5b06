"""Ahead-of-time table of kernels/divergence.py."""

from typing import Any

from aot_axes import ROW_AXES, Aot, absent, given, pointers, tiling_axis, valid_alignment

from ppo_fast.kernels import config
from ppo_fast.kernels.codes import (
    DIVERGENCE_FORWARD,
    DIVERGENCE_JSD,
    DIVERGENCE_MIXED,
    DIVERGENCE_REVERSE,
)
from ppo_fast.kernels.divergence import (
    GRADS,
    LEVELS,
    PER_ROW,
    SAVED,
    STATES,
    divergence_grad_kernel,
    divergence_kernel,
    divergence_terms_kernel,
)
from ppo_fast.kernels.softmax import SEGMENTS

KINDS = (DIVERGENCE_REVERSE, DIVERGENCE_FORWARD, DIVERGENCE_JSD, DIVERGENCE_MIXED)
WIDE, NARROW = tiling_axis(config.WIDE_PAIR, config.NARROW_PAIR)
SEVERAL = pointers("*fp32", "parts") | pointers("*i32", "counters") | {"SEGMENTS": SEGMENTS}
ONE = absent("parts", "counters") | {"SEGMENTS": 1}


def strides(*names: str) -> dict[str, str]:
    """Types of the two strides of tensors with rows."""
    return {f"{name}_{level}": "i64" for name in names for level in LEVELS}


# Rows of one type, the gradient's too where there is one, or fp32 and the gradient half as wide.
ROWS = tuple({"logits_ptr": kind, "teacher_ptr": kind} for kind in ROW_AXES["logits_ptr"])
GRADIENTS = (
    *(rows | {"out_ptr": rows["logits_ptr"]} for rows in ROWS),
    {"logits_ptr": "*fp32:16", "teacher_ptr": "*fp32:16", "out_ptr": "*bf16:16"},
)
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
    Aot(
        divergence_terms_kernel,
        AXES
        | NUMBERS
        | {"rows": ROWS, "tokens_ptr": ("*i64", "*i32"), "n_rows": "i64"}
        | {f"{name}_ptr": (None, "*fp32") for name in GRADS[:2]}
        | given("*fp32", GRADS[2], *SAVED)
        | strides("tokens", *GRADS, *SAVED)
        | pointers("*fp32", "terms")
        | pointers("*i32", "labels")
        | {"ROWS": config.ROW_SCALARS.block, "num_warps": config.ROW_SCALARS.warps},
    ),
    Aot(
        divergence_grad_kernel,
        AXES
        | strides("out")
        | {"rows": GRADIENTS, "ALIGN": ALIGN, "n_rows": "i64", "n_segments": "i32"}
        | pointers("*fp32", "terms")
        | pointers("*i32", "labels")
        | {"tiling": (WIDE, NARROW)},
        valid_alignment,
    ),
)
