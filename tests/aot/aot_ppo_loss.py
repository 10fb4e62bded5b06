"""Ahead-of-time table of kernels/ppo_loss.py."""

from aot_axes import LOSS_AXES, Aot, absent, given, pointers, token_strides

from ppo_fast.kernels.common import MAX_REGISTERS
from ppo_fast.kernels.loss_tiles import TWO_RESIDENT
from ppo_fast.kernels.ppo_loss import CODES, TOKENS, ppo_kernel, registers

_OPTIONAL = ("is", "ent", "ref")
_POINTERS = tuple(absent(*_OPTIONAL))
_DEVICE = ("ent_coef", "kl_coef", "denom")
AOT = (
    Aot(
        ppo_kernel,
        LOSS_AXES
        | token_strides(*TOKENS)
        | dict.fromkeys(CODES, "i32")
        | {"seq_weight_step": "i64"}
        | dict.fromkeys(("ratio_low", "ratio_high", "dual_clip", "log_min", "log_max"), "fp32")
        | dict.fromkeys(("ent_coef", "kl_coef", "kl_clamp", "kl_ratio_clip"), "fp32")
        | {
            "sequences": (
                absent("cu", "means", "seq_weight") | {"PER_SEQUENCE": False, "LOOK_UP": False},
                absent("cu", "seq_weight")
                | pointers("*fp32", "means")
                | {"PER_SEQUENCE": True, "LOOK_UP": True},
                absent("cu", "means", "seq_weight") | {"PER_SEQUENCE": True, "LOOK_UP": True},
                absent("cu", "means")
                | given("*fp32", "seq_weight")
                | {"PER_SEQUENCE": True, "LOOK_UP": True},
                absent("means", "seq_weight")
                | given("*i32", "cu")
                | {"PER_SEQUENCE": True, "LOOK_UP": False},
                absent("means", "seq_weight")
                | given("*i32", "cu")
                | {"PER_SEQUENCE": True, "LOOK_UP": True},
                given("*i64", "cu")
                | pointers("*fp32", "means")
                | given("*fp32", "seq_weight")
                | {"PER_SEQUENCE": True, "LOOK_UP": True},
            ),
            "inputs": (
                given("*fp32", "logp", "old", "adv"),
                given("*bf16", "logp", "old", "adv"),
                given("*fp32", "logp", "adv") | absent("old"),
            ),
            "grads": (
                given("*fp32", "grad", "grad_ent"),
                given("*fp32", "grad") | absent("grad_ent"),
                absent("grad", "grad_ent"),
            ),
            "optional": (absent(*_OPTIONAL), given("*fp32", *_OPTIONAL)),
            "mask_ptr": ("*u8", None),
            "moments_ptr": ("*fp64", None),
            "device": (absent(*_DEVICE), given("*fp32", *_DEVICE)),
            "registers": (TWO_RESIDENT, MAX_REGISTERS),
        },
        # Entropies have a gradient only if they are there.
        lambda case: (
            registers(case["LOOK_UP"], *map(case.get, _POINTERS)).items() <= case.items()
            and not (case["grad_ent_ptr"] and not case["ent_ptr"])
        ),
    ),
)
