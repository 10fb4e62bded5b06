"""Ahead-of-time table of kernels/whiten.py."""

from aot_axes import Aot

from ppo_fast.kernels.common import MERGE_BLOCK
from ppo_fast.kernels.whiten import (
    BLOCK,
    GEOMETRY,
    WARPS,
    merge_moments_kernel,
    moments_kernel,
    whiten_kernel,
)

AXES = {
    "x_ptr": ("*fp32:16", "*bf16:16", "*fp16:16", "*fp32"),
    "mask_ptr": (None, "*u8:16", "*u8"),
    **dict.fromkeys(GEOMETRY, "i64"),
    "BLOCK": BLOCK,
    "num_warps": WARPS,
    "DENSE": (True, False),
}
AOT = (
    Aot(moments_kernel, AXES | {"parts_ptr": "*fp64:16", "n_parts": "i64"}),
    Aot(
        whiten_kernel,
        AXES
        | {"moments_ptr": "*fp64:16", "out_ptr": "*fp32:16", "eps": "fp32"}
        | dict.fromkeys(["shift_mean", "unbiased", "eps_at_std"], "i32"),
    ),
    Aot(
        merge_moments_kernel,
        {
            "parts_ptr": "*fp64:16",
            "out_ptr": "*fp64:16",
            "n_parts": "i32",
            "BLOCK": MERGE_BLOCK,
        },
    ),
)
