"""Forward-mode derivatives, which the reference alone has; no kernel loses one silently.

The kernels have gradients alone. PyTorch hands a tensor with a tangent (`torch.func.jvp`,
`torch.autograd.forward_ad`) to them as if it were a constant, and the result's tangent would be 0.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.autograd import forward_ad

from ppo_fast import _backend
from ppo_fast._torch_private import in_forward_mode
from ppo_fast.teacher import Teacher

P = ParamSpec("P")
R = TypeVar("R")


def derivatives(*learns: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark an op as differentiable by the arguments `learns`, and by no others.

    Where one of them has a tangent, the op runs on the reference, unless another backend is asked
    for by name: that raises NotImplementedError, as does a tangent of any other argument.
    """

    def mark(op: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(op)

        @functools.wraps(op)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not in_forward_mode():  # all but always
                return op(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            names = [n for n, x in _tensors(given.arguments) if _has_tangent(x)]
            if names:
                given.arguments["backend"] = _reference(op.__name__, names, learns, given)
            return op(*given.args, **given.kwargs)

        return call

    return mark


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, x in arguments.items():
        if isinstance(x, Teacher):
            yield from _tensors({f"{name}.{field}": y for field, y in vars(x).items()})
        x = getattr(x, "values", x) if isinstance(x, tuple) else x  # Moments
        for y in x if isinstance(x, tuple | list) else (x,):  # a pair of tensors
            if isinstance(y, Tensor):
                yield name, y


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _reference(
    op: str, names: list[str], learns: tuple[str, ...], given: inspect.BoundArguments
) -> str:
    """The backend that has the derivative, or NotImplementedError."""
    for name in names:
        if name not in learns:
            raise NotImplementedError(
                f"{op}: {name} must have no forward-mode tangent, as the op has no derivative by"
                " it: pass it detached, if it is a constant"
            )
    asked = _backend.asked(given.arguments.get("backend"))
    if asked not in (None, "reference"):
        raise NotImplementedError(
            f"{op}: {names[0]} must have no forward-mode tangent on backend {asked!r}, which has"
            " gradients alone, got one; use backend='reference'"
        )
    if asked is None:
        warnings.warn(
            f"{op} runs on ppo_fast's slow PyTorch reference, which alone has forward-mode"
            " derivatives",
            RuntimeWarning,
            stacklevel=3,
        )
    return "reference"
