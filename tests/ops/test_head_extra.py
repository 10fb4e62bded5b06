# ruff: noqa: E501  (one bad input a line)
"""`extra=(u, b)` of the linear ops: an adapter of low rank on the head, never a dense one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_rows import SHAPE, TYPE, Row, assert_refused
from head_helpers import Allocations, products, shape_for, short_chunks

import ppo_fast
from ppo_fast import testing
from ppo_fast.testing import Call, run, same_bits

EXTRAS = ("bias", "extra")
ALL = (*EXTRAS, "row_index")
OPS: dict[str, Callable[..., Call]] = {
    op: make
    for op, make in (testing.HEADS | testing.DIVERGENCES).items()
    if op.startswith("linear")
}
TEACHER = {"kind": "jsd", "coef": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "logprobs": ("linear_token_logprobs", {"extras": ("extra",), "mask": None}),
    "logprobs, every option": ("linear_token_logprobs", {"extras": ALL, "softcap": 4.0}),
    "at ids": ("linear_logprobs_at", {"extras": ALL, "softcap": 4.0}),
    "loss": ("linear_ppo_loss", {"head_extras": ("extra",), "mask": None}),
    "loss, every option": ("linear_ppo_loss", {"head_extras": ALL, "softcap": 4.0}),
    "gspo": ("linear_ppo_loss", {"head_extras": EXTRAS, "variant": "gspo"}),
    "loss with a teacher and a z-loss": (
        "linear_ppo_loss",
        {"head_extras": EXTRAS, "teacher": TEACHER, "z_loss_coef": 0.25},
    ),
    "divergence of tokens": ("linear_token_divergence", {"extras": ALL, "kind": "reverse"}),
    "divergence": ("linear_divergence", {"extras": EXTRAS, "kind": "forward", "softcap": 4.0}),
    "sparse support": ("linear_token_logprobs", {"extras": ALL, "kept": 9, "sparse": True}),
    "dense support": ("linear_token_logprobs", {"extras": ALL, "kept": 9, "sparse": False}),
    "loss over a sparse support": (
        "linear_ppo_loss",
        {"head_extras": EXTRAS, "kept": 9, "sparse": True, "softcap": 4.0},
    ),
}


def call_of(name: str, shape: tuple[int, ...], **options: Any) -> Call:
    op, own = CASES[name]
    return OPS[op](shape, **own, **options)


def needs(name: str, backend: str) -> None:
    """Skip what CUDA C++ does not have."""
    if backend == "cuda" and ("support" in name or "teacher" in name or "divergence" in name):
        pytest.skip("supports and teachers are not on 'cuda'")


@pytest.mark.parametrize("name", CASES)
def test_within_budget(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    needs(name, backend)
    short_chunks(monkeypatch, backend)
    call = call_of(name, shape_for(backend, device), device=device)
    testing.assert_agrees(call, backend)
    out = run(call, backend)
    assert bool(out["grad_extra_u"].any()) and bool(out["grad_extra_b"].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_precisions(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    short_chunks(monkeypatch)
    call = call_of(name, (5, 12), dtype=dtype)
    if "support" in name:  # every row keeps some: those of the whole vocabulary are a second call
        g = torch.Generator().manual_seed(4)
        ids = torch.stack([torch.randperm(37, generator=g)[:9] for _ in range(60)])
        call = call.option(support=ppo_fast.Support(ids, sparse="sparse" in name))
    testing.assert_agrees(call, "cpu")
    out = run(call, "cpu")
    assert out["grad_extra_u"].dtype == out["grad_extra_b"].dtype == dtype


@pytest.mark.parametrize("name", ["logprobs", "loss", "divergence", "sparse support"])
def test_half_precision_on_kernels(kernel: str, device: str, name: str) -> None:
    """Kernels that round the logits' gradient themselves are among them."""
    needs(name, kernel)
    testing.assert_agrees(call_of(name, (2, 3), device=device, dtype=torch.bfloat16), kernel)


