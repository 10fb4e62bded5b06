"""Ahead-of-time table of kernels/logprobs_grad.py."""

from aot_axes import GRADIENT_POINTERS, ROW_AXES, Aot, tiling_axis, valid_alignment

from ppo_fast.kernels import config
from ppo_fast.kernels.logprobs_grad import dlogits_kernel, terms_kernel
from ppo_fast.kernels.softmax import STRIDES

AOT = (
    Aot(
        terms_kernel,
        ROW_AXES
        | {"grad_logprobs_ptr": (None, "*fp32:16"), "grad_entropy_ptr": (None, "*fp32:16")}
        | dict.fromkeys(STRIDES[8:12], "i64")
        | {f"{x}_ptr": "*fp32:16" for x in ("entropy", "row_max", "log_sum", "terms")}
        | {"labels_ptr": "*i32:16"}
        | {"ROWS": config.ROW_SCALARS.block, "num_warps": config.ROW_SCALARS.warps},
    ),
    Aot(
        dlogits_kernel,
        {
            "pointers": GRADIENT_POINTERS,
            **dict.fromkeys(["logits_outer", "logits_inner", "out_outer", "out_inner"], "i64"),
            "terms_ptr": "*fp32:16",
            "labels_ptr": "*i32:16",
            "inner": "i32",
            "V": ("i32:16", "i32", 1),
            "n_rows": "i64",
            "n_segments": "i32",
            "tiling": tiling_axis(config.WIDE_GRAD, config.NARROW_GRAD),
            "ALIGN": (8, 4, 2, 1),
        },
        valid_alignment,
    ),
)
