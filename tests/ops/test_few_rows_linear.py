"""The linear layer of a few rows: its error, a row's bits beside other rows, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import ppo_fast

# Whole and broken tiles of rows, of the weight's rows (12) and of K (16).
SHAPES = [(1, 1, 1), (16, 12, 16), (17, 25, 33), (5, 97, 130), (33, 49, 7), (50, 13, 64)]


def inputs(rows: int, v: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=g) for shape in ((rows, k), (v, k), (v,)))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_bound_of_a_sum_in_order(isa: str, shape: tuple[int, int, int]) -> None:
    """K products and sums in order, then the bias: at most (K + 2) u Σ|x||w|, u = 2**-24
    (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1)."""
    x, w, b = inputs(*shape)
    for bias in (None, b):
        got = ppo_fast.few_rows_linear(x, w, bias, backend="cpu")
        assert got.is_contiguous() and got.dtype == torch.float32
        wide = None if bias is None else bias.double()
        size = linear(x.double().abs(), w.double().abs(), None if wide is None else wide.abs())
        error = (got.double() - linear(x.double(), w.double(), wide)).abs()
        assert bool((error <= 1.01 * (shape[2] + 2) * 2**-24 * size).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_the_same_bits_beside_any_others(isa: str, shape: tuple[int, int, int]) -> None:
    x, w, b = inputs(*shape)
    whole = ppo_fast.few_rows_linear(x, w, b, backend="cpu")
    for row in {0, shape[0] // 2, shape[0] - 1}:
        assert torch.equal(ppo_fast.few_rows_linear(x[row], w, b, backend="cpu"), whole[row])
    other = torch.full_like(x, float("nan"))
    other[-1] = x[-1]
    assert torch.equal(ppo_fast.few_rows_linear(other, w, b, backend="cpu")[-1], whole[-1])


def test_strides_leading_dimensions_and_threads_change_no_bit() -> None:
    x, w, b = inputs(6, 200, 40)
    want = ppo_fast.few_rows_linear(x, w, b, backend="cpu")
    got = ppo_fast.few_rows_linear(
        x.t().contiguous().t().unflatten(0, (2, 3)),
        torch.randn(200, 77)[:, :40].copy_(w),
        torch.stack([b, b], 1)[:, 0],
    )
    assert got.shape == (2, 3, 200) and torch.equal(got.view(6, 200), want)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ppo_fast.few_rows_linear(x, w, b, backend="cpu"), want)
    finally:
        torch.set_num_threads(before)
    empty = ppo_fast.few_rows_linear(x[:0], w, b, backend="cpu")
    assert empty.shape == (0, 200)


def test_the_result_is_a_constant_on_every_backend() -> None:
    x, w, b = (t.requires_grad_() for t in inputs(3, 5, 4))
    for backend in ("cpu", "reference"):
        assert not ppo_fast.few_rows_linear(x, w, b, backend=backend).requires_grad


X, W, B = inputs(3, 5, 4)
REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
    (TypeError, "x must be float32, got torch.float64", {"x": X.double()}),
    (TypeError, "weight must be float32, got torch.bfloat16", {"weight": W.bfloat16()}),
    (TypeError, "bias must be float32, got torch.float64", {"bias": B.double()}),
    (ValueError, r"x must have shape \(..., K\) = \(..., 4\), got \(3, 3\)", {"x": X[:, :3]}),
    (ValueError, r"weight must be \(V, K\) with contiguous rows, got", {"weight": W[:, ::2]}),
    (ValueError, r"weight must be \(V, K\) with contiguous rows, got \(4,\)", {"weight": W[0]}),
    (ValueError, r"bias must have shape \(V,\) = \(5,\), got \(4,\)", {"bias": B[:4]}),
    (ValueError, "x must be on cpu, got meta", {"x": X.to("meta")}),
    (ValueError, "backend must be one of reference, cpu, triton, cuda, got 'x'", {"backend": "x"}),
]


@pytest.mark.parametrize("kind, words, change", REFUSED, ids=[row[1][:40] for row in REFUSED])
def test_refusals(kind: type[Exception], words: str, change: dict[str, Any]) -> None:
    with pytest.raises(kind, match=f"few_rows_linear: {words}"):
        ppo_fast.few_rows_linear(**({"x": X, "weight": W, "bias": B} | change))


def test_a_backend_without_the_op_is_refused_by_name() -> None:
    if ppo_fast.backends()["triton"] is not None:
        pytest.skip("Triton is not usable here")
    with pytest.raises(ValueError, match="backend must be one of reference, cpu, got 'triton'"):
        ppo_fast.few_rows_linear(X, W, B, backend="triton")
