"""Any layout gives the contiguous layout's bits; inputs are read, never written."""

from __future__ import annotations

import pytest
import torch
from conftest import shape_of

import ppo_fast
from ppo_fast import testing
from ppo_fast.testing import run, same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EXTRAS = ("next_values", "terminated", "truncated", "rho", "c", "lam", "lam_returns")
CALLS: dict[str, tuple[str, dict[str, object]]] = {
    "logprobs": ("token_logprobs", {"vocab": 67}),
    "ppo": ("ppo_loss", {}),
    "ppo gspo": ("ppo_loss", {"variant": "gspo"}),
    "ppo weights": (
        "ppo_loss",
        {"kl_weight": "ratio", "extras": ("ref_logprobs", "sequence_weights")},
    ),
    "ppo penalty": ("ppo_loss", {"variant": "penalty", "reduction": "seq-mean-token-mean"}),
    "value": ("value_loss", {}),
    "gae": ("gae", {"extras": EXTRAS}),
    "gae zero": ("gae", {"masked": "zero"}),
    "gae rows": ("gae", {"extras": ("bootstrap", "row_lam")}),
    "gae time-major": ("gae", {"time_major": True, "extras": EXTRAS}),
    "rlhf": ("rlhf_advantages", {}),
    "rlhf token": ("rlhf_advantages", {"score_at": "per-token"}),
    "whiten": ("whiten", {}),
}
SUMS = ("loss", "stats", "moments")
EVERY = pytest.mark.parametrize("op, options", CALLS.values(), ids=CALLS.keys())


@pytest.mark.case("X15")
@EVERY
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(
    backend: str, device: str, layout: str, op: str, options: dict[str, object]
) -> None:
    """Transposed, every second element, one element off, stride 0: equal to contiguous."""
    for dtype in FLOATS[:2]:
        call = testing.FACTORIES[op](shape_of(op), dtype=dtype, device=device, **options)
        view, dense = testing.with_layout(call, layout)
        a, b = run(view, backend), run(dense, backend)
        for name, x in b.items():
            if backend == "reference" and name in SUMS:  # torch.sum follows the strides
                assert torch.allclose(a[name], x, rtol=1e-6, equal_nan=True), (dtype, name)
                continue
            assert same_bits(a[name], x), (dtype, name)


@pytest.mark.parametrize("layout", ["sliced", "offset", "expanded"])
@pytest.mark.parametrize("op", ["ppo_loss", "value_loss", "gae", "rlhf_advantages"])
def test_packed_layouts(backend: str, device: str, op: str, layout: str) -> None:
    view, dense = testing.with_layout(
        testing.FACTORIES[op]((41,), packed=True, device=device), layout
    )
    a, b = run(view, backend), run(dense, backend)
    assert all(same_bits(a[k], b[k]) for k in b)


@pytest.mark.parametrize("op", ["ppo_loss", "value_loss", "whiten"])
def test_rows_of_a_wider_buffer(kernel: str, device: str, op: str) -> None:
    """Rows that are dense but not adjacent, with and without the alignment of wide loads."""
    for dtype in FLOATS:
        call = testing.FACTORIES[op]((5, 12), dtype=dtype, device=device)
        want = run(call, kernel)
        for start in (4, 1):
            views = {}
            for name, x in call.tensors.items():
                wide = torch.full((5, 20), True, device=device).to(x.dtype)
                views[name] = wide[:, start : start + 12].copy_(x)
            got = run(call.replace(**views), kernel)
            assert all(same_bits(got[k], want[k]) for k in want), (dtype, start)


def test_logits_of_any_rank_and_order(backend: str, device: str) -> None:
    """(B, T, V) out of a (T, B, V) store, out of a wider head, and every second position."""
    call = testing.logprobs_call((2, 3, 4), 33, device=device)
    logits = call.tensors["logits"]
    wide = torch.full((2, 3, 8, 40), float("nan"), device=device)
    wide[:, :, ::2, 7:40] = logits
    views = [logits.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), wide[:, :, ::2, 7:]]
    want = run(call, backend)
    for view in views:
        got = run(call.replace(logits=view), backend)
        assert all(same_bits(got[k], want[k]) for k in want)


