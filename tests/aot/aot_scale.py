"""Ahead-of-time table of kernels/scale.py."""

from typing import Any

from aot_axes import Aot

from ppo_fast.kernels.scale import BLOCK, GEOMETRY, WARPS, scale_kernel

POINTERS = ("*fp32:16", "*bf16:16", "*fp16:16", "*fp32", "*bf16")


def valid(case: dict[str, Any]) -> bool:
    """True if the launcher makes this case: see `softmax.alignment`."""
    pointer = case["x_ptr"]
    widest = (4 if "32" in pointer else 8) if pointer.endswith(":16") else 1
    return case["ALIGN"] <= widest


AOT = (
    Aot(
        scale_kernel,
        {
            "pointers": tuple({"x_ptr": p, "out_ptr": p} for p in POINTERS),
            **dict.fromkeys([*GEOMETRY, "n_rows", "n_cols", "n_tiles"], "i64"),
            "factor_ptr": ("*fp32:16", "*fp32"),
            "scale_ptr": (None, "*fp32:16"),
            "inner": "i32",
            "BLOCK": BLOCK,
            "IN_PLACE": (True, False),
            "ALIGN": (8, 4, 2, 1),
            "num_warps": WARPS,
        },
        valid,
    ),
)
