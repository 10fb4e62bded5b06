"""Ahead-of-time table of kernels/common.py."""

from aot_axes import Aot

from ppo_fast.kernels.common import MERGE_BLOCK, merge_moments_kernel

AOT = (
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
