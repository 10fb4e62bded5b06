"""linear_logprobs_at: accuracy, one id as `linear_token_logprobs`, absent and repeated ids."""

from __future__ import annotations

import math
from typing import Any

import pytest
import spelled_out
import torch
from head_helpers import Allocations, products, shape_for, short_chunks

import ppo_fast
from ppo_fast import testing
from ppo_fast.ops.linear_logprobs_at import row_sums
from ppo_fast.testing import Call, linear_at_call, run, same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INF = math.inf
GRADS = ("grad_hidden", "grad_weight", "grad_bias")
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"extras": (), "mask": None, "temperature": 1.0, "absent": False},
    "every option": {"extras": ("bias", "row_index"), "softcap": 4.0, "mask": "row"},
    "row_index": {"extras": ("row_index",), "mask": None},
    "odd vocabulary": {"vocab": 1009, "temperature": 0.7, "k": 20},
    "one of each": {"vocab": 1, "width": 1, "k": 1},
    "the whole vocabulary and more": {"vocab": 7, "k": 33},
    "no id": {"k": 0},
    "wide": {"width": 515, "softcap": 30.0},
    "nothing kept": {"mask": "empty"},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_within_budget(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    short_chunks(monkeypatch, backend)
    call = linear_at_call(shape_for(backend, device), device=device, **options)
    testing.assert_agrees(call, backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_precisions(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    short_chunks(monkeypatch, backend)
    call = linear_at_call(shape_for(backend, device), dtype=dtype, device=device, softcap=6.0)
    testing.assert_agrees(call, backend)
    out = run(call, backend)
    assert out["logprobs"].dtype == out["entropy"].dtype == torch.float32
    assert all(out[name].dtype == dtype for name in GRADS)


def test_fp64_is_the_reference(kernel: str, device: str) -> None:
    call = linear_at_call((5, 12), dtype=torch.float64, device=device, softcap=6.0)
    if kernel != "cpu":
        with pytest.raises(TypeError, match="float64"):
            run(call, kernel)
        return
    testing.assert_agrees(call, kernel)


def test_the_reference_is_the_scalar_loop() -> None:
    """Σ g_k ln p[id_k] + h H of one row, and its slope by the bias: Σ_k g_k (δ − p) − h p (ln p +
    H)."""
    call = linear_at_call((1,), 9, 3, k=6, mask=None, temperature=0.8, dtype=torch.float64)
    ids = torch.tensor([[4, 0, 4, -1, 8, 4]])
    call = call.replace(ids=ids)
    out, t = run(call, "reference"), call.tensors
    z = [
        (math.fsum(float(a * b) for a, b in zip(t["hidden"][0], w, strict=True)) + float(c)) / 0.8
        for w, c in zip(t["weight"], t["bias"], strict=True)
    ]
    logp = spelled_out.log_softmax(z)
    entropy = -math.fsum(math.exp(x) * x for x in logp)
    g = call.cotangents["logprobs"][0].tolist()
    h = float(call.cotangents["entropy"])
    want = [0.0 if i < 0 else logp[i] for i in ids[0].tolist()]
    slope = [
        math.fsum(
            [
                x * ((i == j) - math.exp(p))
                for i, x in zip(ids[0].tolist(), g, strict=True)
                if i >= 0
            ]
            + [-h * math.exp(p) * (p + entropy)]
        )
        / 0.8
        for j, p in enumerate(logp)
    ]
    # Some thousand fp64 roundings of numbers up to 10.
    assert torch.allclose(
        out["logprobs"][0], torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert abs(float(out["entropy"]) - entropy) <= 1e-12
    assert torch.allclose(
        out["grad_bias"], torch.tensor(slope, dtype=torch.float64), rtol=0, atol=1e-12
    )


def as_tokens(call: Call, k: int) -> Call:
    """`linear_token_logprobs` of every row's k-th id alone."""
    tensors = {name: x for name, x in call.tensors.items() if name != "ids"}
    tensors["tokens"] = call.tensors["ids"][..., k]
    return Call("linear_token_logprobs", tensors, call.options, {})


def test_every_id_is_a_token_of_its_own(kernel: str, device: str) -> None:
    """The same log-probability to the rounding of a maximum, and the entropy's bits."""
    call = linear_at_call((2, 3), device=device, absent=False)._replace(cotangents={})
    out, eps = run(call, kernel), torch.finfo(torch.float32).eps
    for k in range(5):
        one = run(as_tokens(call, k), kernel)
        assert same_bits(out["entropy"], one["entropy"])
        off = (out["logprobs"][..., k] - one["logprobs"]).abs()
        # z / τ and its distance to the maximum are rounded in another order: numbers up to 2^6.
        assert bool((off <= 2 * 64 * eps).all()) and bool(one["logprobs"].any())


def test_absent_ids_are_zero_and_change_nothing(backend: str, device: str) -> None:
    """Beside ids -1 the others keep their bits, and so do all gradients."""
    call = linear_at_call((2, 3), device=device, absent=False)
    ids, grads = call.tensors["ids"], call.cotangents
    none = torch.full_like(ids[..., :2], -1)
    wide = call.replace(ids=torch.cat([ids, none], -1))
    more = torch.cat([grads["logprobs"], torch.full_like(grads["logprobs"][..., :2], 9.0)], -1)
    a = run(call, backend)
    b = run(wide._replace(cotangents=grads | {"logprobs": more}), backend)
    assert not bool(b["logprobs"][..., 5:].any())
    assert same_bits(a["logprobs"], b["logprobs"][..., :5])
    assert all(same_bits(a[k], b[k]) for k in ("entropy", *GRADS))


def test_rows_without_an_id(kernel: str, device: str) -> None:
    """Their entropy has its gradient, and that of another row with ids keeps its bits."""
    call = linear_at_call((2, 3), device=device, mask=None)
    ids = call.tensors["ids"].clone()
    ids[0] = -1
    empty = call.replace(ids=ids)
    testing.assert_agrees(empty, kernel)
    a, b = run(call, kernel), run(empty, kernel)
    assert same_bits(a["entropy"], b["entropy"])
    assert same_bits(a["grad_hidden"][1], b["grad_hidden"][1])
    assert bool(b["grad_hidden"][0].any())


def test_an_id_that_stands_several_times(kernel: str, device: str) -> None:
    """Each of its gradients counts, added in their order: a sum in another order differs."""
    call = linear_at_call((1,), 5, k=3, device=device, mask=None, extras=("bias",))
    call = call.replace(ids=torch.full((1, 3), 2, device=device))
    grads = {"entropy": torch.zeros(1), "logprobs": torch.tensor([[1.0, 2.0**-24, 2.0**-24]])}
    call = call._replace(cotangents={k: x.to(device) for k, x in grads.items()})
    testing.assert_agrees(call, kernel)
    first = run(call, kernel)["grad_bias"]
    for _ in range(5):
        assert same_bits(run(call, kernel)["grad_bias"], first)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads(threads: int) -> None:
    """Many ids in few columns: the additions of a row do not depend on who makes them.

    A GEMM of so few columns may add in another order with more threads (MKL does on an AMD EPYC):
    here every sum that it forms has one term.
    """
    call = linear_at_call((40, 33), 3, k=65, mask=None)
    one = torch.arange(24) % 3 == torch.arange(3)[:, None]
    hidden = torch.where(torch.arange(24) < 3, call.tensors["hidden"], 0.0)
    call = call.replace(weight=torch.where(one, call.tensors["weight"], 0.0), hidden=hidden)
    want, before = run(call, "cpu"), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for _ in range(3):
            got = run(call, "cpu")
            assert all(same_bits(got[k], want[k]) for k in ("logprobs", "entropy", "grad_hidden"))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 7, 64, 100])
def test_row_sums_are_a_tree_of_the_row(k: int) -> None:
    """Any number of rows and of zeros behind gives the same bits, within log2 K roundings."""
    x = torch.randn(9, k)
    got = row_sums(x)
    assert same_bits(got[4:5], row_sums(x[4:5]))
    assert same_bits(got, row_sums(torch.cat([x, torch.zeros(9, 13)], -1)))
    eps, depth = torch.finfo(torch.float32).eps, math.ceil(math.log2(max(k, 1)))
    bound = depth * eps * x.double().abs().sum(-1)
    assert bool(((got - x.double().sum(-1)).abs() <= bound).all())


def test_a_label_of_probability_one(backend: str, device: str) -> None:
    """p → 1: what an id's own gradient cancels is not lost, and nothing is NaN or above 0."""
    for height in (12.0, 60.0, 200.0, 1e4):
        call = linear_at_call((3,), device=device, mask=None, temperature=0.7, scale=0.5)
        bias = torch.zeros(37, device=device)
        bias[5] = height
        ids = torch.tensor([[5, -1, -1], [5, 3, 5], [3, 4, -1]], device=device)
        grads = call.cotangents | {"logprobs": call.cotangents["logprobs"][:, :3]}
        call = call.replace(bias=bias, ids=ids)._replace(cotangents=grads)
        testing.assert_agrees(call, backend)
        out = run(call, backend)
        assert all(bool(x.isfinite().all()) for x in out.values())
        assert bool((out["logprobs"] <= 0).all()) and bool((out["entropy"] >= 0).all())


def test_forbidden_classes(backend: str, device: str) -> None:
    """A bias of -inf: an id there has -inf and passes nothing; the others of its row do."""
    call = linear_at_call((4,), device=device, mask=None, temperature=1.0)
    bias = torch.zeros(37, device=device)
    bias[::3] = -INF
    ids = torch.tensor([[3, 6, 0, -1, 9], [3, 1, 1, 2, -1], [1, 2, 4, 5, 7], [-1] * 5])
    call = call.replace(bias=bias, ids=ids.to(device))
    testing.assert_agrees(call, backend)
    out = run(call, backend)
    assert bool((out["logprobs"][0, :3] == -INF).all()) and float(out["logprobs"][1, 0]) == -INF
    assert not bool(out["grad_bias"][::3].any()) and bool(out["entropy"].isfinite().all())
    alone = {"logprobs": torch.zeros(4, 5, device=device)}
    alone["logprobs"][0] = 1.0
    only = run(call._replace(cotangents=alone), backend)
    assert all(not bool(only[name].any()) for name in GRADS)


@pytest.mark.parametrize("wrong", [-2, 37, 2**31, -(2**40)])
def test_ids_out_of_range_are_nan_rows(backend: str, device: str, wrong: int) -> None:
    """All of the row, its absent ids apart; nothing out of bounds is read; others keep bits."""
    call = linear_at_call((2, 3), device=device, mask=None)
    ids = call.tensors["ids"].clone()
    ids[1, 1] = torch.tensor([3, wrong, -1, 7, 7], device=device)
    spoilt = call.replace(ids=ids)
    clean, out = run(call, backend), run(spoilt, backend)
    others = torch.ones(2, 3, dtype=torch.bool, device=device)
    others[1, 1] = False
    for name in ("logprobs", "entropy", "grad_hidden"):
        assert same_bits(out[name][others], clean[name][others]), name
    assert out["logprobs"][1, 1].isnan().tolist() == [True, True, False, True, True]
    assert bool(out["entropy"][1, 1].isnan()) and bool(out["grad_hidden"][1, 1].isnan().all())


def test_a_nan_row_is_alone(backend: str, device: str) -> None:
    call = linear_at_call((2, 3), device=device, mask=None)._replace(cotangents={})
    hidden = call.tensors["hidden"].clone()
    hidden[0, 2, 7] = math.nan
    clean, out = run(call, backend), run(call.replace(hidden=hidden), backend)
    read = call.tensors["ids"][0, 2] != -1
    assert torch.equal(out["logprobs"][0, 2].isnan(), read) and bool(out["entropy"][0, 2].isnan())
    for name, x in out.items():
        assert same_bits(x[1], clean[name][1]) and same_bits(x[0, :2], clean[name][0, :2]), name


@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 2, 2)], ids=str)
def test_any_leading_shape(backend: str, device: str, shape: tuple[int, ...]) -> None:
    testing.assert_agrees(linear_at_call(shape, 19, device=device, mask=None), backend)


