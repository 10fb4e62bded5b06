"""Precision and trainability of the weights of a model that is handed over."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ppo_fast.loop.config import Dtype
from ppo_fast.loop.model.layers import UnsupportedModelError


def chosen_dtype(asked: Dtype, device: torch.device) -> Dtype:
    """The option `dtype` with "auto" decided: "bfloat16" where the device multiplies in it.

    That is a GPU with bf16 units, or an x86 CPU with AMX or AVX512-BF16, which torch 2.10
    cannot tell. Elsewhere a product of bf16 numbers is slower than one of fp32 numbers.
    """
    if asked != "auto":
        return asked
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has: Any = getattr(torch.cpu, "get_capabilities", dict)()
        able = device.type == "cpu" and bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return "bfloat16" if able else "float32"


def widen(model: Any) -> bool:
    """Make trainable half-precision weights fp32, in place; whether forwards go on in bf16.

    Most of Adam's steps are smaller than a half-precision weight's spacing and would be lost.
    Frozen bf16 weights stay, and forwards run in bf16 under autocast. fp16 ones become fp32 too:
    gradients through fp16 activations underflow without a loss scale. fp64 stays.
    """
    weights = list(model.parameters())
    half = any(p.dtype == torch.float16 for p in weights)
    wide = [
        p
        for p in weights
        if p.dtype == torch.float16 or (p.dtype == torch.bfloat16 and p.requires_grad)
    ]
    in_bf16 = any(p.dtype == torch.bfloat16 for p in weights)
    if wide:
        warnings.warn(
            f"{sum(p.numel() for p in wide)} weights of {type(model).__name__} come in half"
            " precision, in which training would lose most steps: they are made float32 in place,"
            f" at twice the memory{', and so are frozen ones in float16' if half else ''}",
            stacklevel=2,
        )
    for p in wide:
        p.data = p.data.float()
    if half:
        model.float()  # buffers too: nothing is left for a cast between layers
    return in_bf16 and not half


def check_trainable(model: Any, train_layers: int) -> None:
    """Raise UnsupportedModelError where no weight of the policy trains; warn where some do not.

    With `train_layers` 0 the weights train that the model's owner left trainable.
    """
    name = type(model).__name__
    weights = [p for p in model.parameters() if p.is_floating_point()]
    frozen = [p for p in weights if not p.requires_grad]
    if len(frozen) == len(weights):
        raise UnsupportedModelError(
            f"model must have weights to train, got a {name} whose {len(weights)} all have"
            " requires_grad=False: call model.requires_grad_(True), or set train_layers"
        )
    if frozen and train_layers == 0:
        warnings.warn(
            f"train_layers 0 trains {len(weights) - len(frozen)} of the {len(weights)} weights of"
            f" {name}: the others have requires_grad=False",
            stacklevel=2,
        )
