"""Kernels of supports and of the sparse head, against sums spelled out in fp64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import launches
import pytest
import torch
from conftest import usable
from torch import Tensor

from ppo_fast._boundary import calls
from ppo_fast._boundary.options import Pairs, Scoring, Softmax
from ppo_fast.testing import assert_within_budget, same_bits

INF, NAN = math.inf, math.nan
ABSENT = -1
TEMPERATURE = 0.7
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton"])
def kernel(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


class Head(NamedTuple):
    """Arguments of the ops: hidden states, weight, and the pairs of every row."""

    hidden: Tensor
    weight: Tensor
    pairs: Pairs

    def rows(self) -> list[slice]:
        """The pairs of every row."""
        ends = self.pairs.offsets.tolist()
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def row_of_pairs(self) -> Tensor:
        counts = self.pairs.offsets.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


def make(
    device: str,
    counts: Sequence[int],
    vocab: int = 40,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    *,
    masked: Sequence[int] = (),
    seed: int = 0,
) -> Head:
    """Rows of `counts` pairs each, of random ids, some of them several times."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(counts), width, generator=g).to(dtype)
    weight = (torch.randn(vocab, width, generator=g) / width**0.5).to(dtype)
    ids = torch.randint(vocab, (sum(counts),), generator=g)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    mask = torch.ones(len(counts), dtype=torch.bool)
    mask[list(masked)] = False
    pairs = Pairs(ids.int().to(device), offsets.to(device), mask.to(device))
    return Head(hidden.to(device), weight.to(device), pairs)


def scoring(temperature: Tensor | None = None) -> Scoring:
    return Scoring(torch.empty(0), None, temperature, TEMPERATURE, -100)


def with_ids(head: Head, changes: dict[int, int]) -> Head:
    """The head with other ids at some pairs."""
    ids = head.pairs.ids.clone()
    for at, value in changes.items():
        ids[at] = value
    return head._replace(pairs=head.pairs._replace(ids=ids))


