"""Divergences from a teacher: the formulas spelled out, budgets, masks, rows, infinities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import usable
from head_helpers import products, shape_for, short_chunks

import ppo_fast
from ppo_fast import testing
from ppo_fast._boundary.schema import REDUCTIONS
from ppo_fast.teacher import KINDS
from ppo_fast.testing import (
    DIVERGENCES,
    divergence_call,
    linear_divergence_call,
    run,
    same_bits,
    token_divergence_call,
)

DOUBLE, INF = torch.float64, math.inf
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpu", "triton")
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"extras": (), "mask": None, "temperature": 1.0, "teacher": {"extras": ()}},
    "every option": {
        "extras": ("bias", "row_index"),
        "softcap": 4.0,
        "mask": "row",
        "teacher": {"softcap": 3.0, "logit_scale": 1.5, "temperature": "token"},
    },
    "scaled": {"teacher": {"logit_scale": 0.5, "temperature": 0.8}},
    "scaled, per token": {"teacher": {"logit_scale": 1.7}},
    "odd vocabulary": {"vocab": 1009, "temperature": 0.7},
    "one of each": {"vocab": 1, "width": 1, "teacher": {"width": 1}},
    "wider teacher": {"width": 8, "teacher": {"width": 130}},
    "nothing kept": {"mask": "empty"},
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Those that have the op."""
    return usable(request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_within_budget(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], kind: str
) -> None:
    short_chunks(monkeypatch, backend)
    call = token_divergence_call(shape_for(backend, device), device=device, kind=kind, **options)
    testing.assert_agrees(call, backend)


