"""Ahead-of-time table of kernels/scan.py."""

from aot_axes import Aot

from ppo_fast.kernels.scan import OFFSETS_BLOCK, OFFSETS_WARPS, offsets_kernel

AOT = (
    Aot(
        offsets_kernel,
        {
            "cu_ptr": ("*i32", "*i64"),
            "fails_ptr": "*i32:16",
            "n_seqs": "i64",
            "length": "i64",
            "BLOCK": OFFSETS_BLOCK,
            "num_warps": OFFSETS_WARPS,
        },
    ),
)
