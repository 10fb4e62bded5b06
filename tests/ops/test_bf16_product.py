"""The head's products of bf16 operands on a CPU with bf16 dot products: error, bits, choice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from head_helpers import Allocations, short_chunks
from torch import Tensor

from ppo_fast import _backend, _ext, testing
from ppo_fast._boundary import calls
from ppo_fast.testing import DIVERGENCES, HEADS, linear_call, run, same_bits

BF16, FLOATS = torch.bfloat16, (torch.bfloat16, torch.float32)
TINY, UNIT = 2.0**-126, 2.0**-24
# Whole and broken tiles (8 x 48), vectors (16), pairs, blocks (512 x 384, 256 of K), and nothing.
SHAPES = [
    (1, 1, 1),
    (8, 2, 48),
    (17, 33, 49),
    (5, 513, 97),
    (16, 1030, 15),
    (530, 7, 400),
    (3, 0, 5),
    (0, 4, 5),
]
LAYOUTS = ("rows", "columns", "neither")
HEAD_OPS = sorted((HEADS | DIVERGENCES).keys() - {"logits_ppo_loss", "divergence"})


@pytest.fixture(autouse=True)
def dot() -> Iterator[None]:
    """The instruction set with bf16 dot products, or a skip."""
    if _ext.load() is not None:
        pytest.skip(f"backend 'cpu': {_ext.load()}")
    module = _ext.module()
    before = module.build_info()["isa"]
    if not module.build_info()["bf16_dot"]:
        pytest.skip("this CPU has no AVX512-BF16, or PPO_FAST_ISA is not avx512")
    yield
    module.set_isa(before)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with contiguous rows, contiguous columns, or neither."""
    if layout == "columns":
        return x.t().contiguous().t()
    return x if layout == "rows" else torch.stack([x, x], 2).flatten(1)[:, ::2]


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    m, k, n = shape
    a, b = torch.randn(m, k, generator=g).to(dtype), torch.randn(k, n, generator=g).to(BF16)
    return a, b, torch.randn(m, n, generator=g)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a · b, or out + a · b."""
    to = torch.full((a.shape[0], b.shape[1]), math.nan) if out is None else out.clone()
    calls.bf16_product_(a, b, to, add=out is not None)
    return to


def bound(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """Of exact products, added in blocks of 256 along K, and an fp32 operand as two bf16 numbers.

    n u Σ|a||b| with u = 2**-24 and n the sums that a product goes through (Higham 2002, section
    4.2), and what two numbers lack, 2**-16 |a|. Subnormal operands and sums count as 0.
    """
    parts, depth = 1 if a.dtype == BF16 else 2, a.shape[1]
    sums = min(depth, 256) + parts * math.ceil(depth / 256) + 1
    lost = 0.0 if parts == 1 else 2.0**-16
    x, y = a.double().abs(), b.double().abs()
    size = x @ y
    added = size if out is None else size + out.double().abs()
    flushed = TINY * (x.sum(1, keepdim=True) + parts * y.sum(0) + parts * depth + sums)
    return 1.01 * (sums * UNIT * added * (1 + 2.0**-8) + lost * size + flushed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_bound_of_a_sum_in_order(
    shape: tuple[int, int, int], dtype: torch.dtype, layout: str
) -> None:
    a, b, more = operands(shape, dtype)
    exact = a.double() @ b.double()
    for out in (None, more):
        got = product(laid_out(a, layout), laid_out(b, layout), out)
        want = exact if out is None else exact + out.double()
        assert bool(((got.double() - want).abs() <= bound(a, b, out)).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_of_all_magnitudes(dtype: torch.dtype) -> None:
    """From subnormal ones, which count as 0, up to products of 2**120."""
    a, b, _ = operands((9, 64, 50), dtype)
    scale = torch.tensor([-140.0, -126.0, -64.0, 0.0, 60.0]).exp2()
    a = (a * scale[torch.arange(64) % 5]).to(dtype)
    b = (b * scale[torch.arange(64) // 5 % 5][:, None]).to(BF16)
    got, exact = product(a, b), a.double() @ b.double()
    assert bool(((got.double() - exact).abs() <= bound(a, b, None)).all())
    assert bool((product(a[:, :1], b[:1]) == 0).all())  # subnormal times subnormal


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinities_and_nan_are_those_of_an_fp32_product(dtype: torch.dtype, layout: str) -> None:
    """An fp32 a, whose two numbers may be of two signs, gives NaN beside an infinity or overflow
    that b brings: what is finite is the same."""
    a, b, _ = operands((20, 34, 60), dtype)
    a[1, 3], a[4, 33], a[9, 0], a[10, 2] = math.nan, math.inf, -math.inf, 3e38
    b[3, 5], b[3, 6], b[33, 7], b[2, 8] = math.inf, math.nan, 0.0, 3e38
    got = product(laid_out(a, layout), laid_out(b, layout))
    want = a.float() @ b.float()
    assert int((~want.isfinite()).sum()) > 150
    assert torch.equal(got.isfinite(), want.isfinite())
    of_b = torch.tensor([5, 8]) if dtype == torch.float32 else torch.tensor([], dtype=torch.long)
    got, want = (x.index_fill(1, of_b, 0.0) for x in (got, want))
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[want.isinf()], want[want.isinf()])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-2], ids=str)
def test_an_element_has_the_same_bits_anywhere(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """In any layout, for any number of threads, beside any other rows and columns."""
    a, b, _ = operands(shape, dtype)
    want = product(a, b)
    for layout in LAYOUTS[1:]:
        assert torch.equal(product(laid_out(a, layout), laid_out(b, layout)), want)
    before = torch.get_num_threads()
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            assert torch.equal(product(a, b), want)
    finally:
        torch.set_num_threads(before)
    other = torch.full_like(a, math.nan)
    other[-1] = a[-1]
    assert torch.equal(product(other, b)[-1], want[-1])
    assert torch.equal(product(a[-1:], b[:, -1:]), want[-1:, -1:])


def test_rows_of_the_result_may_be_far_apart() -> None:
    a, b, _ = operands((9, 12, 50), BF16)
    whole = torch.full((9, 64), 7.0)
    calls.bf16_product_(a, b, whole[:, :50], add=False)
    assert torch.equal(whole[:, :50], product(a, b)) and bool((whole[:, 50:] == 7.0).all())


def test_refusals() -> None:
    a, b, out = operands((4, 6, 5), BF16)
    for wrong, words in (
        ((a, b[1:], out), r"a must be \(M, K\)"),
        ((a, b, out[1:]), r"out \(M, N\)"),
        ((a.half(), b, out), "bfloat16 or float32"),
        ((a, b.float(), out), "b bfloat16"),
        ((a, b, out.bfloat16()), "out must be float32"),
        ((a, b, out.t().contiguous().t()), "contiguous rows"),
    ):
        with pytest.raises(RuntimeError, match=words):
            calls.bf16_product_(*wrong, add=False)
    _ext.module().set_isa("avx2")
    with pytest.raises(RuntimeError, match="no AVX512-BF16"):
        calls.bf16_product_(a, b, out, add=False)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
@pytest.mark.parametrize("op", HEAD_OPS)
def test_within_budget_with_and_without(
    monkeypatch: pytest.MonkeyPatch, op: str, isa: str
) -> None:
    """Each linear op on bf16 operands; only avx512 has the dot products, and uses them."""
    _ext.module().set_isa(isa)
    short_chunks(monkeypatch)
    count, inner = [0], calls.bf16_product_

    def counted(*args: Any, **options: Any) -> None:
        count[0] += 1
        inner(*args, **options)

    monkeypatch.setattr(calls, "bf16_product_", counted)
    testing.assert_agrees((HEADS | DIVERGENCES)[op]((3, 11), dtype=BF16), "cpu")
    assert (count[0] > 0) == (isa == "avx512") == _backend.bf16_dot()


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_no_fp32_copy_of_the_weight(isa: str) -> None:
    """Without dot products each product with the weight makes one."""
    _ext.module().set_isa(isa)
    with Allocations() as made:
        run(linear_call((64,), 1009, 24, dtype=BF16, mask=None), "cpu")
    wide = made.dtypes[torch.Size((1009, 24))][torch.float32]
    assert wide == 1 if isa == "avx512" else wide > 1  # the gradient's sum is one


def test_a_bf16_loss_has_the_same_bits_for_any_number_of_threads() -> None:
    call, before = linear_call((70,), 1009, 65, dtype=BF16), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(call, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(x, r[k]) for r in results[1:] for k, x in results[0].items())
