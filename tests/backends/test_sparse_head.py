"""CPU kernels of supports and of the sparse head: pairs (row, id), on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_fast import testing
from ppo_fast._boundary import calls, schema
from ppo_fast._boundary.options import Pairs, Scoring, Softmax

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
V = 23
ABSENT, WRONG = -1, V + 3
NAN, INF = float("nan"), float("inf")
SEGMENT = 32768  # kSegment of csrc/cpu/softmax/softmax.h
MASKED, BROKEN = 5, 9  # rows of `batch`
pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of operands."""
    return request.param


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def pairs_of(rows: list[list[int]], mask: Tensor | None = None) -> Pairs:
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    ids = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
    return Pairs(ids, ends, torch.ones(len(rows), dtype=torch.bool) if mask is None else mask)


def batch() -> Pairs:
    """A row of each count from 1 to V + 1: with ids twice, absent ones, a masked, a wrong one."""
    g = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, V, (k,), generator=g).tolist() for k in range(1, V + 2)]
    for row in rows[3::4]:
        row[-1] = ABSENT
    for row in rows[6::5]:
        row[1:4] = [row[0]] * 3
    rows[MASKED][2] = rows[BROKEN][4] = WRONG
    mask = torch.ones(len(rows), dtype=torch.bool)
    mask[MASKED] = False
    return pairs_of(rows, mask)


def row_of_pairs(pairs: Pairs) -> Tensor:
    return torch.arange(len(pairs.mask)).repeat_interleave(pairs.offsets.diff())


def live_pairs(pairs: Pairs) -> Tensor:
    return pairs.mask[row_of_pairs(pairs)]


def in_vocabulary(pairs: Pairs) -> Tensor:
    return (pairs.ids >= 0) & (pairs.ids < V)


def rows_from(pairs: Pairs, order: list[int]) -> tuple[Pairs, Tensor]:
    """The pairs of some rows, and the places of those among all."""
    spans = [range(int(pairs.offsets[r]), int(pairs.offsets[r + 1])) for r in order]
    places = torch.tensor([i for span in spans for i in span])
    rows = [pairs.ids[span.start : span.stop].tolist() for span in spans]
    return pairs_of(rows, pairs.mask[order]), places


def hidden_of(pairs: Pairs, h: int, dtype: torch.dtype) -> Tensor:
    """Random, NaN in masked rows."""
    x = randn(len(pairs.mask), h, seed=2, dtype=dtype)
    x[~pairs.mask] = NAN
    return x