def of_integers(op: str, backend: str) -> tuple[Call, torch.Tensor, float]:
    """A call whose logits are exact integers, an A (r, H) with u = s·hidden·Aᵀ, and s."""
    extra = {"linear_ppo_loss": "head_extras"}.get(op, "extras")
    dtype = torch.float32 if backend in ("triton", "cuda") else torch.float64
    options: dict[str, Any] = {extra: ("extra",), "mask": None, "dtype": dtype, "temperature": 1.0}
    call = OPS[op]((2, 3), 37, 8, **options)
    g = torch.Generator().manual_seed(3)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=g).to(dtype)

    a, scale = whole(3, 8), 0.5
    hidden, weight, b = whole(2, 3, 8), whole(37, 8), whole(37, 3)
    call = call.replace(hidden=hidden, weight=weight, extra_u=scale * hidden @ a.t(), extra_b=b)
    return call, a, scale


@pytest.mark.parametrize("op", OPS)
def test_equal_to_the_dense_sum(backend: str, device: str, op: str) -> None:
    """W + s·B·A: of logits that are exact both ways the results have the same bits, and the
    gradients of A, B and the hidden states are the dense ones."""
    if "divergence" in op:
        needs("divergence", backend)
    call, a, scale = of_integers(op, backend)
    t = {k: v.to(device) for k, v in call.tensors.items()}
    a = a.to(device)
    results = []
    for dense in (True, False):
        leaves = [t["hidden"], a, t["extra_b"]]
        hidden, low, b = leaves = [x.clone().requires_grad_() for x in leaves]
        rest = {k: v for k, v in t.items() if k not in ("hidden", "extra_u", "extra_b")}
        if dense:
            given = rest | {"hidden": hidden, "weight": t["weight"] + scale * b @ low}
        else:
            given = rest | {"hidden": hidden, "extra_u": scale * hidden @ low.t(), "extra_b": b}
        arguments = testing.arguments(given | call.options)
        out = testing.output(getattr(ppo_fast, op)(**arguments, backend=backend))
        names = list(call.cotangents)
        total = sum((out[k] * call.cotangents[k].to(device)).sum() for k in names)
        grads = torch.autograd.grad(total, leaves)
        results.append(({k: v.detach() for k, v in out.items()}, grads))
    (want, dense_grads), (got, grads) = results
    for k, x in want.items():
        assert same_bits(got[k], x), k
    for x, y in zip(grads, dense_grads, strict=True):
        assert bool(y.any())
        torch.testing.assert_close(x, y)


@pytest.mark.case("X2")
@pytest.mark.parametrize("name", CASES)
def test_garbage_in_masked_rows(backend: str, device: str, name: str) -> None:
    """NaN in u where the mask or row_index drops a row reaches no output and no gradient."""
    needs(name, backend)
    op, own = CASES[name]
    call = OPS[op]((2, 4), device=device, **(own | {"mask": "random"}))
    clean = run(testing.with_garbage(call, 0.0), backend)
    dirty = run(testing.with_garbage(call, math.nan), backend)
    assert all(same_bits(dirty[k], x) for k, x in clean.items())
    assert not bool(dirty["grad_extra_u"][~call.tensors["mask"].bool()].any())


def some_rows(call: Call, rows: torch.Tensor) -> Call:
    """Some sequences of a head's call; the weights stay whole."""
    fixed = ("weight", "bias", "extra_b", "teacher_weight", "teacher_bias")
    rest = {k: v for k, v in call.tensors.items() if k not in fixed}
    whole = {k: v for k, v in call.tensors.items() if k in fixed}
    return testing.with_rows(call._replace(tensors=rest), rows).replace(**whole)


@pytest.mark.case("D2")
@pytest.mark.parametrize("vocab", [37, 1009])
@pytest.mark.parametrize("op", OPS)
def test_a_row_keeps_its_bits(op: str, vocab: int) -> None:
    """Whatever rows stand beside it, one to twenty of them."""
    extra = "head_extras" if op == "linear_ppo_loss" else "extras"
    options = {"reduction": "token-sum"} if op.endswith(("loss", "r_divergence")) else {}
    call = OPS[op]((40, 1), vocab, 24, mask=None, **{extra: ("extra",)}, **options)
    whole = run(call, "cpu")
    per_row = ("logprobs", "entropy", "divergence", "grad_hidden", "grad_extra_u")
    for count in (*range(1, 20), 33):
        rows = torch.arange(5, 5 + count)
        got = run(some_rows(call, rows), "cpu")
        for name in per_row:
            assert name not in got or same_bits(got[name], whole[name][rows]), (count, name)