@pytest.mark.parametrize("dtype", (*FLOATS, DOUBLE), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", DIVERGENCES)
def test_precisions(
    backend: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    kind: str,
    dtype: torch.dtype,
) -> None:
    """Results fp32 (fp64 for fp64), gradients in the inputs' type, each within its budget."""
    short_chunks(monkeypatch, backend)
    call = DIVERGENCES[op](shape_for(backend, device), dtype=dtype, device=device, kind=kind)
    if dtype == DOUBLE and backend == "triton":
        with pytest.raises(TypeError, match="float64"):
            run(call, backend)
        return
    testing.assert_agrees(call, backend)
    out = run(call, backend)
    assert out["divergence"].dtype == out["entropy"].dtype == max(dtype, torch.float32, key=_wide)
    assert all(x.dtype == dtype for name, x in out.items() if name.startswith("grad"))


def _wide(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


@pytest.mark.parametrize("op", ["divergence", "linear_divergence"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, op: str, reduction: str
) -> None:
    """Padded and packed, with the reduction's own D and with the caller's."""
    short_chunks(monkeypatch, backend)
    shape = (3, 2) if backend == "triton" else (4, 9)
    options = {"mask": "row", "device": device, "reduction": reduction}
    testing.assert_agrees(DIVERGENCES[op](shape, **options), backend)
    call = DIVERGENCES[op](shape, kind="jsd", denom=7.5, **options)
    testing.assert_agrees(call, backend)
    if op == "linear_divergence":
        kept = {"denom": 3.0} if reduction == "seq-mean-token-sum-norm" else {}
        flat = (9,) if backend == "triton" else (45,)
        call = linear_divergence_call(flat, packed=True, **options | {"mask": "random"} | kept)
        testing.assert_agrees(call.option(row_index=None), backend)


def _spelled(student: list[float], teacher: list[float], kind: str, beta: float) -> float:
    """The divergence of two rows of logits in Python's floats."""

    def softmax(z: list[float]) -> list[float]:
        top = max(z)
        e = [math.exp(x - top) for x in z]
        return [x / math.fsum(e) for x in e]

    def kl(a: list[float], b: list[float]) -> float:
        return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    s, t = softmax(student), softmax(teacher)
    if kind == "reverse":
        return kl(s, t)
    if kind == "forward":
        return kl(t, s)
    if kind == "mixed":
        return beta * kl(s, t) + (1 - beta) * kl(t, s)
    m = [(1 - beta) * x + beta * y for x, y in zip(s, t, strict=True)]
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


@pytest.mark.parametrize("beta", [0.2, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formulas(kind: str, beta: float) -> None:
    """Of Python's floats, and gradients by central differences of them, in fp64."""
    name = usable("cpu")
    call = divergence_call(
        (1, 2), 7, dtype=DOUBLE, kind=kind, beta=beta, mask=None, temperature=0.8
    ).option(teacher_temperature=1.25)
    out = run(call, name)
    rows = [call.tensors[k][0] for k in ("logits", "teacher_logits")]
    given, other = (rows[0] / 0.8).tolist(), (rows[1] / 1.25).tolist()
    for r in range(2):
        want = _spelled(given[r], other[r], kind, beta)
        assert abs(float(out["divergence"][0, r]) - want) < 1e-14 * (1 + abs(want))
        for j in range(7):
            h, ends = 1e-5, []
            for step in (h, -h):
                moved = list(given[r])
                moved[j] += step
                ends.append(_spelled(moved, other[r], kind, beta))
            slope = (ends[0] - ends[1]) / (2 * h) / 0.8 * float(call.cotangents["loss"]) / 2
            # A third derivative of order 1 times h², and rounding over h.
            assert abs(float(out["grad_logits"][0, r, j]) - slope) < 1e-9
    assert float(out["loss"]) == pytest.approx(float(out["divergence"].mean()), rel=1e-15)


@pytest.mark.case("N14")
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By finite differences in fp64: both results of a token, and the losses."""
    name = usable("cpu")
    short_chunks(monkeypatch, "triton")
    options = {"dtype": DOUBLE, "kind": kind, "softcap": 3.0, "teacher": {"logit_scale": 1.5}}
    for make, outputs in (
        (token_divergence_call, ("divergence", "entropy")),
        (linear_divergence_call, ("loss",)),
    ):
        call = make((2, 3), 5, 3, mask=None, **options)
        leaves = [call.tensors[k].requires_grad_() for k in ("hidden", "weight", "bias")]
        keep = call._replace(cotangents={})

        def function(*given: torch.Tensor, keep: Any = keep, outputs: Any = outputs) -> Any:
            named = dict(zip(("hidden", "weight", "bias"), given, strict=True))
            out = _call(keep.replace(**named), name)
            return tuple(getattr(out, x) for x in outputs)

        assert torch.autograd.gradcheck(function, leaves)


def _call(call: testing.Call, backend: str) -> Any:
    """The op's own result, with its graph."""
    given = testing.arguments(call.tensors | call.options)
    return getattr(ppo_fast, call.op)(**given, backend=backend)


@pytest.mark.parametrize("op", DIVERGENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_garbage_in_masked_rows_reaches_nothing(
    backend: str, device: str, op: str, kind: str
) -> None:
    """NaN and infinities in the hidden states and logits of either: the same bits, exact zeros."""
    for mask in ("random", "empty"):
        call = DIVERGENCES[op]((4, 2), mask=mask, device=device, kind=kind)
        clean = run(testing.with_garbage(call, 0.0), backend)
        for value in (math.nan, INF):
            dirty = run(testing.with_garbage(call, value), backend)
            assert all(same_bits(dirty[k], clean[k]) for k in clean), (mask, value)
        drop = ~call.tensors["mask"]
        for name in ("divergence", "entropy", "grad_hidden", "grad_logits"):
            assert name not in dirty or not bool(dirty[name][drop].any()), name


def test_rows_left_out_are_not_read(backend: str, device: str) -> None:
    call = token_divergence_call((2, 5), mask=None, device=device, extras=("row_index",))
    unread = torch.ones(10, dtype=torch.bool, device=device)
    unread = unread.index_fill(0, call.tensors["row_index"], False).view(2, 5, 1)
    want = run(call, backend)
    dirty = {
        k: call.tensors[k].masked_fill(unread, math.nan) for k in ("hidden", "teacher_hidden")
    }
    got = run(call.replace(**dirty), backend)
    assert all(same_bits(got[k], want[k]) for k in want)


@pytest.mark.case("D2")
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("vocab, width", [(37, 24), (331, 130)])
@pytest.mark.parametrize("op", DIVERGENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_keeps_its_bits(
    op: str, kind: str, vocab: int, width: int, dtype: torch.dtype
) -> None:
    """Whatever rows stand beside it, and whatever tile it falls in."""
    wide = {} if op == "divergence" else {"width": width}
    given = {} if op == "linear_token_divergence" else {"reduction": "token-sum"}
    call = DIVERGENCES[op]((9, 7), vocab, mask="right", dtype=dtype, kind=kind, **wide, **given)
    whole, order = run(call, "cpu"), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    fixed = {k: x for k, x in call.tensors.items() if "weight" in k or "bias" in k}
    rest = call._replace(tensors={k: x for k, x in call.tensors.items() if k not in fixed})
    for rows in (order, torch.cat([order, order]), order[:4], order[2:3]):
        got = run(testing.with_rows(rest, rows).replace(**fixed), "cpu")
        for name in ("divergence", "entropy", "grad_logits", "grad_hidden"):
            assert name not in whole or same_bits(got[name], whole[name][rows]), (rows, name)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("op", DIVERGENCES)
def test_layouts(backend: str, layout: str, op: str) -> None:
    view, dense = testing.with_layout(DIVERGENCES[op]((2, 3)), layout)
    got, want = run(view, backend), run(dense, backend)
    assert all(same_bits(got[k], want[k]) for k in want)


@pytest.mark.parametrize("kind", KINDS)
def test_no_logit_has_no_probability(backend: str, device: str, kind: str) -> None:
    """−∞ on both sides is as if the column were not there; its own gradient is 0."""
    call = divergence_call((2, 2), 9, kind=kind, mask=None, device=device)
    barred = {k: call.tensors[k].clone() for k in ("logits", "teacher_logits")}
    for x in barred.values():
        x[..., 4:] = -INF
    narrow = {k: x[..., :4].contiguous() for k, x in barred.items()}
    got, want = run(call.replace(**barred), backend), run(call.replace(**narrow), backend)
    assert not bool(got["grad_logits"][..., 4:].any())
    torch.testing.assert_close(got["divergence"], want["divergence"], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(
        got["grad_logits"][..., :4], want["grad_logits"], rtol=2e-6, atol=1e-6
    )


def test_a_probability_beside_none(backend: str, device: str) -> None:
    """KL is infinite; jsd is not: at most ln 2."""
    call = divergence_call((1, 2), 5, mask=None, device=device, temperature=1.0)
    x, y = call.tensors["logits"].clone(), call.tensors["teacher_logits"].clone()
    x[0, 0, 1], y[0, 1, 2] = -INF, -INF
    call = call.replace(logits=x, teacher_logits=y)
    for kind, infinite in {"forward": [True, False], "reverse": [False, True]}.items():
        values = run(call.option(kind=kind), backend)["divergence"][0]
        assert values.isinf().tolist() == infinite and bool((values > 0).all()), kind
    out = run(call.option(kind="jsd"), backend)
    assert bool((out["divergence"] <= math.log(2)).all()) and out["grad_logits"].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_distribution_from_itself(backend: str, device: str, kind: str) -> None:
    """0, and no gradient, to the rounding of the logits; never below 0."""
    call = divergence_call((2, 3), 331, kind=kind, mask=None, device=device, temperature=1.0)
    call = call.replace(teacher_logits=call.tensors["logits"].clone())
    out = run(call, backend)
    # ln p and ln q are the same numbers; a mixture rounds, and so does autograd's softmax.
    exact = kind != "jsd" and backend != "reference"
    bound = 0.0 if exact else 8 * torch.finfo(torch.float32).eps
    assert bool((out["divergence"] >= 0).all())
    assert float(out["divergence"].max()) <= bound
    assert float(out["grad_logits"].abs().max()) <= bound


def test_the_ends_of_mixed_are_one_kl(backend: str, device: str) -> None:
    """β of 0 and 1 is forward and reverse, to the bit: 0 times an infinite KL is no NaN."""
    call = divergence_call((2, 2), kind="mixed", device=device)
    for beta, kind in ((0.0, "forward"), (1, "reverse")):
        got, want = (run(c, backend) for c in (call.option(beta=beta), call.option(kind=kind)))
        assert all(same_bits(got[k], want[k]) for k in want)


def test_the_loss_is_that_of_the_tokens(backend: str, device: str) -> None:
    """`linear_divergence` is coef·mean of `linear_token_divergence`, gradients too."""
    shape = shape_for(backend, device)
    token = token_divergence_call(shape, device=device, kind="jsd", dtype=torch.float32)
    loss = linear_divergence_call(shape, device=device, kind="jsd", teacher={"coef": 0.25})
    got = run(loss, backend)
    keep = token.tensors["mask"]
    each = keep * 1.25 * 0.25 / keep.sum()
    want = run(token._replace(cotangents={"divergence": each.float()}), backend)
    assert same_bits(got["divergence"], want["divergence"])
    mean = want["divergence"][keep].double().mean() * 0.25
    assert abs(float(got["loss"]) - float(mean)) < 1e-6 * float(mean)
    eps = torch.finfo(torch.float32).eps
    for name in ("grad_hidden", "grad_weight", "grad_bias"):
        top = float(want[name].abs().max())
        assert float((got[name] - want[name]).abs().max()) < 16 * eps * top, name


def test_a_coefficient_on_the_device(backend: str, device: str) -> None:
    call = linear_divergence_call((2, 2), device=device, teacher={"coef": 0.25})
    tensor = call.option(teacher=call.options["teacher"] | {"coef": torch.tensor(0.25)})
    got, want = run(tensor, backend), run(call, backend)
    assert all(same_bits(got[k], want[k]) for k in want)


@pytest.mark.parametrize("make", [token_divergence_call, linear_divergence_call])
def test_gradients_asked_for(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen weight costs no product; without any gradient there are two products in all."""
    name = usable("cpu")
    call = make((6, 11), mask=None, extras=())
    rows = products(monkeypatch)
    run(call._replace(cotangents={}), name)
    assert rows == {"logits_into": 2 * 80}  # 66 rows of both heads, padded to a tile of 16
    rows.clear()
    hidden = call.tensors["hidden"].clone().requires_grad_()
    out = _call(call.replace(hidden=hidden), name)
    out[0].sum().backward()
    twice = 2 if make is token_divergence_call else 1
    assert rows["logits_into"] == 2 * 80 * twice and "add_weight_gradient" not in rows
    assert hidden.grad is not None and bool(hidden.grad.any())


def test_a_teacher_is_a_constant(backend: str, device: str) -> None:
    """No gradient reaches its tensors."""
    call = linear_divergence_call((2, 2), device=device)
    leaves = {
        k: x.clone().requires_grad_() for k, x in call.tensors.items() if x.is_floating_point()
    }
    _call(call.replace(**leaves), backend).loss.backward()
    for name, x in leaves.items():
        assert (x.grad is None) == name.startswith("teacher_") or "temperature" in name, name


def test_an_old_teacher_raises() -> None:
    """A teacher's hidden states that were written over before the backward raise there."""
    call = token_divergence_call((2, 3), mask=None)
    hidden = call.tensors["hidden"].clone().requires_grad_()
    out = _call(call.replace(hidden=hidden), usable("cpu"))
    call.tensors["teacher_hidden"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.divergence.sum().backward()


@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 2, 2), (0,), (2, 0)], ids=str)
def test_any_leading_shape(backend: str, device: str, shape: tuple[int, ...]) -> None:
    call = token_divergence_call(shape, 19, device=device, mask=None)
    testing.assert_agrees(call, backend)
    assert run(call, backend)["divergence"].shape == shape


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [0.8, "token", None])
def test_a_teacher_s_own_logits(backend: str, softcap: float | None, temperature: Any) -> None:
    """cap(logit_scale·(hidden·weightᵀ + bias)) over its own temperature, formed here."""
    own: dict[str, Any] = {"logit_scale": 1.7, "temperature": temperature, "softcap": softcap}
    call = token_divergence_call((2, 3), mask=None, kind="jsd", teacher=own)
    t = call.tensors
    z = t["hidden"] @ t["weight"].t() + t["bias"]
    y = 1.7 * (t["teacher_hidden"] @ t["teacher_weight"].t() + t["teacher_bias"])
    y = y if softcap is None else softcap * torch.tanh(y / softcap)
    other = t.get("teacher_temperature", t["temperature"] if temperature is None else temperature)
    want = ppo_fast.divergence(
        z,
        y,
        kind="jsd",
        temperature=t["temperature"],
        teacher_temperature=other,
        backend="reference",
    ).divergence
    got = run(call, backend)["divergence"]
    # Logits of two products that round in their own order; a divergence is at most ln 2.
    assert float((got - want).abs().max()) < 1e-5
