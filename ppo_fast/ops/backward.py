"""What the backwards share: they cannot be differentiated again, and may have nothing to scale."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_TWICE = b"ppo_fast: trying to differentiate twice through an op that is once_differentiable"


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As PyTorch's decorator of that name, whatever gradient comes in.

    PyTorch's sees the first backward's inputs only: where they are constants, as a loss's own
    gradient is, a second derivative would be taken for zero.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            out = backward(ctx, *grads)
        if torch.compiler.is_compiling():
            return out
        fail: Any = torch._C._functions.DelayedError(_TWICE, len(out))
        return fail(*(None if x is None else x.detach().requires_grad_() for x in out))

    return wrapper


def saveable(*constants: Tensor | None) -> tuple[Tensor | None, ...]:
    """Constants as autograd can save them: those that inference mode made are copied."""
    if torch.compiler.is_compiling():  # it knows no inference mode
        return constants
    return tuple(x.clone() if x is not None and x.is_inference() else x for x in constants)


def n_grads(*inputs: Tensor | None) -> int:
    """How many of the inputs, from the first, need a gradient: up to the last that requires it."""
    if not torch.is_grad_enabled():
        return 0
    wanted = [i for i, x in enumerate(inputs, 1) if x is not None and x.requires_grad]
    return max(wanted, default=0)


def _is_one(factor: Tensor) -> bool:
    """Known without asking a device."""
    on_host = factor.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_host and factor.item() == 1.0


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad·factor; the gradient itself where a factor that is on the CPU is exactly 1."""
    return grad if _is_one(factor) else grad * factor


def scaled_(grad: Tensor, factor: Tensor) -> Tensor:
    """The same in place."""
    return grad if _is_one(factor) else grad.mul_(factor)
