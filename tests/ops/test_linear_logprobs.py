"""linear_token_logprobs: accuracy, chunks, compacted rows, extreme logits, gradients asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from head_helpers import shape_for, short_chunks

import ppo_fast
from ppo_fast import testing
from ppo_fast.testing import linear_call, run, same_bits
from ppo_fast.testing.conditions import CONDITIONS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INF = math.inf
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"extras": (), "mask": None, "temperature": 1.0, "ignored": False},
    "every option": {"extras": ("bias", "row_index"), "softcap": 4.0, "mask": "row"},
    "row_index": {"extras": ("row_index",), "mask": None, "ignored": False},
    "odd vocabulary": {"vocab": 1009, "temperature": 0.7},
    "one of each": {"vocab": 1, "width": 1},
    "wide": {"width": 515, "softcap": 30.0},
    "nothing kept": {"mask": "empty"},
    "ignore_index": {"ignore_index": 5},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_within_budget(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    short_chunks(monkeypatch, backend)
    call = linear_call(shape_for(backend, device), device=device, **options)
    testing.assert_agrees(call, backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_precisions(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    short_chunks(monkeypatch, backend)
    call = linear_call(shape_for(backend, device), dtype=dtype, device=device, softcap=6.0)
    testing.assert_agrees(call, backend)
    out = run(call, backend)
    assert out["logprobs"].dtype == torch.float32
    assert all(x.dtype == dtype for name, x in out.items() if name.startswith("grad"))


def test_fp64_is_the_reference(kernel: str, device: str) -> None:
    call = linear_call((5, 12), dtype=torch.float64, device=device, softcap=6.0)
    if kernel != "cpu":
        with pytest.raises(TypeError, match="float64"):
            run(call, kernel)
        return
    testing.assert_agrees(call, kernel)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_fp32_grade_logits_from_half_inputs(kernel: str, device: str, dtype: torch.dtype) -> None:
    """Within the budget of an fp32 product of the same rounded inputs, whatever their type.

    PyTorch's own fp32 error is no bound by itself: of eight rows it may be a tenth of an ulp.
    """
    call = linear_call((8,), 1009, 256, dtype=dtype, device=device, mask=None, temperature=1.0)
    wide = testing.promoted(call)
    exact = run(wide, "reference")
    eager = run(testing.promoted(call, torch.float32), "reference")
    got = run(call, kernel)
    budgets = CONDITIONS[call.op](wide, exact, torch.finfo(torch.float32).eps)
    for name in ("logprobs", "entropy"):
        ops, condition, _ = budgets[name]
        testing.assert_within_budget(
            got[name],
            exact[name],
            condition=condition,
            ops=ops,
            eager=eager[name],
            compute=torch.float32,
            name=name,
        )
        # Far from what products rounded to the inputs' type would give.
        assert (
            ops * float(condition.max()) * torch.finfo(torch.float32).eps < torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 2, 2)], ids=str)
def test_any_leading_shape(backend: str, device: str, shape: tuple[int, ...]) -> None:
    testing.assert_agrees(linear_call(shape, 19, device=device, mask=None), backend)


@pytest.mark.case("X8")
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_rows(backend: str, device: str, shape: tuple[int, ...]) -> None:
    out = run(linear_call(shape, 19, device=device, mask=None), backend)
    assert out["logprobs"].shape == out["entropy"].shape == shape
    assert out["grad_hidden"].shape == (*shape, 24) and not bool(out["grad_weight"].any())


def test_no_rows_after_compaction(kernel: str, device: str) -> None:
    """An empty row_index, and one whose rows are all masked: zeros, and nothing is read."""
    call = linear_call((3, 4), device=device, mask=None, ignored=False)
    call = call.replace(hidden=torch.full_like(call.tensors["hidden"], math.nan))
    none = torch.zeros(0, dtype=torch.int64, device=device)
    some = torch.tensor([1, 5], device=device)
    mask = torch.ones(12, dtype=torch.bool, device=device).index_fill(0, some, False).view(3, 4)
    for given in ({"row_index": none}, {"row_index": some, "mask": mask}):
        out = run(call.replace(**given), kernel)
        assert all(not bool(x.any()) for x in out.values())


def _biased(device: str, bias: torch.Tensor, tokens: list[int], **options: Any) -> testing.Call:
    call = linear_call(
        (len(tokens),),
        len(bias),
        device=device,
        mask=None,
        temperature=1.0,
        ignored=False,
        **options,
    )
    return call.replace(bias=bias.to(device), tokens=torch.tensor(tokens, device=device))


@pytest.mark.parametrize("offset", [-200.0, 1e4, -1e4])
def test_offsets(backend: str, device: str, offset: float) -> None:
    """All logits far from 0: the softmax is what it was, to the rounding of the logits."""
    call = _biased(device, torch.full((37,), offset), [1, 17, 36, 0])
    testing.assert_agrees(call, backend)
    assert bool((run(call, backend)["logprobs"] <= 0).all())


def test_a_label_of_probability_one(backend: str, device: str) -> None:
    """p_y → 1: neither side of 1 − p is lost to cancellation, and nothing is NaN."""
    for height in (12.0, 60.0, 200.0):
        bias = torch.zeros(37)
        bias[5] = height
        call = _biased(device, bias, [5, 5, 3], scale=0.5)
        testing.assert_agrees(call, backend)
        out = run(call, backend)
        assert all(bool(x.isfinite().all()) for x in out.values())
        assert bool((out["logprobs"] <= 0).all())


def test_forbidden_classes(backend: str, device: str) -> None:
    """A bias of −inf: the row without that class; a label there has −inf and passes nothing."""
    bias = torch.zeros(37)
    bias[::3] = -INF
    call = _biased(device, bias, [1, 2, 3, 4])
    testing.assert_agrees(call, backend)
    out = run(call, backend)
    assert float(out["logprobs"][2]) == -INF and bool(out["entropy"].isfinite().all())
    assert not bool(out["grad_weight"][::3].any()) and not bool(out["grad_bias"][::3].any())
    alone = {"logprobs": torch.tensor([0.0, 0.0, 1.0, 0.0], device=device)}
    only = run(call._replace(cotangents=alone), backend)
    assert all(not bool(only[f"grad_{name}"].any()) for name in ("hidden", "weight", "bias"))


@pytest.mark.parametrize("token", [-1, 37, 2**31, -(2**40)])
def test_tokens_out_of_range_are_nan_rows(backend: str, device: str, token: int) -> None:
    """Nothing out of bounds is read, and the other rows keep their bits."""
    call = linear_call((2, 3), device=device, mask=None, ignored=False)
    tokens = call.tensors["tokens"].clone()
    tokens[1, 1] = token
    clean, out = (
        run(c._replace(cotangents={}), backend) for c in (call, call.replace(tokens=tokens))
    )
    others = torch.ones(2, 3, dtype=torch.bool, device=device)
    others[1, 1] = False
    for name, x in out.items():
        assert bool(x[1, 1].isnan()) and same_bits(x[others], clean[name][others]), name


def test_a_nan_row_is_alone(backend: str, device: str) -> None:
    call = linear_call((2, 3), device=device, mask=None, ignored=False)._replace(cotangents={})
    hidden = call.tensors["hidden"].clone()
    hidden[0, 2, 7] = math.nan
    clean, out = run(call, backend), run(call.replace(hidden=hidden), backend)
    for name, x in out.items():
        others = [x[0, :2], x[1]], [clean[name][0, :2], clean[name][1]]
        assert bool(x[0, 2].isnan()) and all(map(same_bits, *others)), name


@pytest.mark.parametrize("only", ["logprobs", "entropy"])
def test_one_output_alone(kernel: str, device: str, only: str) -> None:
    """An output that nobody uses is the same as one with a zero gradient."""
    call = linear_call((2, 3), device=device)
    grads = call.cotangents
    zeroed = {k: v if k == only else torch.zeros_like(v) for k, v in grads.items()}
    a = run(call._replace(cotangents={only: grads[only]}), kernel)
    b = run(call._replace(cotangents=zeroed), kernel)
    for name in ("grad_hidden", "grad_weight", "grad_bias"):
        assert same_bits(a[name], b[name]) and bool(a[name].any()), name


def test_strided_hidden_is_not_copied(kernel: str, device: str) -> None:
    """hidden[:, :-1] and every second row: the contiguous copy's bits from a chunk's gather."""
    call = linear_call((2, 3), device=device, mask=None, extras=())
    dense = call.tensors["hidden"]
    longer = torch.cat([dense, dense[:, :1]], 1)
    spread = torch.stack([dense, dense.neg()], 2)
    want = run(call, kernel)
    for view in (longer[:, :-1], spread[:, :, 0]):
        got = run(call.replace(hidden=view), kernel)
        assert all(same_bits(got[k], want[k]) for k in want)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Any strides but of hidden's last dimension; a weight's may be those of its transpose."""
    short_chunks(monkeypatch)
    view, _ = testing.with_layout(linear_call((5, 12), ignored=False), layout)
    assert layout == "offset" or not view.tensors["weight"].is_contiguous()
    testing.assert_agrees(view, "cpu")