def sorted_by_id(pairs: Pairs, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient and row of each pair in the order of the ids, and where each id begins."""
    ids, order = pairs.ids.sort(stable=True)
    starts = torch.searchsorted(ids, torch.arange(V + 1, dtype=torch.int32))
    return dz[order], row_of_pairs(pairs)[order].int(), starts


def assert_sum(got: Tensor, want: Tensor, size: Tensor, terms: int) -> None:
    """Within (n + 2) u Σ|terms| of a sum in any order, of products, rounded to what is stored
    (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1)."""
    # The bound's own sums are rounded too where the kernel computes in fp64.
    twice = 2 if got.dtype == torch.float64 else 1
    testing.assert_within_budget(got, want, condition=size, ops=twice * (terms + 2) / 2)


WIDTHS = [0, 1, 7, 16, 33, 64, 131]


@pytest.mark.parametrize("h", WIDTHS)
def test_logits_of_pairs(dtype: torch.dtype, h: int) -> None:
    pairs = batch()
    x, w = hidden_of(pairs, h, dtype), randn(V, h, seed=3, dtype=dtype)
    z = calls.sparse_logits("cpu", x, w, pairs)
    assert z.dtype == wide(dtype)
    left, right = x.double()[row_of_pairs(pairs)], w.double()[pairs.ids.clamp(0, V - 1).long()]
    want = (left * right).sum(1)
    want[pairs.ids == ABSENT], want[pairs.ids == WRONG] = -INF, NAN
    size = (left * right).abs().sum(1)
    live = live_pairs(pairs)
    assert_sum(z[live], want[live], size[live], h)


@pytest.mark.parametrize("h", WIDTHS)
def test_gradient_by_the_hidden_states(dtype: torch.dtype, h: int) -> None:
    pairs = batch()
    w, dz = randn(V, h, seed=3, dtype=dtype), randn(len(pairs.ids), seed=4, dtype=wide(dtype))
    dz[3] = 0  # of the third row, which alone has the id
    w[pairs.ids[3].long()] = NAN
    rows = row_of_pairs(pairs)
    taken = pairs.ids == pairs.ids[3]
    pairs.ids[taken & (torch.arange(len(dz)) != 3)] = ABSENT
    known = in_vocabulary(pairs) & live_pairs(pairs) & (dz != 0)
    part = torch.where(
        known[:, None], dz.double()[:, None] * w.double()[pairs.ids.clamp(0, V - 1).long()], 0
    )
    zeros = torch.zeros(len(pairs.mask), h, dtype=torch.float64)
    want, size = zeros.index_add(0, rows, part), zeros.index_add(0, rows, part.abs())
    want[BROKEN] = NAN
    got = calls.sparse_hidden_grad("cpu", dz, w, pairs)
    assert got.dtype == dtype and bool((got[MASKED] == 0).all())
    assert_sum(got, want, size, V + 1)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("h", WIDTHS)
def test_gradient_by_the_weight_and_the_bias(
    dtype: torch.dtype, h: int, index: torch.dtype
) -> None:
    pairs = batch()
    pairs.ids[pairs.ids == 11] = ABSENT  # an id that no row keeps
    dz = torch.where(live_pairs(pairs), randn(len(pairs.ids), seed=4, dtype=wide(dtype)), 0)
    x = hidden_of(pairs, h, dtype)
    part, rows, starts = sorted_by_id(pairs, dz)
    dw, db = calls.sparse_weight_grad("cpu", part, rows.to(index), starts, x)
    assert dw.dtype == dtype and db.dtype == wide(dtype)
    known = in_vocabulary(pairs) & live_pairs(pairs)
    ids, rows = pairs.ids[known].long(), row_of_pairs(pairs)[known]
    part = dz[known].double()[:, None] * x.double()[rows]
    zeros = torch.zeros(V, h, dtype=torch.float64)
    want, size = zeros.index_add(0, ids, part), zeros.index_add(0, ids, part.abs())
    assert_sum(dw, want, size, len(dz))
    of_bias = zeros.new_zeros(V).index_add(0, ids, dz[known].double())
    assert_sum(
        db, of_bias, zeros.new_zeros(V).index_add(0, ids, dz[known].double().abs()), len(dz)
    )
    assert bool((dw[11] == 0).all()) and db[11] == 0


def softmax_rows() -> tuple[Tensor, Pairs, Tensor]:
    """Logits, pairs and temperatures of rows with one pair, many, -inf, NaN, and masked ones."""
    counts = [1, 2, 3, 17, 300, SEGMENT + 5, 4, 4, 4, 4]
    pairs = pairs_of([[0] * k for k in counts])
    z = randn(len(pairs.ids), seed=5) * 4
    first = pairs.offsets.tolist()
    z[first[3] + 2] = -INF  # absent
    z[first[6]] = -INF  # the token's own
    z[first[7] : first[8]] = -INF
    z[first[8] + 1] = z[first[9]] = NAN
    pairs.mask[9] = False
    return z, pairs, randn(len(counts), seed=6).abs() + 0.5


def alone(z: Tensor, pairs: Pairs, r: int) -> tuple[Tensor, Any]:
    """A row's pairs as one row of logits with its token in column 0, and how it is scored."""
    row = z[pairs.offsets[r] : pairs.offsets[r + 1]][None]
    return row, lambda t: Scoring(torch.zeros(1, dtype=torch.int64), None, t, 0.7, -100)


@pytest.mark.parametrize("per_row", [False, True])
def test_softmax_over_pairs_is_that_of_logits_to_the_bit(
    dtype: torch.dtype, per_row: bool
) -> None:
    z, pairs, temperature = softmax_rows()
    z = z.to(dtype)
    tensor = temperature if per_row else None
    scoring = Scoring(torch.zeros(0), None, tensor, 0.7, -100)
    got = calls.support_fwd("cpu", z, pairs, scoring)
    g, h = randn(len(pairs.mask), seed=7).to(z.dtype), randn(len(pairs.mask), seed=8).to(z.dtype)
    both = [(g, h), (g, None), (None, h)]
    dz = [calls.support_bwd("cpu", z, pairs, scoring, got, *grads) for grads in both]
    for r, live in enumerate(pairs.mask.tolist()):
        mine = slice(int(pairs.offsets[r]), int(pairs.offsets[r + 1]))
        if not live:
            assert [float(x[r]) for x in got] == [0, 0, 0, 0]
            assert all(bool((x[mine] == 0).all()) for x in dz)
            continue
        row, score = alone(z, pairs, r)
        s = score(None if tensor is None else tensor[r : r + 1])
        want = calls.logprobs_fwd("cpu", row, s)
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x[r : r + 1].view(torch.uint8), y.view(torch.uint8))
        for x, grads in zip(dz, both, strict=True):
            of = [None if y is None else y[r : r + 1] for y in grads]
            of_row = calls.logprobs_bwd("cpu", row, s, Softmax(*want), *of)
            assert x.dtype == wide(dtype)
            assert torch.equal(x[mine].to(dtype), of_row[0]) or bool(of_row.isnan().all())
            assert torch.equal(x[mine].isnan(), of_row[0].isnan())


