"""Ahead-of-time table of kernels/divergence_grad.py."""

from aot_axes import Aot, given, pointers, valid_alignment
from aot_divergence import ALIGN, AXES, NARROW, NUMBERS, ROWS, WIDE, strides

from ppo_fast.kernels import config
from ppo_fast.kernels.divergence_grad import divergence_grad_kernel, divergence_terms_kernel
from ppo_fast.kernels.divergence_pair import GRADS, SAVED

# Of one type with the rows, or half as wide.
GRADIENTS = (
    *(rows | {"out_ptr": rows["logits_ptr"]} for rows in ROWS),
    {"logits_ptr": "*fp32:16", "teacher_ptr": "*fp32:16", "out_ptr": "*bf16:16"},
)
AOT = (
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
