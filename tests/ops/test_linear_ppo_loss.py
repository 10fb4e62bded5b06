"""linear_ppo_loss: every variant and reduction in chunks, rows left out, gradients asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from head_helpers import shape_for, short_chunks

import ppo_fast
from ppo_fast import Stats, testing
from ppo_fast._boundary.schema import REDUCTIONS, VARIANTS
from ppo_fast.testing import Call, linear_ppo_call, run, same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GRADS = ("grad_hidden", "grad_weight", "grad_bias")
BARE: dict[str, Any] = {"extras": (), "kl_coef": 0.0, "ignored": False, "temperature": 1.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "bare": {**BARE, "mask": None, "head_extras": ()},
    "softcap": {"softcap": 4.0, "vocab": 101},
    "softcap and rows": {"softcap": 4.0, "head_extras": ("bias", "row_index"), "mask": "row"},
    "rows of sequence means": {
        "head_extras": ("row_index",),
        "reduction": "seq-mean-token-mean",
        "mask": "right",
    },
    "rows of gspo": {"head_extras": ("row_index",), "variant": "gspo", "dual_clip": 3.0},
    "dual clip": {"dual_clip": 3.0},
    "k3+": {"kl_estimator": "k3+", "kl_ratio_clip": 1.05},
    "k2": {"kl_estimator": "k2", "kl_clamp": 0.05},
    "denom": {"denom": 17.0, "reduction": "seq-mean-token-sum"},
    "odd vocabulary": {"vocab": 1009, "width": 65},
    "nothing kept": {"mask": "empty"},
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_within_budget(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, variant: str, reduction: str
) -> None:
    """In fp64 also where a variant stops gradients by definition, which gradcheck cannot see."""
    short_chunks(monkeypatch)
    options = {"variant": variant, "reduction": reduction, "dtype": dtype}
    testing.assert_agrees(linear_ppo_call((5, 12), mask="row", **options), "cpu")
    testing.assert_agrees(linear_ppo_call((3, 7), mask=None, **options, **BARE), "cpu")


@pytest.mark.parametrize("reduction, variant", list(zip(REDUCTIONS, VARIANTS, strict=True)))
def test_every_backend_within_budget(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, variant: str, reduction: str
) -> None:
    short_chunks(monkeypatch, backend)
    call = linear_ppo_call(
        shape_for(backend, device), variant=variant, reduction=reduction, device=device
    )
    testing.assert_agrees(call, backend)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    short_chunks(monkeypatch)
    for name in ("reference", "cpu"):
        testing.assert_agrees(linear_ppo_call((5, 12), **options), name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", ["clip", "gspo"])
def test_packed(monkeypatch: pytest.MonkeyPatch, variant: str, reduction: str) -> None:
    short_chunks(monkeypatch)
    options = {"denom": 11.0} if reduction.endswith("norm") else {}
    call = linear_ppo_call((45,), packed=True, variant=variant, reduction=reduction, **options)
    testing.assert_agrees(call, "cpu")


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_half_precisions(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Ratios that fp16 gradients can hold."""
    short_chunks(monkeypatch)
    for variant in VARIANTS:
        call = linear_ppo_call((5, 12), variant=variant, dtype=dtype, log_ratio_clamp=3.0)
        testing.assert_agrees(call, "cpu")
    out = run(call, "cpu")
    assert out["loss"].dtype == torch.float32 and all(out[k].dtype == dtype for k in GRADS)


def test_tensor_coefficients_are_their_numbers(kernel: str, device: str) -> None:
    call = linear_ppo_call((2, 3), device=device, kl_coef=0.25, entropy_coef=0.125, denom=16.0)
    names = ("kl_coef", "entropy_coef", "denom")
    on_device = {k: torch.tensor(call.options[k], device=device) for k in names}
    got, want = run(call.option(**on_device), kernel), run(call, kernel)
    assert all(same_bits(got[k], want[k]) for k in want)


def scored(call: Call, backend: str) -> torch.Tensor:
    """The log-probabilities of the call's own head, without a gradient."""
    names = ("hidden", "weight", "tokens", "bias", "temperature", "mask")
    tensors = {k: v for k, v in call.tensors.items() if k in names}
    with torch.no_grad():
        return ppo_fast.linear_token_logprobs(**tensors, backend=backend).logprobs


