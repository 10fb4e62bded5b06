"""Ahead-of-time table of kernels/logprobs.py."""

from aot_axes import ROW_AXES, Aot, absent, pointers, tiling_axis, valid_alignment

from ppo_fast.kernels import config
from ppo_fast.kernels.logprobs import segments_kernel
from ppo_fast.kernels.softmax import SEGMENTS

SEVERAL = pointers("*fp32", "parts") | pointers("*i32", "counters") | {"SEGMENTS": SEGMENTS}
ONE = absent("parts", "counters") | {"SEGMENTS": 1}
WIDE, NARROW = tiling_axis(config.WIDE, config.NARROW)

AOT = (
    Aot(
        segments_kernel,
        {k: v for k, v in ROW_AXES.items() if k not in ("parts_ptr", "n_rows")}
        | pointers("*fp32", "logprobs", "entropy", "row_max", "log_sum")
        | {"n_parts": "i64", "V": ("i32:16", "i32", 1), "ALIGN": (8, 4, 2, 1)}
        | {"tiling": (WIDE | SEVERAL, WIDE | ONE, NARROW | ONE)},
        valid_alignment,
    ),
)
