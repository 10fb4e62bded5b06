"""`Provider`, one implementation of an op, and `Bound`, a provider with a call's inputs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.adapter import is_adapted
from benchmarks.ops.case import BACKWARD, Case
from benchmarks.ops.support import is_frozen
from ppo_fast.testing import Call
from ppo_fast.testing.calls import DIFFERENTIABLE

Named = dict[str, Tensor]

# Half a bf16 spacing in spacings of fp32: what rounding logits to bf16 may err by.
BF16_LOGITS = 2.0**14


@dataclass(frozen=True)
class Bound:
    """A provider with its inputs in place.

    `call` is what is timed, the release of its result included. `named` turns that result into
    named tensors for the gate. `prepare` runs before each timed call, untimed. `moved` is a
    ceiling's traffic in bytes; everybody else is credited with what the case cannot do without.
    """

    call: Callable[[], Any]
    named: Callable[[Any], dict[str, Any]]
    prepare: Callable[[], None] | None = None
    moved: int | None = None


@dataclass(frozen=True)
class Provider:
    """One implementation of an op. `missing` gives the reason why it cannot run here, or None.

    A ceiling moves bytes and computes nothing that a gate could check. A `plain` one is PyTorch's
    own arithmetic. `roundings` is what its documented method may err beyond the op's budget, in
    spacings of fp32. `computes` says where it does less, or other, than the op. One that answers
    another question than the case's has a call of its own, `asked`, and is gated against that.
    """

    name: str
    bind: Callable[[Case, Call], Bound]
    missing: Callable[[], str | None] = lambda: None
    ceiling: bool = False
    plain: bool = False
    roundings: float = 0.0
    computes: str = ""
    asked: Callable[[Case], Call] | None = None


def needs(module: str, package: str, *, gpu: bool = False) -> Callable[[], str | None]:
    """Reason why a package's module does not import, or not without a GPU, if it does not."""

    def missing() -> str | None:
        if gpu and not torch.cuda.is_available():
            return "its kernels need a GPU"
        top = module.partition(".")[0]
        if importlib.util.find_spec(top) is None:
            return f"{top} is not installed; pip install '{package}'"
        try:
            importlib.import_module(module)
        except Exception as error:  # importing a peer may fail in any way
            return f"{module} does not import: {type(error).__name__}: {error}"
        return None

    return missing


def leaves(case: Case, call: Call) -> tuple[Named, Named]:
    """The call's tensors, and those of them that gradients flow to: leaves where asked for."""
    tensors = dict(call.tensors)
    wanted = DIFFERENTIABLE[call.op][0] if case.grad else ()
    frozen = is_frozen(case) or is_adapted(case)
    wanted = tuple(name for name in wanted if not (name == "weight" and frozen))
    for name in wanted:
        if name in tensors:
            tensors[name] = tensors[name].detach().clone().requires_grad_()
    return tensors, {name: tensors[name] for name in wanted if name in tensors}


def timed(
    case: Case,
    call: Call,
    forward: Callable[[], Any],
    inputs: Named,
    named: Callable[[Any], Named],
    *,
    only: str = "",
    prepare: Callable[[], None] | None = None,
) -> Bound:
    """`forward`, and the gradients of the call's cotangents where the case takes them.

    Its result begins with the outputs that have a cotangent, or with the `only` one of them that
    the provider computes: its gradients are then those of that output alone. `prepare` runs
    untimed before each call, and before a forward pass that is not timed either.
    """
    if not case.differentiates:
        return Bound(forward, lambda out: _detached(named(out)), prepare)
    kept = {k: v for k, v in call.cotangents.items() if not only or k == only}
    cotangents, state = tuple(kept.values()), {}

    def gradients(out: Any) -> tuple[Any, tuple[Tensor, ...]]:
        outputs = (out,) if isinstance(out, Tensor) else out[: len(cotangents)]
        return out, torch.autograd.grad(outputs, tuple(inputs.values()), cotangents)

    def forward_first() -> None:
        if prepare is not None:
            prepare()
        state["out"] = forward()

    def every(result: Any) -> Named:
        out, grads = result
        mark = f"|{only}" if only else ""
        of = {f"grad_{name}{mark}": grad for name, grad in zip(inputs, grads, strict=True)}
        return _detached(named(out) | of)

    if case.direction == BACKWARD:
        return Bound(lambda: gradients(state["out"]), every, forward_first)
    return Bound(lambda: gradients(forward()), every, prepare)


def _detached(tensors: Named) -> Named:
    return {name: x.detach() for name, x in tensors.items()}


def batched(x: Tensor) -> Tensor:
    """Flat rows as the batch of sequences that trainers have; their loops go over sequences."""
    return x.unflatten(0, (8, -1)) if x.shape[0] % 8 == 0 else x[None]


def restore(tensors: Named, call: Call, name: str) -> Callable[[], None]:
    """Put an input back that the provider overwrites."""

    def run() -> None:
        with torch.no_grad():
            tensors[name].copy_(call.tensors[name])

    return run


def pair(*names: str) -> Callable[[Any], Named]:
    """Names for the members of a result tuple."""
    return lambda out: dict(zip(names, out, strict=True))


def single(name: str) -> Callable[[Any], Named]:
    """A name for a result that is one tensor."""
    return lambda out: {name: out}