@pytest.mark.parametrize("variant", ["clip", "gspo"])
def test_the_first_ratio_is_exactly_one(
    kernel: str, device: str, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Scored as one batch, updated in micro-batches: old and new log-probs are the same bits."""
    short_chunks(monkeypatch, kernel)
    call = linear_ppo_call((4, 2 if kernel == "triton" else 23), device=device, variant=variant)
    call = call.replace(old_logprobs=scored(call, kernel))
    for rows in ([0, 1, 2, 3], [3, 1]):
        part = rows_of(call, torch.tensor(rows, device=device))
        stats = Stats(run(part, kernel)["stats"]).compute()
        assert stats["ratio_min"] == stats["ratio_max"] == 1.0 and stats["kl_k3"] == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_grad_or_no_grad(kernel: str, device: str, variant: str) -> None:
    call = linear_ppo_call((2, 2), device=device, variant=variant)
    a, b = run(call, kernel), run(call._replace(cotangents={}), kernel)
    assert all(same_bits(a[k], b[k]) for k in b)


def rows_of(call: Call, rows: torch.Tensor) -> Call:
    """Some of the batch's sequences; weight and bias are everybody's."""
    mine = {k: v for k, v in call.tensors.items() if k not in ("weight", "bias", "row_index")}
    part = testing.with_rows(call._replace(tensors=mine), rows)
    return call.replace(**part.tensors)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", ["clip", "gspo"])
def test_micro_batches_with_one_denom_are_the_batch(
    monkeypatch: pytest.MonkeyPatch, variant: str, reduction: str
) -> None:
    """Gradients add up to the whole batch's, within its budget; so do loss and statistics."""
    short_chunks(monkeypatch)
    options = {"variant": variant, "reduction": reduction}
    call = linear_ppo_call((6, 12), denom=7.5, mask="row", **options)
    whole = run(call, "cpu")
    parts = [run(rows_of(call, torch.tensor(rows)), "cpu") for rows in ([0, 1], [2, 3, 4], [5])]
    together = {k: sum(p[k] for p in parts) for k in ("loss", "grad_weight", "grad_bias")}
    together |= {
        k: torch.cat([p[k] for p in parts]) for k in ("logprobs", "entropy", "grad_hidden")
    }
    together["stats"] = sum(
        (Stats(p["stats"]) for p in parts[1:]), Stats(parts[0]["stats"])
    ).values
    testing.assert_agrees(call, "cpu", {k: together[k] for k in whole})


def test_rows_left_out_count_in_the_divisor(kernel: str, device: str) -> None:
    """row_index without denom is row_index with the D of all unmasked tokens."""
    for reduction in REDUCTIONS:
        head_extras = ("row_index",)
        call = linear_ppo_call((4, 9), reduction=reduction, head_extras=head_extras, device=device)
        keep = call.tensors["mask"] & (call.tensors["tokens"] != -100)
        live = int((keep.sum(-1) > 0).sum())
        denom = {
            "token-mean": int(keep.sum()),
            "token-sum": 1,
            "seq-mean-token-sum-norm": live * 9,
        }.get(reduction, live)
        a, b = run(call, kernel), run(call.option(denom=float(denom)), kernel)
        assert all(same_bits(a[k], b[k]) for k in (*GRADS[:2], "loss")), reduction


def test_gradients_of_other_rows_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    short_chunks(monkeypatch)
    call = linear_ppo_call((4, 9), head_extras=("row_index",))
    named = torch.zeros(36, dtype=torch.bool).index_fill(0, call.tensors["row_index"], True)
    out = run(call, "cpu")
    for name in ("logprobs", "entropy", "grad_hidden"):
        x = out[name].reshape(36, -1)
        assert not bool(x[~named].any()) and bool(x[named].any()), name


def test_strided_hidden(kernel: str, device: str) -> None:
    call = linear_ppo_call((3, 3), device=device, mask=None)
    dense = call.tensors["hidden"]
    longer = torch.cat([dense, dense[:, :1] * math.nan], 1)
    got, want = run(call.replace(hidden=longer[:, :-1]), kernel), run(call, kernel)
    assert all(same_bits(got[k], want[k]) for k in want)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    short_chunks(monkeypatch)
    view, _ = testing.with_layout(linear_ppo_call((5, 12), ignored=False), layout)
    testing.assert_agrees(view, "cpu")


@pytest.mark.parametrize("bias", [-200.0, 1e4])
def test_offsets(backend: str, device: str, bias: float) -> None:
    call = linear_ppo_call((2, 3), device=device, mask=None, temperature=1.0, ignored=False)
    moved = call.replace(bias=torch.full_like(call.tensors["bias"], bias))
    moved = moved.replace(old_logprobs=None).option(old_logprobs=None)
    testing.assert_agrees(moved, backend)
    assert all(bool(x.isfinite().all()) for x in run(moved, backend).values())


def test_forbidden_classes(backend: str, device: str) -> None:
    """A class at −inf is no class; a label there is worth −inf, and its row passes nothing."""
    call = linear_ppo_call(
        (2, 3), device=device, mask=None, ignored=False, extras=(), kl_coef=0.0, entropy_coef=0.01
    )
    bias = call.tensors["bias"].index_fill(0, torch.arange(0, 37, 3, device=device), -math.inf)
    tokens = call.tensors["tokens"] // 3 * 3 + 1
    fine = call.replace(bias=bias, tokens=tokens, old_logprobs=None).option(old_logprobs=None)
    testing.assert_agrees(fine, backend)
    spoiled = tokens.clone()
    spoiled[1, 2] = 3
    # Ratio e^-20 against a finite old log-probability: the loss stays finite.
    quiet = call.replace(bias=bias, tokens=spoiled, old_logprobs=tokens * 0.0 - 3.0)
    out = run(quiet.option(entropy_coef=0.0), backend)
    assert float(out["logprobs"][1, 2]) == -math.inf and bool(out["loss"].isfinite())
    assert not bool(out["grad_hidden"][1, 2].any()) and not bool(out["grad_weight"][::3].any())
    assert all(bool(out[k].isfinite().all()) for k in GRADS)


def test_retained_graphs_give_the_same_gradients(kernel: str, device: str) -> None:
    call = linear_ppo_call((2, 3), device=device)
    leaves = {k: call.tensors[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    args = call.replace(**leaves).tensors
    loss = ppo_fast.linear_ppo_loss(**args, **call.options, backend=kernel).loss
    for _ in range(2):
        loss.backward(retain_graph=True)
    single = torch.autograd.grad(loss, list(leaves.values()))
    assert all(same_bits(x.grad, 2 * g) for x, g in zip(leaves.values(), single, strict=True))


def test_double_backward_raises(kernel: str, device: str) -> None:
    call = linear_ppo_call((2, 2), device=device, mask=None)
    weight = call.tensors["weight"].clone().requires_grad_()
    args = call.replace(weight=weight).tensors
    out = ppo_fast.linear_ppo_loss(**args, **call.options, backend=kernel)
    (grad,) = torch.autograd.grad(out.loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_outputs_beside_the_loss_are_constants(kernel: str, device: str) -> None:
    call = linear_ppo_call((2, 2), device=device, mask=None)
    weight = call.tensors["weight"].clone().requires_grad_()
    args = call.replace(weight=weight).tensors
    out = ppo_fast.linear_ppo_loss(**args, **call.options, backend=kernel)
    assert out.loss.requires_grad and out.logprobs.shape == (2, 2)
    assert not (out.logprobs.requires_grad or out.entropy.requires_grad)
    assert not out.stats.values.requires_grad


@pytest.mark.case("I8")
def test_autocast_casts_as_linear_does(kernel: str, device: str) -> None:
    call = linear_ppo_call((2, 3), device=device)
    halves = {k: call.tensors[k].bfloat16() for k in ("hidden", "weight")}
    want = run(call.replace(**halves), kernel)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run(call, kernel)
    assert all(same_bits(got[k], want[k]) for k in ("loss", "stats", "logprobs", "entropy"))
    assert got["grad_weight"].dtype == torch.float32
    assert same_bits(got["grad_weight"], want["grad_weight"].float())


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (1, 1)], ids=str)
def test_small_shapes(backend: str, device: str, shape: tuple[int, ...]) -> None:
    testing.assert_agrees(linear_ppo_call(shape, device=device, mask="all"), backend)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_kept(reduction: str, variant: str) -> None:
    """D = 0: loss 0 and zero gradients, whatever stands in the rows; with `denom` too."""
    for options in ({}, {"denom": 5.0}):
        call = linear_ppo_call(
            (2, 3), mask="empty", reduction=reduction, variant=variant, **options
        )
        out = run(testing.with_garbage(call, math.nan), "cpu")
        assert float(out["loss"]) == 0.0 and not any(bool(out[k].any()) for k in GRADS)