@pytest.mark.case("X8")
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_rows(backend: str, device: str, shape: tuple[int, ...]) -> None:
    out = run(linear_at_call(shape, 19, device=device, mask=None), backend)
    assert out["logprobs"].shape == (*shape, 5) and out["entropy"].shape == shape
    assert out["grad_hidden"].shape == (*shape, 24) and not bool(out["grad_weight"].any())


@pytest.mark.parametrize("only", ["logprobs", "entropy"])
def test_one_output_alone(kernel: str, device: str, only: str) -> None:
    """An output that nobody uses is the same as one with a zero gradient, and right."""
    call = linear_at_call((2, 3), device=device)
    grads = call.cotangents
    zeroed = {k: v if k == only else torch.zeros_like(v) for k, v in grads.items()}
    a = run(call._replace(cotangents={only: grads[only]}), kernel)
    b = run(call._replace(cotangents=zeroed), kernel)
    assert all(same_bits(a[name], b[name]) and bool(a[name].any()) for name in GRADS)
    testing.assert_agrees(call._replace(cotangents=zeroed), kernel, b)


def test_int32_ids(backend: str, device: str) -> None:
    call = linear_at_call((2, 3), device=device)
    a, b = run(call, backend), run(call.replace(ids=call.tensors["ids"].int()), backend)
    assert all(same_bits(a[k], b[k]) for k in a)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Any strides but of hidden's last dimension; a weight's may be those of its transpose."""
    short_chunks(monkeypatch)
    view, dense = testing.with_layout(linear_at_call((5, 12)), layout)
    testing.assert_agrees(view, "cpu")
    a, b = run(view, "cpu"), run(dense, "cpu")
    assert layout == "transposed" or all(same_bits(a[k], b[k]) for k in ("logprobs", "entropy"))


def test_a_graph_is_differentiated_once_or_kept(kernel: str, device: str) -> None:
    call = linear_at_call((2, 3), device=device)
    leaves = {k: call.tensors[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    out = ppo_fast.linear_logprobs_at(**call.replace(**leaves).tensors, backend=kernel)
    total = out.logprobs.sum() - 0.1 * out.entropy.sum()
    first = torch.autograd.grad(total, [*leaves.values()], retain_graph=True)
    second = torch.autograd.grad(total, [*leaves.values()], create_graph=True)
    assert all(map(same_bits, first, second))
    with pytest.raises(RuntimeError, match="differentiate twice"):
        second[0].sum().backward()


def test_the_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the size of all logits, and rows without a gradient cost no product."""
    short_chunks(monkeypatch)
    call = linear_at_call((8, 32), 211, 64, mask=None)
    with Allocations() as seen:
        out = run(call, "cpu")
    assert seen.largest() == 256 * 64 and bool(out["grad_weight"].any())
    live = torch.arange(256).view(8, 32) % 5 == 0
    grads = {
        k: torch.where(live[(...,) + (None,) * (v.dim() - 2)], v, 0.0)
        for k, v in call.cotangents.items()
    }
    rows = products(monkeypatch)
    run(call._replace(cotangents=grads), "cpu")
    assert rows["add_weight_gradient"] == int(live.sum()) == 52


@pytest.mark.case("I8")
def test_autocast_casts_as_linear_does(kernel: str, device: str) -> None:
    call = linear_at_call((2, 4), device=device)
    halves = {k: call.tensors[k].bfloat16() for k in ("hidden", "weight")}
    want = run(call.replace(**halves), kernel)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run(call, kernel)
    assert same_bits(got["logprobs"], want["logprobs"])
    assert same_bits(got["grad_weight"], want["grad_weight"].float())