def test_retained_graphs_give_the_same_gradients(kernel: str, device: str) -> None:
    call = linear_call((2, 3), device=device)
    leaves = {k: call.tensors[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    out = ppo_fast.linear_token_logprobs(**call.replace(**leaves).tensors, backend=kernel)
    total = out.logprobs.sum() - 0.1 * out.entropy.sum()
    first = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(total, list(leaves.values()))
    assert all(map(same_bits, first, second))


def test_double_backward_raises(kernel: str, device: str) -> None:
    call = linear_call((2, 2), device=device, mask=None)
    weight = call.tensors["weight"].clone().requires_grad_()
    out = ppo_fast.linear_token_logprobs(**call.replace(weight=weight).tensors, backend=kernel)
    (grad,) = torch.autograd.grad(out.logprobs.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.case("I8")
def test_autocast_casts_as_linear_does(kernel: str, device: str) -> None:
    """fp32 states and weight, or one of each: bf16 products; gradients in the leaves' types."""
    call = linear_call((2, 4), device=device)
    halves = {k: call.tensors[k].bfloat16() for k in ("hidden", "weight")}
    want = run(call.replace(**halves), kernel)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run(call, kernel)
        mixed = run(call.replace(hidden=halves["hidden"]), kernel)
    for name in ("logprobs", "entropy"):
        assert same_bits(got[name], want[name]) and same_bits(mixed[name], want[name])
    for name in ("grad_hidden", "grad_weight"):
        assert got[name].dtype == torch.float32 and same_bits(got[name], want[name].float())


def test_autocast_leaves_doubles() -> None:
    call = linear_call((2, 4), dtype=torch.float64)
    want = run(call, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(call, "cpu")
    assert all(same_bits(got[k], want[k]) for k in want)
