"""Memory of a call: outputs and workspace are allocated, nothing is kept, own slots written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import shape_of, usable
from torch.profiler import ProfilerActivity, profile

import ppo_fast
from ppo_fast import testing
from ppo_fast.testing import Call, run

OPS = {**testing.FACTORIES, "logits_ppo_loss": testing.HEADS["logits_ppo_loss"]}
EVERY = pytest.mark.parametrize("op", OPS)
NUMBER = 4  # bytes of fp32


def memory(call: Callable[[], Any]) -> list[int]:
    """Bytes that the CPU's allocator gives (positive) and takes back while `call` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return [event.self_cpu_memory_usage for event in profiler.events()]


def allocated(call: Callable[[], Any]) -> int:
    """Bytes given, each event's net of what the same event takes back."""
    return sum(size for size in memory(call) if size > 0)


def on_the_host(kernel: str, device: str) -> None:
    if device == "cuda":
        pytest.skip(
            f"{kernel} allocates on the GPU here; tests/backends/test_gpu.py asks its allocator"
        )


@pytest.mark.case("X15")
@pytest.mark.parametrize("op", testing.FACTORIES)
@pytest.mark.parametrize("kind", testing.LAYOUTS)
def test_no_layout_is_copied(kernel: str, device: str, op: str, kind: str) -> None:
    """A view allocates byte for byte as much as contiguous tensors of the same numbers."""
    on_the_host(kernel, device)
    view, dense = testing.with_layout(OPS[op](shape_of(op)), kind)
    run(view, kernel), run(dense, kernel)  # what lives as long as the process is made here
    assert allocated(lambda: run(view, kernel)) == allocated(lambda: run(dense, kernel)) > 0


@pytest.mark.case("X15")
@pytest.mark.parametrize("kind", testing.LAYOUTS)
def test_no_layout_of_logits_is_copied(kernel: str, device: str, kind: str) -> None:
    """The weights may be laid out anew, two fp64 numbers a token; the logits are not."""
    on_the_host(kernel, device)
    view, dense = testing.with_layout(testing.logits_ppo_call((2, 3), 130), kind)
    run(view, kernel), run(dense, kernel)
    more = allocated(lambda: run(view, kernel)) - allocated(lambda: run(dense, kernel))
    assert abs(more) <= 2 * 8 * 6 < view.tensors["logits"].numel() * NUMBER


def bytes_of(out: dict[str, torch.Tensor], prefix: str = "") -> int:
    return sum(x.numel() * x.element_size() for k, x in out.items() if k.startswith(prefix))


def workspace(call: Call, out: dict[str, torch.Tensor]) -> int:
    """Declared: a row's maximum and log-sum, the moments that whiten, gradients unscaled."""
    if call.op == "token_logprobs":
        return 2 * NUMBER * out["logprobs"].numel()
    if call.op == "whiten":
        return 3 * 8
    if call.op in ("ppo_loss", "value_loss"):
        scale, product = NUMBER, NUMBER
        return bytes_of(out, "grad_") + scale + product
    return 0


@pytest.mark.case("I7")
@pytest.mark.parametrize("op", testing.FACTORIES)
def test_outputs_and_declared_workspace(op: str) -> None:
    """Forward and backward on the CPU allocate these to the byte."""
    kernel = usable("cpu")
    call = testing.FACTORIES[op]((16, 24))
    out = run(call, kernel)
    assert allocated(lambda: run(call, kernel)) == bytes_of(out) + workspace(call, out)


@pytest.mark.case("I7")
@EVERY
def test_calls_keep_nothing(op: str) -> None:
    """Twice the calls leave no byte more behind, once their outputs are dropped."""
    kernel = usable("cpu")  # Triton's interpreter leaves cycles to the collector
    call = OPS[op]((2, 3))
    for _ in range(10):
        run(call, kernel)

    def kept(calls: int) -> int:
        def often() -> None:
            for _ in range(calls):
                run(call, kernel)

        sizes = memory(often)
        assert sum(x for x in sizes if x > 0) > calls
        return sum(sizes)

    assert kept(50) == kept(25)


@pytest.mark.case("I14")
@pytest.mark.parametrize("vocab", [5, 37, 130])
@pytest.mark.parametrize("op", ["token_logprobs", "logits_ppo_loss"])
def test_a_gradient_in_place_stays_in_its_rows(
    kernel: str, device: str, op: str, vocab: int
) -> None:
    """Canaries before, between and behind the rows are unchanged."""
    call = OPS[op]((2, 3), vocab, device=device)
    want = run(call, kernel)["grad_logits"]
    leaf = torch.full((2, 3, vocab + 6), math.nan, device=device, requires_grad=True)
    buffer = leaf.clone()  # a leaf may not be written over
    with torch.no_grad():
        buffer[..., :3], buffer[..., -3:] = 7.25, -7.25
        buffer[..., 3:-3] = call.tensors["logits"]
    given = call.replace(logits=buffer[..., 3:-3])
    option = {"inplace": True} if op == "logits_ppo_loss" else {"inplace_backward": True}
    out = testing.output(
        getattr(ppo_fast, op)(**given.tensors, **given.options, **option, backend=kernel)
    )
    sum((out[k] * v).sum() for k, v in call.cotangents.items()).backward()
    held = buffer.detach()
    assert bool((held[..., :3] == 7.25).all()) and bool((held[..., -3:] == -7.25).all())
    assert testing.same_bits(held[..., 3:-3], want)
