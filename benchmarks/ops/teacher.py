"""A second head: the teachers of the cases of two distributions, and their kind of divergence.

A case's shape says the kind with the last word of its name: `smollm2-head-2k-jsd`. A teacher is
the student some steps away, as where one is distilled from the other: neither its hidden states
nor its head are the student's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.case import BOTH, DTYPES, Case, Shape
from benchmarks.ops.inputs import head_tensors
from benchmarks.ops.op import Cost
from ppo_fast.testing import Call

REVERSE, TO_STUDENT, JSD = KINDS = ("reverse", "forward", "jsd")
BETA = 0.5
COEF = 0.5  # of the divergence in a policy's loss
_OPS = ("divergence", "linear_divergence", "linear_token_divergence")
_TAUGHT = "taught"
# Standard deviation of what a teacher's numbers differ by, in that of the numbers: logits of
# deviation 3 then differ by about 1.3, and a divergence is about a nat.
_APART = 0.3


def of_kind(base: Shape, kind: str) -> Shape:
    """A shape of two distributions and a kind of divergence."""
    return Shape(f"{base.name}-{kind}", base.dims)


def taught(base: Shape) -> Shape:
    """A shape of a policy's loss with a teacher."""
    return Shape(f"{base.name}-{_TAUGHT}", base.dims)


def kind_of(case: Case) -> str | None:
    """Kind of a case's divergence, scaled to the machine or not; None for one without a teacher.

    A shape that names none, of one's own, has the reverse divergence.
    """
    last = case.shape.name.partition("/")[0].rpartition("-")[2]
    if case.op in _OPS:
        return last if last in KINDS else REVERSE
    return REVERSE if case.op == "linear_ppo_loss" and last == _TAUGHT else None


def options_of(call: Call) -> dict[str, Any]:
    """Kind, β and, in a loss of heads, coefficient of a call's divergence."""
    named: dict[str, Any] = call.options.get("teacher", call.options)
    return {k: named[k] for k in ("kind", "beta", "coef") if k in named}


def beta_of(call: Call) -> float:
    """A call's divergence in the numbers of TRL and Liger: 0 forward, 1 reverse, else β of jsd."""
    own = options_of(call)
    return float({REVERSE: 1.0, TO_STUDENT: 0.0, JSD: own["beta"]}[own["kind"]])


def beside(x: Tensor) -> Tensor:
    """A teacher's numbers for a student's, in their precision; drawn where they are."""
    noise = torch.randn(x.shape, device=x.device) * (_APART * x.float().std())
    return (x.float() + noise).to(x.dtype)


def with_teacher(call: Call, kind: str, coef: float = 1.0) -> Call:
    """The call of a student's head with a teacher's beside it."""
    others = {f"teacher_{name}": beside(call.tensors[name]) for name in ("hidden", "weight")}
    return call.replace(**others).option(teacher={"kind": kind, "beta": BETA, "coef": coef})


def inputs(case: Case) -> Call:
    """Divergences of every row, or their mean, from logits or from two heads."""
    tensors = {name: x for name, x in head_tensors(case).items() if name != "tokens"}
    rows, device, kind = case.shape.dims[0], case.device, kind_of(case) or REVERSE
    tensors["mask"] = torch.ones(rows, dtype=torch.bool, device=device)
    if case.op == "linear_token_divergence":
        cotangents = {"divergence": torch.randn(rows, device=device)}
        return with_teacher(Call(case.op, tensors, {}, cotangents), kind)
    call = Call(case.op, tensors, {"reduction": "token-mean"}, {})
    call = call._replace(cotangents={"loss": torch.ones((), device=device)})
    if case.op == "linear_divergence":
        return with_teacher(call, kind)
    call = call.replace(teacher_logits=beside(tensors["logits"]))
    return call.option(kind=kind, beta=BETA)


def cost(case: Case) -> Cost:
    """Both heads or logits once, and the results; both products, two softmaxes and the divergence.

    Backward: the student's gradients, of a head two more products, and both heads' again where
    the gradient of every row's divergence is not known before.
    """
    rows, vocab, *width = case.shape.dims
    n, wide, both = rows * vocab, DTYPES[case.dtype].itemsize, case.direction == BOTH
    operations = (26 if both else 16) * n
    if not width:
        return Cost((3 if both else 2) * n * wide + rows * 16, operations)
    head = (rows + vocab) * width[0] * wide
    again = 2 if case.op == "linear_token_divergence" else 0
    products = (4 + again if both else 2) * 2 * n * width[0]
    return Cost((3 if both else 2) * head + rows * 16, products + operations)


def gradient_mb(case: Case) -> float:
    """The gradients by the student's logits, or by its hidden states and weight."""
    if not case.differentiates:
        return 0.0
    rows, vocab, *width = case.shape.dims
    numbers = (rows + vocab) * width[0] if width else rows * vocab
    return numbers * DTYPES[case.dtype].itemsize / 2**20
