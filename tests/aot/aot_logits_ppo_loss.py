"""Ahead-of-time table of kernels/logits_ppo_loss.py."""

from aot_axes import (
    GRADIENT_POINTERS,
    ROW_AXES,
    Aot,
    absent,
    pointers,
    tiling_axis,
    valid_alignment,
)

from ppo_fast.kernels.logits_ppo_loss import (
    CODES,
    NUMBERS,
    TILING_CONSTANTS,
    TOKEN_STRIDES,
    logits_ppo_kernel,
)
from ppo_fast.kernels.softmax import STRIDES

AOT = (
    Aot(
        logits_ppo_kernel,
        {k: v for k, v in ROW_AXES.items() if k in STRIDES or k in ("inner", "n_rows")}
        | dict.fromkeys([*TOKEN_STRIDES, "out_outer", "out_inner", "ignore_index"], "i64")
        | dict.fromkeys(NUMBERS, "fp32")
        | dict.fromkeys((*CODES, "n_segments"), "i32")
        | {"inv_temperature": "fp32", "V": ("i32:16", "i32", 1), "ALIGN": (8, 4, 2, 1)}
        | pointers("*fp32", "weight", "logprobs", "entropy")
        | {
            "logits": GRADIENT_POINTERS,
            "tiling": tuple(
                tiling_axis(tiling)[0] | more for tiling, more in TILING_CONSTANTS.items()
            ),
            "tokens": (
                pointers("*i64", "tokens") | absent("mask", "temperature"),
                pointers("*i64", "tokens") | pointers("*u8", "mask") | absent("temperature"),
                pointers("*i32", "tokens")
                | pointers("*u8", "mask")
                | pointers("*fp32", "temperature"),
            ),
            "inputs": (
                pointers("*fp32", "old", "adv"),
                pointers("*bf16", "old", "adv"),
                pointers("*fp32", "adv") | absent("old"),
            ),
            "optional": (absent("is", "ref"), pointers("*fp32", "is", "ref")),
            "device": (
                absent("moments", "ent_coef", "kl_coef"),
                pointers("*fp64", "moments") | pointers("*fp32", "ent_coef", "kl_coef"),
            ),
        },
        valid_alignment,
    ),
)