def test_softmax_over_pairs_in_fp64() -> None:
    z, pairs, temperature = softmax_rows()
    s = Scoring(torch.zeros(0), None, temperature, 1.0, -100)
    got = calls.support_fwd("cpu", z, pairs, s)
    g, h = randn(len(pairs.mask), seed=7), randn(len(pairs.mask), seed=8)
    dz = calls.support_bwd("cpu", z, pairs, s, got, g, h)
    for r in range(6):
        mine = slice(int(pairs.offsets[r]), int(pairs.offsets[r + 1]))
        leaf = z[mine].clone().requires_grad_()
        logs = torch.log_softmax(leaf / temperature[r], 0)
        entropy = -(logs.exp() * torch.where(logs.isinf(), 0, logs)).sum()
        (want,) = torch.autograd.grad(g[r] * logs[0] + h[r] * entropy, leaf)
        torch.testing.assert_close(got.logprobs[r], logs[0].detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.entropy[r], entropy.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dz[mine], want, rtol=1e-11, atol=1e-13)


def products(x: Tensor, w: Tensor, pairs: Pairs, dz: Tensor) -> tuple[Tensor, ...]:
    """All three, logits of masked rows as 0."""
    z = calls.sparse_logits("cpu", x, w, pairs)
    z = torch.where(live_pairs(pairs), z, 0)
    dx = calls.sparse_hidden_grad("cpu", dz, w, pairs)
    return z, dx, *calls.sparse_weight_grad("cpu", *sorted_by_id(pairs, dz), x)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    a, b = (t.reshape(-1).view(torch.uint8) for t in (got, want))
    assert torch.equal(a, b)


def test_a_row_has_the_same_bits_beside_any_others(dtype: torch.dtype) -> None:
    pairs, h = batch(), 45
    x, w = hidden_of(pairs, h, dtype), randn(V, h, seed=3, dtype=dtype)
    dz = randn(len(pairs.ids), seed=4, dtype=wide(dtype))
    z, dx, *_ = products(x, w, pairs, dz)
    n = len(pairs.mask)
    for order in ([0], [n - 1], [7, 2], list(range(n))[::-1], [3, BROKEN, 3, MASKED]):
        some, places = rows_from(pairs, order)
        part_z, part_dx, *_ = products(x[order], w, some, dz[places])
        assert_same_bits(part_z, z[places])
        assert_same_bits(part_dx, dx[order])


def test_an_id_has_the_same_bits_beside_any_others(dtype: torch.dtype) -> None:
    pairs, h = batch(), 45
    x = hidden_of(pairs, h, dtype)
    dz = torch.where(live_pairs(pairs), randn(len(pairs.ids), seed=4, dtype=wide(dtype)), 0)
    want = calls.sparse_weight_grad("cpu", *sorted_by_id(pairs, dz), x)
    for one in range(V):
        alone = torch.where(pairs.ids == one, pairs.ids, ABSENT)
        got = calls.sparse_weight_grad("cpu", *sorted_by_id(pairs._replace(ids=alone), dz), x)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a[one], b[one])


def test_strides_and_alignment_change_no_bit(dtype: torch.dtype) -> None:
    pairs, h = batch(), 45
    x, w = hidden_of(pairs, h, dtype), randn(V, h, seed=3, dtype=dtype)
    dz = randn(len(pairs.ids), seed=4, dtype=wide(dtype))
    dz[~live_pairs(pairs)] = 0
    want = products(x, w, pairs, dz)
    wider = [torch.full((len(t), h + 9), NAN, dtype=dtype) for t in (x, w)]
    for start in (1, 3):
        for t, room in zip((x, w), wider, strict=True):
            room[:, start : start + h] = t
        left, right = (room[:, start : start + h] for room in wider)
        got = products(left, right, pairs, dz)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)
    shifted = Pairs(*(torch.cat([t[:1], t])[1:] for t in pairs))
    room = torch.cat([dz[:1], dz])[1:]
    for a, b in zip(products(x, w, shifted, room), want, strict=True):
        assert_same_bits(a, b)


