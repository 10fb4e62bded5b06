"""Ahead-of-time table of kernels/support.py."""

from aot_axes import Aot, given, pointers, row_strides

from ppo_fast.kernels import config
from ppo_fast.kernels.support import SOFTMAX, constants, support_grad_kernel, support_kernel

AXES = {
    "logits_ptr": ("*fp32", "*bf16", "*fp16"),
    "offsets_ptr": "*i64",
    "mask_ptr": "*u8",
    "temperature_ptr": (None, "*fp32"),
    **row_strides("mask", "temperature"),
    **given("*fp32", *SOFTMAX),
    "inv_temperature": "fp32",
}

AOT = (
    Aot(support_kernel, AXES | constants(config.NARROW)),
    Aot(
        support_grad_kernel,
        AXES
        | {"grad_logprobs_ptr": (None, "*fp32"), "grad_entropy_ptr": (None, "*fp32")}
        | row_strides("grad_logprobs", "grad_entropy")
        | pointers("*fp32", "out")
        | constants(config.NARROW_GRAD),
    ),
)