def products(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Exact logits of the pairs, Σ|h||w| of each, and True where an id has a row of the weight."""
    ids, vocab = head.pairs.ids.long(), head.weight.shape[0]
    legal = (ids >= 0) & (ids < vocab)
    h = head.hidden.double()[head.row_of_pairs()]
    w = head.weight.double()[ids.clamp(0, vocab - 1)]
    z = (h * w).sum(-1)
    z = torch.where(legal, z, torch.where(ids == ABSENT, -INF, NAN).double())
    return z, (h.abs() * w.abs()).sum(-1), legal


def live_pairs(head: Head) -> Tensor:
    return head.pairs.mask[head.row_of_pairs()]


LENGTHS = [1, 2, 15, 17, 40, 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 24, 256, 300])
def test_logits(kernel: str, device: str, width: int, dtype: torch.dtype) -> None:
    """A lane adds ceil(H / 256) products, then 8 pairs of lanes."""
    head = make(device, LENGTHS, width=width, dtype=dtype, masked=(2,))
    head = with_ids(head, {0: ABSENT, 2: ABSENT, 4: 40, 40: -2, 41: 1 << 30})
    got = calls.sparse_logits(kernel, head.hidden, head.weight, head.pairs)
    z, size, legal = products(head)
    live = live_pairs(head)
    assert got.dtype == torch.float32 and not bool(legal[live].all())
    size = torch.where(legal, size, 0.0)
    assert_within_budget(got[live], z[live], condition=size[live], ops=-(-width // 256) + 8)


def softmax_of(z: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Exact log-probability of the first pair, entropy, maximum and log of the sum of a row."""
    x = z.double() / temperature
    ln_p = x.log_softmax(0)
    entropy = -torch.where(ln_p == -INF, 0.0, ln_p.exp() * ln_p).sum()
    return ln_p[0], entropy, x.max(), (x - x.max()).exp().sum().log()


def rows_of_logits(device: str, counts: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Pairs]:
    """Logits of rows of so many pairs, the last pair of every other row absent."""
    g = torch.Generator().manual_seed(0)
    z = (4 * torch.randn(sum(counts), generator=g)).to(dtype)
    ends = torch.tensor([0, *counts]).cumsum(0)
    for r in range(1, len(counts), 2):
        if counts[r] > 1:
            z[ends[r + 1] - 1] = -INF
    mask = torch.ones(len(counts), dtype=torch.bool)
    ids = torch.zeros(len(z), dtype=torch.int32)
    return z.to(device), Pairs(ids.to(device), ends.to(device), mask.to(device))


def row_slices(pairs: Pairs) -> list[slice]:
    ends = pairs.offsets.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


# Rows of one pair, of a part of a step, of whole steps (512) and of more.
COUNTS = [1, 2, 20, 129, 512, 513, 1027, 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_over_a_support(kernel: str, device: str, dtype: torch.dtype) -> None:
    """Roundings: z / temperature twice (its size is max |z| / temperature), the lanes' sums
    of ceil(K / 128) terms, 7 pairs of lanes, 4 of exp, 4 of log and division."""
    z, pairs = rows_of_logits(device, COUNTS, dtype)
    pairs.mask[3] = False
    got = calls.support_fwd(kernel, z, pairs, scoring())
    for r, at in enumerate(row_slices(pairs)):
        if r == 3:
            assert all(float(x[r]) == 0.0 for x in got)
            continue
        size = float(torch.where(z[at] == -INF, 0, z[at]).double().abs().max()) / TEMPERATURE
        ops = -(-COUNTS[r] // 128) + 15
        for x, want in zip(got, softmax_of(z[at], TEMPERATURE), strict=True):
            condition = 4 * size + 2 * math.log(COUNTS[r]) + 1
            assert_within_budget(x[r], want, condition=condition, ops=ops)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_over_a_support(kernel: str, device: str, dtype: torch.dtype) -> None:
    """By autograd in fp64; a masked row's and an absent pair's are exactly 0."""
    z, pairs = rows_of_logits(device, COUNTS, dtype)
    pairs.mask[3] = False
    g = torch.linspace(-1.0, 2.0, len(COUNTS), device=device)
    h = torch.linspace(0.5, -1.5, len(COUNTS), device=device)
    softmax = calls.support_fwd(kernel, z, pairs, scoring())
    got = calls.support_bwd(kernel, z, pairs, scoring(), softmax, g, h)
    assert got.dtype == torch.float32
    for r, at in enumerate(row_slices(pairs)):
        if r == 3:
            assert not bool(got[at].any())
            continue
        x = z[at].double().requires_grad_()
        kept = x[z[at] != -INF] / TEMPERATURE
        ln_p = kept.log_softmax(0)
        (g[r] * ln_p[0] - h[r] * (ln_p.exp() * ln_p).sum()).backward()
        # Errors of ln p, of size 4 |z| / temperature + log K, times p and the terms of the slope.
        size = float(kept.detach().abs().max())
        lnp = float(ln_p.detach().abs().max())
        terms = float(g[r].abs() + h[r].abs() * (1 + 2 * lnp)) / TEMPERATURE
        condition = terms * (4 * size + 2 * math.log(COUNTS[r]) + 1)
        ops = -(-COUNTS[r] // 128) + 15
        assert_within_budget(got[at], x.grad, condition=condition, ops=ops)
        assert not bool(got[at][z[at] == -INF].any())


def test_a_row_within_2048_is_the_dense_kernel_s(kernel: str, device: str) -> None:
    """To the bit: its pairs are the vocabulary, its token column 0."""
    z, pairs = rows_of_logits(device, COUNTS, torch.float32)
    t = torch.linspace(0.5, 2.0, len(COUNTS), device=device)
    g, h = torch.ones_like(t), torch.full_like(t, 0.3)
    kept = calls.support_fwd(kernel, z, pairs, scoring(t))
    dz = calls.support_bwd(kernel, z, pairs, scoring(t), kept, g, h)
    for r, at in enumerate(row_slices(pairs)):
        tokens = torch.zeros(1, dtype=torch.int64, device=device)
        s = Scoring(tokens, None, t[r : r + 1], 1.0, -100)
        dense = calls.logprobs_fwd(kernel, z[at][None], s)
        assert all(same_bits(x[r : r + 1], y) for x, y in zip(kept, dense, strict=True))
        want = calls.logprobs_bwd(kernel, z[at][None], s, dense, g[r : r + 1], h[r : r + 1])
        assert same_bits(dz[at], want[0])


def test_rows_without_a_number(kernel: str, device: str) -> None:
    """A wrong id makes its row NaN, a token of probability 0 has no gradient, and a row with no
    gradient has zeros, whatever it holds."""
    z, pairs = rows_of_logits(device, [4, 4, 4, 4], torch.float32)
    z[2], z[4], z[8], z[14] = NAN, -INF, -INF, NAN
    softmax = calls.support_fwd(kernel, z, pairs, scoring())
    assert softmax.logprobs.isnan().tolist() == [True, False, False, True]
    assert softmax.logprobs[1:3].tolist() == [-INF, -INF]
    assert softmax.entropy.isnan().tolist() == [True, False, False, True]
    g = torch.tensor([1.0, 1.0, 0.0, 0.0], device=device)
    dz = calls.support_bwd(kernel, z, pairs, scoring(), softmax, g, None)
    assert bool(dz[:4].isnan().all()) and not bool(dz[4:].any())


def test_strides_of_per_row_tensors(kernel: str, device: str) -> None:
    """Mask, temperature and incoming gradients of any stride; expanded ones too."""
    z, pairs = rows_of_logits(device, [3, 20, 7], torch.float32)
    pairs.mask[1] = False
    t = torch.tensor([0.5, 1.0, 1.5], device=device)
    one = torch.ones((), device=device).expand(3)
    softmax = calls.support_fwd(kernel, z, pairs, scoring(t))
    want = calls.support_bwd(kernel, z, pairs, scoring(t), softmax, one.clone(), t)
    apart = [torch.stack([x, x], -1)[:, 1] for x in (pairs.mask, t)]
    other = pairs._replace(mask=apart[0])
    again = calls.support_fwd(kernel, z, other, scoring(apart[1]))
    assert all(same_bits(a, b) for a, b in zip(softmax, again, strict=True))
    got = calls.support_bwd(kernel, z, other, scoring(apart[1]), softmax, one, apart[1])
    assert same_bits(got, want) and bool(want.any())


def gradients(head: Head, seed: int = 1) -> Tensor:
    """dz as of support_bwd: 0 in masked rows and for absent pairs."""
    g = torch.Generator().manual_seed(seed)
    dz = torch.randn(head.pairs.ids.numel(), generator=g).to(head.weight.device)
    return torch.where(live_pairs(head) & (head.pairs.ids != ABSENT), dz, 0.0)


def sum_roundings(count: int) -> int:
    """Most roundings that reach a sum: a quarter of 512 products, 2 pairs, then whole segments."""
    return min(-(-count // 4), 128) + 2 + count // 512


def assert_hidden_grad(kernel: str, head: Head, dz: Tensor) -> Tensor:
    got = calls.sparse_hidden_grad(kernel, dz, head.weight, head.pairs)
    assert got.dtype == head.weight.dtype
    weight, ids = head.weight.double(), head.pairs.ids.long()
    for r, at in enumerate(head.rows()):
        if not head.pairs.mask[r]:
            assert not bool(got[r].any())
            continue
        legal = (ids[at] >= 0) & (ids[at] < len(weight))
        w, d = weight[ids[at][legal]], dz[at][legal].double()[:, None]
        want, size = (d * w).sum(0), (d * w).abs().sum(0)
        ops = sum_roundings(at.stop - at.start)
        assert_within_budget(got[r], want, condition=size, ops=ops)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 24, 256, 260])
def test_hidden_gradient(kernel: str, device: str, width: int, dtype: torch.dtype) -> None:
    head = make(device, LENGTHS, width=width, dtype=dtype, masked=(2,))
    head = with_ids(head, {0: ABSENT, 2: ABSENT})
    assert_hidden_grad(kernel, head, gradients(head))


@pytest.mark.parametrize("width", [8, 1032])
def test_rows_of_several_segments(kernel: str, device: str, width: int) -> None:
    """512 pairs a segment, counted from the row's own start; masked rows have none."""
    counts = [1, 513, 5, 1025, 700, 512] if width == 8 else [3, 514, 2]
    head = make(
        device, counts, vocab=700, width=width, dtype=torch.bfloat16, masked=(4,)[: width < 9]
    )
    assert_hidden_grad(kernel, head, gradients(head))


def test_a_wrong_id_makes_its_row_nan(kernel: str, device: str) -> None:
    """The gradients of its pairs are NaN; a row masked or without gradients stays 0."""
    head = with_ids(make(device, [3, 3, 3, 2], masked=(2,)), {1: 40, 4: -7, 7: 40})
    dz = gradients(head)
    dz[:3] = NAN
    dz[3:6] = 0.0
    got = calls.sparse_hidden_grad(kernel, dz, head.weight, head.pairs)
    assert bool(got[0].isnan().all())
    assert not bool(got[1:3].any())
    assert bool(got[3].isfinite().all())


class Sorted(NamedTuple):
    """Pairs in the order of their ids."""

    dz: Tensor
    rows: Tensor
    starts: Tensor


def by_id(head: Head, dz: Tensor, rows: torch.dtype = torch.int32) -> Sorted:
    ids, order = head.pairs.ids.long().sort(stable=True)
    each = torch.arange(len(head.weight) + 1, device=ids.device)
    starts = torch.searchsorted(ids, each)
    return Sorted(dz[order], head.row_of_pairs()[order].to(rows), starts)


def assert_weight_grad(kernel: str, head: Head, dz: Tensor, x: Sorted) -> tuple[Tensor, Tensor]:
    dw, db = calls.sparse_weight_grad(kernel, x.dz, x.rows, x.starts, head.hidden)
    assert dw.dtype == head.hidden.dtype and db.dtype == torch.float32
    ids, rows = head.pairs.ids.long(), head.row_of_pairs()
    for v in range(len(head.weight)):
        mine = (ids == v) & (dz != 0)
        d, h = dz[mine].double()[:, None], head.hidden.double()[rows[mine]]
        ops = sum_roundings(int((ids == v).sum()))
        size = (d * h).abs().sum(0)
        assert_within_budget(dw[v], (d * h).sum(0), condition=size, ops=ops)
        assert_within_budget(db[v], d.sum(), condition=d.abs().sum(), ops=ops)
    return dw, db


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 24, 260])
def test_weight_gradient(kernel: str, device: str, width: int, dtype: torch.dtype) -> None:
    """Each row of dW is written, those of ids that nobody keeps too; int32 and int64 rows."""
    head = make(device, LENGTHS, vocab=90, width=width, dtype=dtype, masked=(2,))
    head = with_ids(head, {0: ABSENT, 2: ABSENT, 3: ABSENT})
    dz = gradients(head)
    dw, _ = assert_weight_grad(kernel, head, dz, by_id(head, dz))
    again = calls.sparse_weight_grad(kernel, *by_id(head, dz, torch.int64), head.hidden)
    assert same_bits(dw, again[0])


@pytest.mark.parametrize("before", [0, 3, 600])
def test_an_id_kept_by_most_rows(kernel: str, device: str, before: int) -> None:
    """Ids of several segments, behind absent pairs, which are sorted first."""
    counts = [1] * before + [1] * 1100
    head = make(device, counts, vocab=3, width=4, dtype=torch.bfloat16)
    ids = head.pairs.ids.clone()
    ids[:before], ids[before:] = ABSENT, 1
    ids[-30:] = 2
    head = head._replace(pairs=head.pairs._replace(ids=ids))
    dz = gradients(head)
    assert_weight_grad(kernel, head, dz, by_id(head, dz))


def test_pairs_without_gradient_are_not_read(kernel: str, device: str) -> None:
    """Hidden states of a masked row and the weight of an id that nobody keeps may be NaN."""
    head = make(device, [5, 4, 6], vocab=12, masked=(1,))
    head = with_ids(head, dict.fromkeys((0, 7, 12), 3))
    dz = gradients(head)
    want = assert_weight_grad(kernel, head, dz, by_id(head, dz))
    weight, hidden = head.weight.clone(), head.hidden.clone()
    hidden[1] = NAN
    kept = head.pairs.ids[live_pairs(head)].long()
    weight[[v for v in range(12) if v not in kept.tolist()]] = NAN
    z = calls.sparse_logits(kernel, head.hidden, head.weight, head.pairs)
    poisoned = calls.sparse_logits(kernel, hidden, weight, head.pairs)
    live = live_pairs(head)
    assert same_bits(z[live], poisoned[live])
    got = calls.sparse_weight_grad(kernel, *by_id(head, dz), hidden)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    dx = [calls.sparse_hidden_grad(kernel, dz, w, head.pairs) for w in (head.weight, weight)]
    assert same_bits(*dx)


def test_the_bias_gradient_alone(kernel: str, device: str) -> None:
    head = make(device, LENGTHS, width=0)
    dz = gradients(head)
    dw, db = calls.sparse_weight_grad(kernel, *by_id(head, dz), head.hidden)
    assert dw.shape == (40, 0)
    for v in range(40):
        d = dz[head.pairs.ids == v].double()
        assert_within_budget(db[v], d.sum(), condition=d.abs().sum(), ops=8)


def every_result(kernel: str, head: Head) -> dict[str, Tensor]:
    """Results of the five ops for a head, by name."""
    z = calls.sparse_logits(kernel, head.hidden, head.weight, head.pairs)
    softmax = calls.support_fwd(kernel, z, head.pairs, scoring())
    n = len(head.pairs.mask)
    g, h = torch.ones(n, device=z.device), torch.full((n,), 0.3, device=z.device)
    dz = calls.support_bwd(kernel, z, head.pairs, scoring(), softmax, g, h)
    dx = calls.sparse_hidden_grad(kernel, dz, head.weight, head.pairs)
    dw, db = calls.sparse_weight_grad(kernel, *by_id(head, dz), head.hidden)
    return {"z": z, "dz": dz, "dx": dx, "dw": dw, "db": db, **softmax._asdict()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_s_bits_are_its_own(kernel: str, device: str, dtype: torch.dtype) -> None:
    """Alone, at the end of a batch, and beside long, masked and NaN rows."""
    head = make(device, [3, 600, 21, 5], width=40, dtype=dtype, masked=(0,))
    head.hidden[3] = NAN
    whole = every_result(kernel, head)
    for r, at in enumerate(head.rows()):
        ids = head.pairs.ids[at]
        offsets = torch.tensor([0, len(ids)], device=device)
        alone = Head(
            head.hidden[r : r + 1].clone(),
            head.weight,
            Pairs(ids.clone(), offsets, head.pairs.mask[r : r + 1]),
        )
        own = every_result(kernel, alone)
        for name in ("logprobs", "entropy", "row_max", "log_sum", "dx"):
            assert same_bits(own[name], whole[name][r : r + 1]), (r, name)
        if r != 0:  # a masked row's logits are nobody's
            assert same_bits(own["z"], whole["z"][at]), r
        assert same_bits(own["dz"], whole["dz"][at]), r


@pytest.mark.parametrize("extra", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_alignment_change_no_bit(
    kernel: str, device: str, dtype: torch.dtype, extra: int
) -> None:
    """Rows of hidden states and weight inside wider ones, which are NaN; pairs from the middle."""
    head = make(device, [3, 20, 17], width=264, dtype=dtype)
    want = every_result(kernel, head)

    def inside(x: Tensor) -> Tensor:
        wider = torch.full((len(x), x.shape[1] + extra), NAN, dtype=x.dtype, device=x.device)
        view = wider[:, extra:]
        view.copy_(x)
        return view

    ids = torch.cat([head.pairs.ids.new_zeros(extra), head.pairs.ids])[extra:]
    pairs = head.pairs._replace(ids=ids)
    got = every_result(kernel, Head(inside(head.hidden), inside(head.weight), pairs))
    for name, x in want.items():
        assert same_bits(got[name], x), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_beyond_2_31_elements(
    kernel: str, device: str, tmp_path: Path, dtype: torch.dtype
) -> None:
    """In sparse files, of which what is not touched takes no room."""
    if device != "cpu":
        pytest.skip("the files' tensors are on the CPU")
    head = make(device, [2, 1, 4], vocab=3, dtype=dtype)
    want = every_result(kernel, head)

    def far_apart(name: str, x: Tensor) -> Tensor:
        stride = 2**30 + 8  # the third begins beyond 2^31
        room = torch.from_file(
            str(tmp_path / name), shared=True, size=3 * stride, dtype=x.dtype
        ).as_strided(x.shape, (stride, 1))
        return room.copy_(x)

    far = Head(far_apart("hidden", head.hidden), far_apart("weight", head.weight), head.pairs)
    got = every_result(kernel, far)
    for name, x in want.items():
        assert same_bits(got[name], x), name


def test_no_rows(kernel: str, device: str) -> None:
    head = make(device, [])
    shapes = {k: tuple(v.shape) for k, v in every_result(kernel, head).items()}
    rows = dict.fromkeys(Softmax._fields, (0,))
    assert shapes == {"z": (0,), "dz": (0,), "dx": (0, 24), "dw": (40, 24), "db": (40,), **rows}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 25, 300])
def test_launches_are_registered(kernel: str, device: str, width: int, dtype: torch.dtype) -> None:
    import aot

    from ppo_fast.kernels import common

    if device != "cpu" or not common.INTERPRETED:
        pytest.skip("the interpreter's launches are what is watched")
    head = make(device, [3, 514], vocab=8, width=width, dtype=dtype)
    t = torch.ones(2, device=device)
    with launches.watch() as launched:
        every_result(kernel, head)
        z = torch.zeros(517, dtype=dtype, device=device)
        softmax = calls.support_fwd(kernel, z, head.pairs, scoring(t))
        for grads in ((t, None), (None, t)):
            calls.support_bwd(kernel, z, head.pairs, scoring(t), softmax, *grads)
    tables: Any = [e for stem in ("support", "sparse_head") for e in aot.table(stem)]
    assert launched == {e.kernel.__name__ for e in tables}
