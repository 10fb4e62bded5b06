"""Ahead-of-time table of kernels/gae.py."""

from aot_axes import ADVANTAGE_AXES, Aot, given, lambda_axes, layout_axes, step_strides

from ppo_fast.kernels.gae import STEPS, gae_kernel

AOT = (
    Aot(
        gae_kernel,
        ADVANTAGE_AXES
        | {"gamma_low": "fp32", "decay_ret": "fp32"}
        | step_strides(*STEPS, "out")
        | {
            "layout": (
                layout_axes(None, True) | given("*fp32", "rewards", "values"),
                layout_axes(None, False) | given("*bf16", "rewards", "values"),
                layout_axes("*i32", True) | given("*bf16", "rewards", "values"),
                layout_axes("*i64", False) | given("*fp32", "rewards", "values"),
            ),
            "masks": (
                {"mask_ptr": None, "CARRY": True},
                {"mask_ptr": "*u8", "CARRY": True},
                {"mask_ptr": "*u8", "CARRY": False},
            ),
            "lambdas": lambda_axes(),
            "next_ptr": (None, "*fp32"),
            "boot_ptr": (None, "*fp32"),
            "term_ptr": (None, "*u8"),
            "trunc_ptr": (None, "*u8"),
            "rho_ptr": (None, "*fp32"),
            "c_ptr": (None, "*fp32"),
        },
        # next_values exclude a bootstrap, and a truncation needs them.
        lambda case: (
            not (case["next_ptr"] and case["boot_ptr"])
            and not (case["trunc_ptr"] and not case["next_ptr"])
        ),
    ),
)
