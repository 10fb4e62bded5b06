"""Helpers of the ops' autograd: constants, gradients that are asked for, one backward alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ppo_fast._boundary import calls
from ppo_fast._torch_private import keeps_graph

T = TypeVar("T", Tensor, Tensor | None)


class _Once(torch.autograd.Function):
    """Gradients that are no constants, and that have no derivative."""

    @staticmethod
    def forward(*grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "ppo_fast: trying to differentiate twice through an op that is once_differentiable"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's decorator of that name, for any incoming gradient.

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
        return _Once.apply(*(None if x is None else x.detach().requires_grad_() for x in out))

    return wrapper


def detached(x: T) -> T:
    """A constant: no gradient flows to it."""
    return x.detach() if x is not None and x.requires_grad else x


def saveable(*constants: Tensor | None) -> tuple[Tensor | None, ...]:
    """Constants as autograd can save them: those that inference mode made are copied."""
    if torch.compiler.is_compiling():  # it knows no inference mode
        return constants
    return tuple(x.clone() if x is not None and x.is_inference() else x for x in constants)


def n_grads(*inputs: Tensor | None) -> int:
    """Number of leading inputs to form gradients for: one more than the last that requires it."""
    if not torch.is_grad_enabled():
        return 0
    count = 0
    for i, x in enumerate(inputs, 1):
        if x is not None and x.requires_grad:
            count = i
    return count


def _is_one(factor: Tensor) -> bool:
    """Exactly 1, as far as the host knows without a synchronisation."""
    on_host = factor.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_host and factor.item() == 1.0


def _last_use() -> bool:
    """True in a backward after which the graph, and what it saved, is freed."""
    if torch.compiler.is_compiling():
        return False
    return not keeps_graph()


def scaled(backend: str, grads: Tensor, factor: Tensor, scale: Tensor | None = None) -> Tensor:
    """grads·factor·scale of saved gradients, in their dtype; the factors are 0-d and wide.

    Where the factor is exactly 1 nothing is read or written, the host knowing it or not: on a
    device a kernel looks, and scales in place. Under `retain_graph` a copy is scaled, for another
    backward will want the gradients as they were saved.
    """
    if backend == "cpu":
        factor = factor if scale is None else factor * scale
        return grads if _is_one(factor) else grads * factor
    if not _last_use():
        return calls.scaled(backend, grads, factor, scale)
    calls.scaled_(backend, grads, factor, scale)
    return grads


def scaled_(backend: str, grads: Tensor, factor: Tensor) -> Tensor:
    """The same always in place."""
    if backend == "cpu":
        return grads if _is_one(factor) else grads.mul_(factor)
    calls.scaled_(backend, grads, factor, None)
    return grads
