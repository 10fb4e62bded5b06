"""Ahead-of-time table of kernels/token_stats.py."""

from aot_axes import ROW_AXES, Aot, absent, pointers, tiling_axis, valid_alignment

from ppo_fast.kernels import config
from ppo_fast.kernels.softmax import SEGMENTS
from ppo_fast.kernels.token_stats import token_stats_kernel

PARTS = ("parts", "tops", "counters")
SEVERAL = pointers("*fp32", "parts") | pointers("*i32", "tops", "counters")
WIDE, NARROW = tiling_axis(config.WIDE, config.NARROW)
RESULTS = ("logprobs", "entropy", "row_max", "log_sum", "log_sum_sq", "mean")

AOT = (
    Aot(
        token_stats_kernel,
        {k: v for k, v in ROW_AXES.items() if k not in ("logits_ptr", "n_rows")}
        | pointers("*fp32", "logits", *RESULTS)
        | pointers("*i64", "top")
        | {"n_parts": "i64", "inv_vocab": "fp32", "V": ("i32:16", "i32", 1), "ALIGN": (4, 2, 1)}
        | {
            "tiling": (
                WIDE | SEVERAL | {"SEGMENTS": SEGMENTS},
                WIDE | absent(*PARTS) | {"SEGMENTS": 1},
                NARROW | absent(*PARTS) | {"SEGMENTS": 1},
            )
        },
        valid_alignment,
    ),
)
