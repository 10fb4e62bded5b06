"""Ahead-of-time table of kernels/gae.py."""

from aot_axes import ADVANTAGE_AXES, Aot, lambda_axes, layout_axes, pointers, step_strides

from ppo_fast.kernels.gae import gae_kernel

AOT = (
    Aot(
        gae_kernel,
        ADVANTAGE_AXES
        | {"gamma_low": "fp32", "decay_ret": "fp32"}
        | step_strides(
            "rewards", "values", "mask", "next", "term", "trunc", "rho", "c", "lam", "lam_ret"
        )
        | step_strides("out")
        | {"boot_seq": "i64"}
        | {
            "layout": (
                layout_axes(None, True) | pointers("*fp32", "rewards", "values"),
                layout_axes(None, False) | pointers("*bf16", "rewards", "values"),
                layout_axes("*i32:16", True) | pointers("*bf16", "rewards", "values"),
                layout_axes("*i64:16", False) | pointers("*fp32", "rewards", "values"),
            ),
            "masks": (
                {"mask_ptr": None, "CARRY": True},
                {"mask_ptr": "*u8:16", "CARRY": True},
                {"mask_ptr": "*u8:16", "CARRY": False},
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
