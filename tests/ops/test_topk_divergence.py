"""topk_divergence: the formulas in Python floats, tails, bounds, ids without part, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spelled_out import log_softmax

import ppo_fast
from ppo_fast import testing
from ppo_fast.ops.topk_divergence import TAILS

K, V, ROWS, BETA = 5, 12, 6, 0.3
ZERO = -100.0  # ln of a teacher's probability of 0, as in NeMo-RL
KINDS = ("reverse", "forward", "jsd", "mixed")
Rows = list[list[float]]


def whole() -> tuple[Rows, Rows]:
    """Log-probabilities of both at all V ids."""
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, ROWS, V, generator=g, dtype=torch.float64)
    student, teacher = ([log_softmax(row) for row in one] for one in logits.tolist())
    return student, teacher


def drawn(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of both at the first K of V ids."""
    student, teacher = (torch.tensor(rows, dtype=dtype)[:, :K] for rows in whole())
    return student, teacher


def entropy_for(tail: str, dtype: torch.dtype = torch.float64) -> torch.Tensor | None:
    """The student's entropies over all V ids, for the tail that takes them."""
    if tail != "zero":
        return None
    rows = [-math.fsum(math.exp(a) * a for a in row) for row in whole()[0]]
    return torch.tensor(rows, dtype=dtype)


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def of_kind(s: list[float], t: list[float], kind: str) -> float:
    if kind == "reverse":
        return kl(s, t)
    if kind == "forward":
        return kl(t, s)
    if kind == "mixed":
        return BETA * kl(s, t) + (1 - BETA) * kl(t, s)
    m = [
        math.log((1 - BETA) * math.exp(a) + BETA * math.exp(b)) for a, b in zip(s, t, strict=True)
    ]
    return BETA * kl(t, m) + (1 - BETA) * kl(s, m)


def tailed(x: list[float], tail: str, of_teacher: bool = False) -> list[float]:
    mass = math.fsum(math.exp(a) for a in x)
    if tail == "bucket":
        return [*x, math.log(1 - mass)]
    divided = tail == "renormalise" or (tail == "zero" and of_teacher)
    return [a - math.log(mass) for a in x] if divided else x


def beyond(s: list[float], entropy: float, kind: str) -> float:
    """The terms of the student's other ids, where the teacher has none of its mass."""
    rest = 1 - math.fsum(math.exp(a) for a in s)
    if kind == "jsd":
        return (1 - BETA) * rest * math.log(1 / (1 - BETA))
    reverse = -entropy - math.fsum(math.exp(a) * a for a in s) - ZERO * rest
    return {"forward": 0.0, "reverse": reverse, "mixed": BETA * reverse}[kind]


