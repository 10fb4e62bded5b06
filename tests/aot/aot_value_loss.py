"""Ahead-of-time table of kernels/value_loss.py."""

from aot_axes import LOSS_AXES, Aot, absent, given, token_strides

from ppo_fast.kernels.value_loss import TOKENS, value_kernel

AOT = (
    Aot(
        value_kernel,
        LOSS_AXES
        | token_strides(*TOKENS)
        | {"form": "i32", "clip": "fp32", "factor": "fp32"}
        | {
            "sequences": (
                absent("cu") | {"PER_SEQUENCE": False, "LOOK_UP": False},
                absent("cu") | {"PER_SEQUENCE": True, "LOOK_UP": True},
                given("*i32", "cu") | {"PER_SEQUENCE": True, "LOOK_UP": False},
                given("*i64", "cu") | {"PER_SEQUENCE": True, "LOOK_UP": True},
            ),
            "inputs": (
                given("*fp32", "values", "old", "ret"),
                given("*bf16", "values", "old", "ret"),
                given("*fp32", "values", "ret") | absent("old"),
            ),
            "grad_ptr": ("*fp32", None),
            "mask_ptr": ("*u8", None),
            "denom_ptr": ("*fp32", None),
        },
    ),
)
