"""Backwards of the losses: saved gradients times a number, none of it where the number is 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ON_GPU, usable
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_fast
from ppo_fast import testing
from ppo_fast._boundary import calls

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Losses' inputs, and the leaves that they have gradients by.
LOSSES: list[tuple[Callable[..., testing.Call], tuple[str, ...]]] = [
    (testing.ppo_call, ("logprobs",)),
    (testing.value_call, ("values",)),
    (testing.logits_ppo_call, ("logits",)),
    (testing.linear_ppo_call, ("hidden", "weight")),
]


@pytest.fixture(params=ON_GPU)
def kernel(request: pytest.FixtureRequest) -> str:
    """The backends on which the host does not know the factor."""
    return usable(request.param)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in rows that lie apart and start anywhere."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    return wide.to(x.device)[..., 1 : 1 + x.shape[-1]].copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 3, 9), (2, 8200)])
@pytest.mark.parametrize("layout", [torch.clone, strided], ids=["contiguous", "strided"])
def test_every_element_is_rounded_once(
    kernel: str,
    device: str,
    layout: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """fp32 products, in place and beside; a factor stays wide where the gradients are narrow."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    grads = layout(x) if shape else x.clone()
    factor, scale = torch.tensor(1 / 3, device=device), torch.tensor(0.7, device=device)
    for second in (None, scale):
        product = factor if second is None else factor * second
        want = (x.float() * product).to(dtype)
        assert torch.equal(calls.scaled(kernel, grads, factor, second), want)
        there = layout(x) if shape else x.clone()
        calls.scaled_(kernel, there, factor, second)
        assert torch.equal(there, want)


def test_a_factor_of_one_writes_nothing_in_place(kernel: str, device: str) -> None:
    """A signalling NaN keeps its bits, which any product would change."""
    bits = torch.full((700,), 0x7F81, dtype=torch.int16, device=device)
    one, half = torch.ones((), device=device), torch.full((), 0.5, device=device)
    for factor, scale in ((one, None), (half, 2 * one)):
        grads = bits.clone().view(torch.bfloat16)
        calls.scaled_(kernel, grads, factor, scale)
        assert torch.equal(grads.view(torch.int16), bits)


class Passes(TorchDispatchMode):
    """Calls outside of the kernels that produce as many elements as the smallest gradient."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.names = least, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.name().startswith("ppo_fast::") and not func.is_view:
            sizes = [x.numel() for x in (out if isinstance(out, tuple) else (out,))]
            self.names += [func.name()] * (max(sizes) >= self.least)
        return out


@pytest.mark.parametrize("inputs, leaves", LOSSES)
def test_a_backward_makes_no_pass_over_the_gradients(
    kernel: str, device: str, inputs: Callable[..., testing.Call], leaves: tuple[str, ...]
) -> None:
    loss, xs = formed(kernel, inputs(shape=(3, 9), device=device), leaves)
    with Passes(min(x.numel() for x in xs)) as passes:
        torch.autograd.grad(loss, xs)
    assert passes.names == []


@pytest.mark.parametrize("inputs, leaves", LOSSES)
def test_a_kept_graph_keeps_its_gradients(
    kernel: str, device: str, inputs: Callable[..., testing.Call], leaves: tuple[str, ...]
) -> None:
    """Two factors in turn, the last of them in place: each result is its own product."""
    loss, xs = formed(kernel, inputs(shape=(3, 9), device=device), leaves)
    first = torch.autograd.grad(loss, xs, torch.full_like(loss, 3.0), retain_graph=True)
    kept = [x.clone() for x in first]
    zero = torch.autograd.grad(loss, xs, torch.zeros_like(loss), retain_graph=True)
    last = torch.autograd.grad(loss, xs, torch.full_like(loss, 0.75))
    assert all(x.eq(0).all() for x in zero)
    for x, before, quarter in zip(first, kept, last, strict=True):
        assert torch.equal(x, before)
        assert x.count_nonzero() and torch.equal(x, 4 * quarter)


def formed(
    kernel: str, call: testing.Call, leaves: tuple[str, ...]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of a call, and its leaves."""
    tensors = dict(call.tensors)
    for name in leaves:
        tensors[name] = tensors[name].detach().clone().requires_grad_()
    loss = getattr(ppo_fast, call.op)(**tensors, **call.options, backend=kernel).loss
    return loss, [tensors[name] for name in leaves]
