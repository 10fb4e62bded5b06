"""Ahead-of-time table of kernels/rlhf_advantages.py."""

from aot_axes import ADVANTAGE_AXES, Aot, given, layout_axes, pointers, step_strides

from ppo_fast.kernels.rlhf_advantages import STEPS, rlhf_kernel

AOT = (
    Aot(
        rlhf_kernel,
        ADVANTAGE_AXES
        | pointers("*fp32", "reward", "kl")
        | {"mask_ptr": "*u8"}
        | step_strides(*STEPS, "out")
        | dict.fromkeys(("masked", "estimator", "place"), "i32")
        | dict.fromkeys(("kl_coef", "kl_clamp", "score_min", "score_max"), "fp32")
        | {
            "dtypes": (
                given("*fp32", "score", "logp", "ref", "values"),
                given("*bf16", "logp", "ref", "values") | given("*fp32", "score"),
            ),
            "layout": (
                layout_axes(None, True),
                layout_axes(None, False),
                layout_axes("*i32", True),
                layout_axes("*i64", False),
            ),
            "boot_ptr": (None, "*fp32"),
            "kl_coef_ptr": (None, "*fp32"),
        },
    ),
)