LEAVES = ("hidden", "weight", "bias", "extra_u", "extra_b")
# Trained leaves -> products of gradients: by the hidden states or u, and by the weight or b.
TRAINED = {
    ("hidden", "extra_u", "extra_b"): (2, 1),
    ("extra_u", "extra_b"): (1, 1),
    ("extra_b",): (0, 1),
    ("extra_u",): (1, 0),
    ("hidden",): (1, 0),
}


@pytest.mark.parametrize("trained", TRAINED, ids=" ".join)
@pytest.mark.parametrize("name", ["logprobs, every option", "at ids", "loss", "divergence"])
def test_frozen_leaves_cost_no_product(
    monkeypatch: pytest.MonkeyPatch, name: str, trained: tuple[str, ...]
) -> None:
    call = call_of(name, (5, 12))
    want, count = run(call, "cpu"), products(monkeypatch)
    leaves = {
        k: call.tensors[k].clone().requires_grad_(k in trained)
        for k in LEAVES
        if k in call.tensors
    }
    arguments = testing.arguments(call.replace(**leaves).tensors | call.options)
    out = testing.output(getattr(ppo_fast, call.op)(**arguments, backend="cpu"))
    torch.autograd.backward([out[k] for k in call.cotangents], list(call.cotangents.values()))
    for k, x in leaves.items():
        assert same_bits(x.grad, want[f"grad_{k}"]) if k in trained else x.grad is None
    by_rows, by_weights = TRAINED[trained]
    assert (
        count["hidden_gradient"] <= by_rows * 64
        and count["add_weight_gradient"] <= by_weights * 60
    )
    assert bool(count["hidden_gradient"]) == bool(by_rows)
    assert bool(count["add_weight_gradient"]) == bool(by_weights)


@pytest.mark.parametrize("name", CASES)
def test_no_dense_sum_is_formed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With a frozen weight nothing of the weight's size: no W + b·A, no (V, H + r), no copy."""
    short_chunks(monkeypatch)
    op, own = CASES[name]
    call = OPS[op]((4, 24), 211, 64, **own)
    trained = ("hidden", "extra_u", "extra_b")
    leaves = {k: call.tensors[k].clone().requires_grad_() for k in trained}
    arguments = testing.arguments(call.replace(**leaves).tensors | call.options)
    with Allocations() as seen:
        out = testing.output(getattr(ppo_fast, op)(**arguments, backend="cpu"))
        sum((out[k] * g).sum() for k, g in call.cotangents.items()).backward()
    assert all(x.grad is not None for x in leaves.values())
    assert seen.largest() < 211 * 64 and not [s for s in seen.shapes if 64 + 3 in s]


@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
@pytest.mark.parametrize("op", OPS)
def test_autocast_rounds_both(op: str, backend_name: str) -> None:
    extra = "head_extras" if op == "linear_ppo_loss" else "extras"
    call = OPS[op]((2, 5), **{extra: EXTRAS})
    narrow = {k: call.tensors[k].bfloat16() for k in LEAVES if k != "bias"}
    others = {
        k: call.tensors[k].bfloat16()
        for k in call.tensors
        if k in ("teacher_hidden", "teacher_weight")
    }
    with torch.autocast("cpu", torch.bfloat16):
        got = run(call._replace(cotangents={}), backend_name)
    want = run(call.replace(**narrow, **others)._replace(cotangents={}), backend_name)
    assert all(same_bits(got[k], x) for k, x in want.items())


def rank_one(call: Call) -> Call:
    u, b = call.tensors["extra_u"], call.tensors["extra_b"]
    return call.replace(extra_u=u[..., :1].contiguous(), extra_b=b[:, :1].contiguous())


@pytest.mark.parametrize("name", ["logprobs", "sparse support"])
def test_ranks(backend: str, device: str, name: str) -> None:
    """One, and more than the hidden size."""
    needs(name, backend)
    call = call_of(name, (2, 3), device=device)
    testing.assert_agrees(rank_one(call), backend)
    u, b = (torch.cat([call.tensors[k]] * 9, -1) for k in ("extra_u", "extra_b"))
    testing.assert_agrees(call.replace(extra_u=u, extra_b=b), backend)


