"""Ahead-of-time table of kernels/loss_tiles.py."""

from aot_axes import Aot, token_strides

from ppo_fast.kernels import config
from ppo_fast.kernels.loss_tiles import sequence_kernel

AOT = (
    Aot(
        sequence_kernel,
        token_strides("main", "old", "mask")
        | {
            "main_ptr": ("*fp32", "*bf16"),
            "old_ptr": ("*fp32", "*bf16", None),
            "mask_ptr": ("*u8", None),
            "cu_ptr": (None, "*i32", "*i64"),
            "counts_ptr": "*i32:16",
            "means_ptr": ("*fp32:16", None),
            "n_cols": "i64",
            "BLOCK": config.TOKENS.block,
            "num_warps": config.TOKENS.warps,
        },
        lambda case: case["old_ptr"] in (None, case["main_ptr"]),
    ),
)
