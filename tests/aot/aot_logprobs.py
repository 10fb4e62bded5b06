"""Ahead-of-time table of kernels/logprobs.py."""

from aot_axes import ROW_AXES, Aot, tiling_axis, valid_alignment

from ppo_fast.kernels import config
from ppo_fast.kernels.logprobs import merge_kernel, segments_kernel

AOT = (
    Aot(
        segments_kernel,
        ROW_AXES
        | {"n_parts": "i64", "V": ("i32:16", "i32", 1), "ALIGN": (8, 4, 2, 1)}
        | {"tiling": tiling_axis(config.WIDE, config.NARROW)},
        valid_alignment,
    ),
    Aot(
        merge_kernel,
        ROW_AXES
        | {f"{name}_ptr": "*fp32:16" for name in ("logprobs", "entropy", "row_max", "log_sum")}
        | {"ROWS": config.ROW_SCALARS.block, "num_warps": config.ROW_SCALARS.warps}
        | {"SEGMENTS": (1, 2, 4, 8, 16)},
    ),
)