@pytest.mark.parametrize(
    "name", ["logprobs", "loss", "divergence", "sparse support", "dense support"]
)
def test_strided(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """u and b as slices of wider tensors, as adapters that share one have them."""
    short_chunks(monkeypatch)
    call = call_of(name, (5, 6))
    wide = {
        k: testing.laid_out(call.tensors[k], "sliced", aligned=True)
        for k in ("extra_u", "extra_b")
    }
    want, got = run(call, "cpu"), run(call.replace(**wide), "cpu")
    assert not wide["extra_b"].is_contiguous()
    assert all(same_bits(got[k], x) for k, x in want.items())


@pytest.mark.parametrize("name", CASES)
def test_padding_of_b_is_never_read(name: str) -> None:
    """`vocab_size` cuts b as it cuts the weight; what is cut has a gradient of 0."""
    if "teacher" in name or "divergence" in name:
        call = without_bias_of_teacher(call_of(name, (3, 4)))
    else:
        call = call_of(name, (3, 4))
    padded = {}
    for k in ("weight", "extra_b", "bias", "teacher_weight"):
        if k in call.tensors:
            x = call.tensors[k]
            padded[k] = torch.cat([x, torch.full((5, *x.shape[1:]), math.nan)])
    want, got = run(call, "cpu"), run(call.replace(**padded).option(vocab_size=37), "cpu")
    for k, x in want.items():
        assert same_bits(got[k][:37] if k.removeprefix("grad_") in padded else got[k], x), k
    assert got["grad_extra_b"].shape == (42, 3) and not bool(got["grad_extra_b"][37:].any())


def without_bias_of_teacher(call: Call) -> Call:
    """The call whose teacher has no bias, which would have to be padded too."""
    return call.replace(teacher_bias=None)


def test_the_factor_of_the_logits_is_behind_it() -> None:
    call = call_of("logprobs, every option", (5, 6)).option(logit_scale=0.5)
    testing.assert_agrees(call, "cpu")


U, B = torch.ones(4, 9, 3), torch.ones(37, 3)
ROWS = [
    row
    for op in OPS
    for row in (
        Row(op, "extra", U, TYPE, r"extra must be a pair of tensors \(u, b\), got Tensor"),
        Row(op, "extra", (U,), TYPE, r"extra must be a pair of tensors \(u, b\), got 1 of them"),
        Row(op, "extra", (None, B), TYPE, r"extra\[0\] must be a tensor, got NoneType"),
        Row(op, "extra", (U, [1.0]), TYPE, r"extra\[1\] must be a tensor, got list"),
        Row(op, "extra", (U[:, :8], B), SHAPE, r"extra\[0\] must have shape \(..., r\) beside hidden \(4, 9, 24\), got \(4, 8, 3\)"),
        Row(op, "extra", (U[..., :0], B[:, :0]), SHAPE, r"extra\[0\] must have a rank r of 1 or more, got \(4, 9, 0\)"),
        Row(op, "extra", (U, B[:, :2]), SHAPE, r"extra\[1\] must have shape \(V, r\) = \(V, 3\), got \(37, 2\)"),
        Row(op, "extra", (U, B[:36]), SHAPE, r"extra\[1\] must have the weight's 37 rows, got \(36, 3\)"),
        Row(op, "extra", (U.bfloat16(), B), TYPE, r"extra\[0\] must be torch.float32 as hidden is, got torch.bfloat16"),
        Row(op, "extra", (U, B.double()), TYPE, r"extra\[1\] must be torch.float32 as hidden is, got torch.float64"),
        Row(op, "extra", (U.long(), B), TYPE, r"extra\[0\] must be float32, .*got torch.int64"),
        Row(op, "extra", (U.to("meta"), B), SHAPE, r"extra\[0\] must be on cpu, got meta"),
        Row(op, "extra", (U, B.to("meta")), SHAPE, r"extra\[1\] must be on cpu, got meta"),
        Row(op, "extra", (torch.ones(4, 3, 9).mT, B), SHAPE, r"extra\[0\] must have a contiguous last dim.*\(27, 1, 9\)"),
    )
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.op}: {row.text[:50]}")
def test_bad_input(row: Row) -> None:
    assert_refused(row)