def spelled_out(
    student: torch.Tensor,
    teacher: torch.Tensor,
    entropy: torch.Tensor | None,
    kind: str,
    tail: str,
    floor: float,
    high: float,
) -> torch.Tensor:
    out = []
    for i, (own, other) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        s, t = ([max(a, floor) for a in tailed(x, tail, x is other)] for x in (own, other))
        value = of_kind(s, t, kind)
        if entropy is not None:
            value += beyond(own, float(entropy[i]), kind)
        out.append(min(max(value, 0.0 if tail == "drop" else -high), high))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_formula_spelled_out(kind: str, tail: str, dtype: torch.dtype) -> None:
    """With and without a floor and a bound, each of which moves some rows."""
    student, teacher = (x.to(dtype) for x in drawn())
    entropy = entropy_for(tail, torch.promote_types(dtype, torch.float32))
    for floor, high in ((None, None), (-3.0, 0.4)):
        out = ppo_fast.topk_divergence(
            student,
            teacher,
            kind=kind,
            beta=BETA,
            tail=tail,
            entropy=entropy,
            floor=floor,
            max=high,
        )
        exact = spelled_out(
            student.double(),
            teacher.double(),
            entropy,
            kind,
            tail,
            floor or -math.inf,
            high or math.inf,
        )
        # Terms of a probability times logarithms of at most 20, and the tail's: a bucket's
        # logarithm has a condition of mass / (1 - mass), here below 100, a zero counts 100 nats.
        condition = 20.0 * (100.0 if tail == "bucket" else 1.0) + (-ZERO if tail == "zero" else 0)
        testing.assert_within_budget(out.divergence, exact, condition=condition, ops=8)
        assert out.divergence.dtype == (dtype if dtype == torch.float64 else torch.float32)
        for mass, x in ((out.student_mass, student), (out.teacher_mass, teacher)):
            want = x.double().exp().sum(-1)
            testing.assert_within_budget(mass, want, condition=want, ops=8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
def test_gradients(kind: str, tail: str) -> None:
    """Of the student's alone, some ids without part."""
    student, teacher = drawn()
    teacher.requires_grad_()
    mask = torch.rand(ROWS, K, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[0] = False
    entropy = entropy_for(tail)
    given = [student] if entropy is None else [student, entropy]
    high = 5.0 if tail != "zero" else 70.0  # holds some rows, not all

    def f(x: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
        return ppo_fast.topk_divergence(
            x, teacher, mask, kind=kind, beta=BETA, tail=tail, entropy=own, floor=-6.0, max=high
        ).divergence

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in given])
    out = f(*given)
    assert out[0] == 0
    grad_student, grad_teacher = torch.autograd.grad(
        out.sum(), (student, teacher), allow_unused=True
    )
    assert grad_teacher is None and not bool(grad_student[~mask].any())


@pytest.mark.parametrize("tail", TAILS)
def test_ids_without_part_may_hold_anything(tail: str) -> None:
    student, teacher = drawn()
    mask = torch.tensor([1, 1, 0, 1, 0]).expand(ROWS, K)
    kept = mask[0].bool()
    options = {"kind": "mixed", "tail": tail, "entropy": entropy_for(tail)}
    want = ppo_fast.topk_divergence(student[:, kept], teacher[:, kept], **options)
    for value in (0.0, math.nan, math.inf, -math.inf):
        x, y = (torch.where(mask != 0, z, value).requires_grad_() for z in (student, teacher))
        out = ppo_fast.topk_divergence(x, y, mask.float(), **options)
        torch.testing.assert_close(out.divergence, want.divergence, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(out.teacher_mass, want.teacher_mass)
        out.divergence.sum().backward()
        assert bool(x.grad.isfinite().all())


def test_without_ids_nothing_is_read() -> None:
    """Nor is the entropy of such a token, whose gradient is 0."""
    student, teacher = (x.fill_(math.nan).requires_grad_() for x in drawn())
    entropy = torch.full((ROWS,), math.nan, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(ROWS, 1)
    out = ppo_fast.topk_divergence(
        student, teacher, none, kind="reverse", tail="zero", entropy=entropy
    )
    out.divergence.sum().backward()
    for x in (*out, student.grad, entropy.grad):
        assert not bool(x.any())


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_zero_outside_is_a_whole_distribution(kind: str) -> None:
    """Tail "zero" over all V ids, in each of which the student has its own probability."""
    student, teacher = drawn()
    out = ppo_fast.topk_divergence(
        student, teacher, kind=kind, beta=BETA, tail="zero", entropy=entropy_for("zero")
    ).divergence
    exact = []
    for s, t in zip(*whole(), strict=True):
        t = [*tailed(t[:K], "zero", of_teacher=True), *[ZERO] * (V - K)]
        # A jsd and a forward KL have no ln 0: 4e-44 of each such id is below their rounding.
        exact.append(of_kind(s, t, kind))
    condition = 20.0 - ZERO
    testing.assert_within_budget(
        out, torch.tensor(exact, dtype=torch.float64), condition=condition, ops=V
    )


def test_the_first_k_of_a_head() -> None:
    """`linear_logprobs_at` of both heads, absent ids left out by a mask."""
    g = torch.Generator().manual_seed(0)
    hidden, wide = torch.randn(4, 8, generator=g), torch.randn(4, 16, generator=g)
    weight, of_teacher = torch.randn(V, 8, generator=g), torch.randn(V, 16, generator=g)
    ids = torch.tensor([[0, 3, -1], [5, 1, 2], [7, -1, -1], [11, 10, 9]])
    student = ppo_fast.linear_logprobs_at(hidden.requires_grad_(), weight, ids).logprobs
    teacher = ppo_fast.linear_logprobs_at(wide, of_teacher, ids).logprobs
    out = ppo_fast.topk_divergence(student, teacher, ids >= 0, kind="forward", tail="bucket")
    out.divergence.sum().backward()
    s, t = ((x @ w.t()).detach().double() for x, w in ((hidden, weight), (wide, of_teacher)))
    for i, row in enumerate(ids.tolist()):
        kept = [k for k in row if k >= 0]
        a, b = ([log_softmax(z[i].tolist())[k] for k in kept] for z in (s, t))
        want = of_kind(tailed(a, "bucket"), tailed(b, "bucket"), "forward")
        assert math.isclose(out.divergence[i].item(), want, rel_tol=1e-4, abs_tol=1e-5)


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: call(kind="l2"), ValueError, "kind must be one of reverse, forward, jsd, mixed"),
    (lambda: call(tail="none"), ValueError, "tail must be one of drop, bucket, renormalise, zero"),
    (
        lambda: call(tail="zero"),
        ValueError,
        "entropy must be given with tail 'zero' and kind 'reverse'",
    ),
    (
        lambda: call(entropy=torch.ones(ROWS)),
        ValueError,
        "entropy must be None with tail 'drop', got Tensor",
    ),
    (
        lambda: call(tail="zero", entropy=torch.ones(ROWS, 1)),
        ValueError,
        r"entropy must have shape \(...\) = \(6,\), got \(6, 1\)",
    ),
    (
        lambda: call(tail="zero", entropy=torch.ones(ROWS).double()),
        TypeError,
        "entropy must not mix float64 with other types",
    ),
    (lambda: call(kind="jsd", beta=0.0), ValueError, r"beta must be in \(0, 1\) with kind 'jsd'"),
    (lambda: call(kind="mixed", beta=1.5), ValueError, r"beta must be in \[0, 1\], got 1.5"),
    (lambda: call(floor=1.0), ValueError, r"floor must be in \[-inf, 0\], got 1.0"),
    (lambda: call(max=-1.0), ValueError, r"max must be in \[0, inf\], got -1.0"),
    (lambda: call(mask=torch.ones(ROWS)), ValueError, r"mask must have shape .* got \(6,\)"),
    (lambda: call(teacher=torch.zeros(ROWS, 2)), ValueError, "teacher_logprobs must have shape"),
    (lambda: call(student=torch.zeros(ROWS, 0)), ValueError, r"\(..., K\) with K >= 1"),
    (lambda: call(student=[0.0]), TypeError, "logprobs must be a tensor, got list"),
]


def call(student: Any = None, teacher: Any = None, mask: Any = None, **options: Any) -> Any:
    s, t = drawn(torch.float32)
    s, t = s if student is None else student, t if teacher is None else teacher
    return ppo_fast.topk_divergence(s, t, mask, **{"kind": "reverse", **options})


@pytest.mark.parametrize("bad, error, message", BAD, ids=[m for *_, m in BAD])
def test_bad_input(bad: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bad()
