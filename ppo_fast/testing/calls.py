"""One op call as data, and running it on a backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ppo_fast
from ppo_fast import Moments, RolloutStats, Stats, Teacher

_HEAD = ("hidden", "weight", "bias", "extra_u", "extra_b")
# What gradients flow to, and the outputs that they flow from.
DIFFERENTIABLE = {
    "token_logprobs": (("logits",), ("logprobs", "entropy")),
    "ppo_loss": (("logprobs", "entropy"), ("loss",)),
    "value_loss": (("values",), ("loss",)),
    "linear_token_logprobs": (_HEAD, ("logprobs", "entropy")),
    "linear_logprobs_at": (_HEAD, ("logprobs", "entropy")),
    "logits_ppo_loss": (("logits",), ("loss",)),
    "linear_ppo_loss": (_HEAD, ("loss",)),
    "divergence": (("logits",), ("loss",)),
    "linear_token_divergence": (_HEAD, ("divergence", "entropy")),
    "linear_divergence": (_HEAD, ("loss",)),
}


class Call(NamedTuple):
    """An op of the public API, its tensor arguments and options, and its outputs' gradients.

    `cotangents` is keyed by output; an output without one takes no part in the backward. A
    teacher's tensors are named teacher_hidden, teacher_weight and so on, and the option "teacher"
    holds its other arguments. Those of `extra` are named extra_u and extra_b.
    """

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    cotangents: dict[str, Tensor]

    def replace(self, **tensors: Tensor | None) -> Call:
        """The same call with some tensors replaced, or dropped where None."""
        merged = {**self.tensors, **tensors}
        return self._replace(tensors={k: v for k, v in merged.items() if v is not None})

    def option(self, **options: Any) -> Call:
        """The same call with other options."""
        return self._replace(options={**self.options, **options})


def promoted(call: Call, dtype: torch.dtype = torch.float64) -> Call:
    """The same call, already rounded, with every floating tensor in another precision.

    Masks keep their type: they are flags, whatever their dtype. Tensors become contiguous: left to
    torch, rows that overlap would lie across their last dimension.
    """
    rows = torch.contiguous_format

    def up(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            k: v.to(dtype, memory_format=rows) if v.is_floating_point() and k != "mask" else v
            for k, v in x.items()
        }

    return call._replace(tensors=up(call.tensors), cotangents=up(call.cotangents))


def output(result: Any) -> dict[str, Tensor]:
    """A result tuple as plain tensors by name."""
    if isinstance(result, Tensor):
        return {"out": result}
    named = result._asdict()
    sums = Stats | Moments | RolloutStats
    return {k: v.values if isinstance(v, sums) else v for k, v in named.items()}


def arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """A call's tensors and options as its op takes them: a teacher and `extra` made of theirs."""
    given = dict(given)
    if "extra_u" in given:
        given["extra"] = given.pop("extra_u"), given.pop("extra_b")
    own = {k: v for k, v in given.items() if k.startswith("teacher_")}
    if "teacher_hidden" not in own:
        return given
    named = {k.removeprefix("teacher_"): v for k, v in own.items()}
    teacher = Teacher(**named, **given["teacher"])
    return {k: v for k, v in given.items() if k not in own} | {"teacher": teacher}


def run(call: Call, backend: str | None) -> dict[str, Tensor]:
    """Outputs by name and, for differentiable ops, `grad_<input>` of each leaf."""
    leaves, outputs = DIFFERENTIABLE.get(call.op, ((), ()))
    tensors = dict(call.tensors)
    given = [name for name in leaves if name in tensors and call.cotangents]
    for name in given:
        tensors[name] = tensors[name].detach().requires_grad_()
    out = output(getattr(ppo_fast, call.op)(**arguments(tensors | call.options), backend=backend))
    if given:
        used = [name for name in outputs if name in call.cotangents]
        grads = torch.autograd.grad(
            [out[name] for name in used],
            [tensors[name] for name in given],
            [call.cotangents[name].to(out[name].dtype) for name in used],
        )
        out |= {f"grad_{name}": grad for name, grad in zip(given, grads, strict=True)}
    return {name: x.detach() for name, x in out.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal types, shapes and values; NaN equals NaN (its payload is nobody's promise)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    both_nan = (
        a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    )
    return bool(((a == b) | both_nan).all())