def test_misaligned_rows_of_an_odd_vocabulary(kernel: str, device: str) -> None:
    """Every row starts at another alignment; equal rows give equal bits."""
    for dtype in FLOATS:
        row = testing.logprobs_call((1,), 131, dtype=dtype, device=device, mask=None)
        call = testing.with_rows(row, torch.zeros(9, dtype=torch.long, device=device))
        for name, x in run(call, kernel).items():
            assert same_bits(x, x[:1].expand_as(x).contiguous()), (dtype, name)


@pytest.mark.case("X16")
@EVERY
def test_inputs_are_not_written(
    backend: str, device: str, op: str, options: dict[str, object]
) -> None:
    """Bytes and versions of every input are unchanged, forward and backward."""
    call = testing.FACTORIES[op](shape_of(op), device=device, **options)
    tensors = {**call.tensors, **{f"grad {k}": v for k, v in call.cotangents.items()}}
    before = {k: (v.clone(), v._version) for k, v in tensors.items()}
    run(call, backend)
    for name, x in tensors.items():
        assert same_bits(x, before[name][0]) and x._version == before[name][1], name


@pytest.mark.case("X16")
@pytest.mark.parametrize("op", ["token_logprobs", "ppo_loss", "value_loss"])
def test_a_second_backward_gives_the_same(backend: str, device: str, op: str) -> None:
    call = testing.FACTORIES[op](shape_of(op), device=device)
    leaf = {"token_logprobs": "logits", "ppo_loss": "logprobs", "value_loss": "values"}[op]
    x = call.tensors[leaf].clone().requires_grad_()
    out = testing.output(
        getattr(ppo_fast, op)(**call.replace(**{leaf: x}).tensors, **call.options, backend=backend)
    )
    total = sum((out[k] * v).sum() for k, v in call.cotangents.items())
    first = torch.autograd.grad(total, x, retain_graph=True)
    second = torch.autograd.grad(total, x)
    assert same_bits(first[0], second[0])


@pytest.mark.case("X17")
@pytest.mark.parametrize("op", ["token_logprobs", "ppo_loss", "value_loss"])
def test_double_backward_raises(kernel: str, device: str, op: str) -> None:
    """Gradients are once differentiable, never silent zeros."""
    call = testing.FACTORIES[op]((2, 5), device=device)
    leaf = {"token_logprobs": "logits", "ppo_loss": "logprobs", "value_loss": "values"}[op]
    x = call.tensors[leaf].clone().requires_grad_()
    out = testing.output(
        getattr(ppo_fast, op)(**call.replace(**{leaf: x}).tensors, **call.options, backend=kernel)
    )
    total = sum((out[k] * v).sum() for k, v in call.cotangents.items())
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad.sum() + x.sum()).backward()  # alone it would miss a gradient taken for constant


@pytest.mark.case("X14")
@pytest.mark.parametrize("op", ["ppo_loss", "value_loss"])
def test_constants_get_no_gradient(backend: str, device: str, op: str) -> None:
    """Gradients flow to logprobs, entropy and values only."""
    call = testing.FACTORIES[op]((3, 5), device=device)
    leaves = {
        k: v.clone().requires_grad_()
        for k, v in call.tensors.items()
        if v.is_floating_point() and k != "mask"
    }
    out = getattr(ppo_fast, op)(**call.replace(**leaves).tensors, **call.options, backend=backend)
    out.loss.backward()
    got = {k for k, v in leaves.items() if v.grad is not None}
    assert got == {"ppo_loss": {"logprobs", "entropy"}, "value_loss": {"values"}}[op]
    assert not out.stats.values.requires_grad


@pytest.mark.case("X14")
@pytest.mark.parametrize("op", ["ppo_loss", "value_loss", "gae", "rlhf_advantages", "whiten"])
def test_constants_alone_give_a_constant(backend: str, device: str, op: str) -> None:
    """Nothing differentiable requires grad, everything else does: the outputs do not."""
    call = testing.FACTORIES[op]((3, 5), device=device)
    fixed = testing.calls.DIFFERENTIABLE.get(op, ((), ()))[0]
    leaves = {
        k: v.clone().requires_grad_()
        for k, v in call.tensors.items()
        if v.is_floating_point() and k not in fixed
    }
    out = getattr(ppo_fast, op)(**call.replace(**leaves).tensors, **call.options, backend=backend)
    assert not any(x.requires_grad for x in testing.output(out).values())