def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    """Rows of very different counts, over and over, so that every thread has a share."""
    some = batch()
    many = [r for r in range(len(some.mask)) if r != BROKEN] * 40
    pairs, _ = rows_from(some, many)
    h = 300
    x, w = hidden_of(pairs, h, dtype), randn(V, h, seed=3, dtype=dtype)
    dz = torch.where(live_pairs(pairs), randn(len(pairs.ids), seed=4, dtype=wide(dtype)), 0)
    s = Scoring(torch.zeros(0), None, None, 1.0, -100)

    def results() -> tuple[Tensor, ...]:
        z, *grads = products(x, w, pairs, dz)
        over = calls.support_fwd("cpu", z, pairs, s)
        back = calls.support_bwd("cpu", z, pairs, s, over, over.logprobs, over.entropy)
        return z, *grads, *over, back

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = results()
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for a, b in zip(results(), want, strict=True):
                assert_same_bits(a, b)
    finally:
        torch.set_num_threads(before)


def refused(op: str, words: str, change: Callable[[list[Any]], None]) -> Any:
    return pytest.param(op, words, change, id=f"{op}-{words[:30]}")


def at(i: int, value: Any) -> Callable[[list[Any]], None]:
    def change(args: list[Any]) -> None:
        args[i] = value(args[i]) if callable(value) else value

    return change


REFUSED = [
    refused("sparse_logits", "agree in dtype and H", at(0, lambda x: x.double())),
    refused("sparse_logits", "agree in dtype and H", at(0, lambda x: x[:, :3])),
    refused("sparse_logits", "agree in dtype and H", at(0, lambda x: x[:2])),
    refused("sparse_logits", "weight must be a float matrix", at(1, lambda w: w[:, ::2])),
    refused("sparse_logits", "weight must be a float matrix", at(1, lambda w: w.int())),
    refused("sparse_logits", "ids must be contiguous int32", at(2, lambda i: i.long())),
    refused("sparse_logits", "offsets must be contiguous int64", at(3, lambda o: o.int())),
    refused("sparse_logits", "offsets must rise within", at(3, lambda o: o.flip(0))),
    refused("sparse_logits", "offsets must rise within", at(3, lambda o: o + 1)),
    refused("sparse_logits", r"mask must be \(N,\)", at(4, lambda m: m[:2])),
    refused("sparse_hidden_grad", "grad_logits must be contiguous", at(0, lambda g: g[1:])),
    refused("sparse_hidden_grad", "grad_logits must be contiguous", at(0, lambda g: g.double())),
    refused("sparse_weight_grad", "starts must rise within", at(2, lambda s: s + 1)),
    refused("sparse_weight_grad", "rows must be contiguous int32", at(1, lambda r: r.bool())),
    refused("sparse_weight_grad", "hidden must be a float matrix", at(3, lambda x: x[0])),
    refused("support_fwd", "logits must be contiguous", at(0, lambda z: z[None])),
    refused("support_fwd", "shape of temperature", at(3, torch.ones(2))),
    refused("support_bwd", "shape of row_max", at(7, torch.ones(2))),
]


@pytest.mark.parametrize("op, words, change", REFUSED)
def test_refusals(op: str, words: str, change: Callable[[list[Any]], None]) -> None:
    pairs = pairs_of([[1, 2], [0], [3, 2]])
    z, three = torch.zeros(5), torch.zeros(3)
    x, w = torch.zeros(3, 4), torch.zeros(V, 4)
    given: dict[str, list[Any]] = {
        "sparse_logits": [x, w, *pairs],
        "sparse_hidden_grad": [z, w, *pairs],
        "sparse_weight_grad": [*sorted_by_id(pairs, z), x],
        "support_fwd": [z, *pairs[1:], None, 1.0],
        "support_bwd": [three, None, z, *pairs[1:], None, three, three, three, 1.0],
    }
    args = given[op]
    schema.HANDLES[op]["cpu"](*args)
    change(args)
    with pytest.raises(RuntimeError, match=f"ppo_fast::{op}.*{words}"):
        schema.HANDLES[op]["cpu"](*args)
