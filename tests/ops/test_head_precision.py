"""The head's products are exact whatever the process has set for its own, and leave that alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ppo_fast.ops import gemm
from ppo_fast.ops.exact import exact_products
from ppo_fast.testing import DIVERGENCES, HEADS, linear_call, run, same_bits

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
HOST = torch.device("cpu")


def now() -> tuple[Any, ...]:
    sums = (
        CUDA.allow_bf16_reduced_precision_reduction,
        CUDA.allow_fp16_reduced_precision_reduction,
    )
    return CUDA.fp32_precision, CPU.fp32_precision, *sums


def by_function() -> None:
    torch.set_float32_matmul_precision("medium")


def by_operation() -> None:
    CUDA.fp32_precision, CPU.fp32_precision = "tf32", "bf16"


def by_process() -> None:
    CUDA.fp32_precision = CPU.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"


@pytest.fixture(params=[by_function, by_operation, by_process])
def lowered(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """A process that has lowered its precision, in each of PyTorch's ways."""
    request.param()
    yield request.param
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def test_inside_nothing_is_rounded_and_outside_all_is_as_before(lowered: Any) -> None:
    before = now()
    assert "tf32" in before and True in before
    with exact_products(HOST):
        assert not {"tf32", "bf16", True} & set(now())
        with exact_products(HOST):
            pass
        assert not {"tf32", "bf16", True} & set(now())
    assert now() == before


def test_an_inherited_setting_is_inherited_again() -> None:
    try:
        by_process()
        with exact_products(HOST):
            pass
        torch.backends.fp32_precision = "ieee"
        assert CUDA.fp32_precision == CPU.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"


def test_threads_that_overlap_restore_what_was_there_first(lowered: Any) -> None:
    before = now()
    inside, leave, seen = threading.Event(), threading.Event(), list[Any]()

    def other() -> None:
        with exact_products(HOST):
            inside.set()
            leave.wait(60)
            seen.append(now())

    thread = threading.Thread(target=other)
    with exact_products(HOST):
        thread.start()
        assert inside.wait(60)
    leave.set()
    thread.join()
    assert not {"tf32", "bf16", True} & set(seen[0]) and now() == before


def test_an_error_inside_restores(lowered: Any) -> None:
    before = now()
    with pytest.raises(KeyError), exact_products(HOST):
        raise KeyError
    assert now() == before


def test_a_head_s_products_run_inside(monkeypatch: pytest.MonkeyPatch, lowered: Any) -> None:
    call, found = linear_call((3, 5)), set[Any]()
    for name in ("logits_into", "hidden_gradient", "add_weight_gradient"):
        product = getattr(gemm, name)

        def watched(*args: Any, product: Any = product, **options: Any) -> Any:
            found.update(now())
            return product(*args, **options)

        monkeypatch.setattr(gemm, name, watched)
    out = run(call, "cpu")
    assert found and not {"tf32", "bf16", True} & found
    torch.set_float32_matmul_precision("highest")
    assert all(same_bits(x, out[k]) for k, x in run(call, "cpu").items())


HEAD_OPS = (HEADS | DIVERGENCES).keys() - {"logits_ppo_loss", "divergence"}


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("op", sorted(HEAD_OPS))
def test_autocast_rounds_the_inputs_alone(name: str, op: str) -> None:
    """Within it, the results are those of bf16 hidden states and weights outside of it."""
    call = (HEADS | DIVERGENCES)[op]((2, 3))._replace(cotangents={})
    rounded = {
        k: x.bfloat16() for k, x in call.tensors.items() if k.endswith(("hidden", "weight"))
    }
    want = run(call.replace(**rounded), name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(call, name)
    assert all(same_bits(got[k], want[k]) for k in want)
