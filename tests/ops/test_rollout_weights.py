"""Weights and rejections of other policies' samples: the law in scalars, its kernel, its bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast import Correction, _ext, testing
from ppo_fast._results import ROLLOUT_FIELDS
from ppo_fast.testing import Call, run, same_bits

ISAS = _ext.module().build_info()["isa_compiled"] if _ext.load() is None else ()
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAN, INF = float("nan"), float("inf")
# Bounds that some of the tokens, or sequences, below are within and some are not.
BOUNDS: dict[str, Any] = {
    "token-ratio": (0.9, 1.2),
    "token-k1": 1.1,
    "token-k2": 4e-3,
    "token-k3": 3e-3,
    "seq-sum-ratio": (0.8, 1.3),
    "seq-sum-k1": 1.5,
    "seq-sum-k2": 0.15,
    "seq-sum-k3": 0.15,
    "seq-mean-ratio": (0.99, 1.02),
    "seq-mean-k1": (0.98, 1.01),
    "seq-mean-k2": 5e-3,
    "seq-mean-k3": 5e-3,
    "seq-min-ratio": (0.82, 2.0),
    "seq-min-k1": (0.82, 2.0),
    "seq-min-k2": 1e-5,
    "seq-min-k3": 1e-5,
    "seq-max-ratio": (0.5, 1.25),
    "seq-max-k1": (0.5, 1.25),
    "seq-max-k2": 0.025,
    "seq-max-k3": 0.025,
}
LEVELS = {
    "token": Correction("token", low=0.95, high=1.1),
    "token mask": Correction("token", "mask", 0.95, 1.1),
    "token high": Correction("token", high=1.05),
    "sequence": Correction("sequence", low=0.8, high=1.2),
    "sequence mask": Correction("sequence", "mask", low=0.9),
    "geometric": Correction("geometric", high=1.01),
    "geometric mask": Correction("geometric", "mask", 0.99, 1.01),
    "every key": Correction("sequence", high=2.0, reject=BOUNDS),
    "none": None,
}
CORRECTIONS = {
    **LEVELS,
    **{key: Correction("token", high=1.1, reject={key: bound}) for key, bound in BOUNDS.items()},
    "rejections alone": Correction(None, reject={"token-k1": (0.0, 1.1), "seq-max-k3": 0.03}),
}


@pytest.fixture(params=("reference", *ISAS))
def code(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend: the reference, or `cpu` on each instruction set."""
    if request.param == "reference":
        yield "reference"
        return
    module = _ext.module()
    before = module.build_info()["isa"]
    if ISAS.index(request.param) > ISAS.index(module.build_info()["isa_best"]):
        pytest.skip(f"this CPU has no {request.param}")
    module.set_isa(request.param)
    yield "cpu"
    module.set_isa(before)


def call_of(
    correction: Correction | None,
    shape: tuple[int, ...] = (7, 45),
    dtype: torch.dtype = torch.float32,
    mask: str | None = "row",
    scale: float = 0.1,
) -> Call:
    """Log-probabilities around −1.5, and a sampler's that differ by `scale`."""
    g = torch.Generator().manual_seed(1)
    old = -3 * torch.rand(shape, generator=g, dtype=torch.float64)
    rollout = old + scale * torch.randn(shape, generator=g, dtype=torch.float64)
    tensors = {"old_logprobs": old.to(dtype), "rollout_logprobs": rollout.to(dtype)}
    if mask is not None:
        tensors["mask"] = testing.make_mask(shape, mask, 1)
    return Call("rollout_weights", tensors, {"correction": correction}, {})


def with_gaps(call: Call) -> Call:
    """Tokens without a log-probability of the sampler's, the trainer's or both, and infinite ones;
    row 0 is empty, and masked slots hold NaN."""
    call = testing.with_garbage(call, NAN)
    old, rollout, mask = call.tensors.values()
    mask[1:5, :6] = True
    rollout[1, 0] = old[1, 1] = NAN
    old[2, 2] = rollout[2, 2] = NAN
    old[3, 3] = rollout[3, 3] = -INF
    rollout[3, 4] = -INF
    old[4, 5] = -INF
    return call


def compute(dtype: torch.dtype) -> torch.dtype:
    """The precision computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def roundings(n: int, dtype: torch.dtype) -> float:
    """x, the exponential and a bound in the precision computed in, and n additions in double."""
    return 8 + n * torch.finfo(torch.float64).eps / torch.finfo(compute(dtype)).eps


class Spelled(NamedTuple):
    """Results in scalars: each weight with the size of what rounds on its way; `near`, slots whose
    mask or masked weight rounding may decide."""

    weights: Tensor
    size: Tensor
    kept: Tensor
    near: Tensor
    stats: dict[str, float]
    stat_size: dict[str, float]


def _k3(x: float) -> float:
    return math.expm1(x) - x


def _held(key: str, bound: Any, xs: list[float], ops: float) -> tuple[list[bool], list[bool]]:
    """For each x of a sequence: whether `key` keeps it, and whether that is near its bound."""
    where, _, what = key.rpartition("-")
    value = {
        "ratio": lambda x: x,
        "k1": lambda x: -x,
        "k2": lambda x: 0.5 * x * x,
        "k3": _k3,
    }[what]
    size = {
        "ratio": abs,
        "k1": abs,
        "k2": lambda x: x * x,
        "k3": lambda x: abs(x * math.expm1(x)) + _k3(x),
    }[what]
    if what in ("k2", "k3"):
        low, high = -INF, bound
    else:
        pair = bound if isinstance(bound, tuple) else (1 / bound, bound)
        low, high = (math.log(b) if b > 0 else -INF for b in pair)
    values, sizes = [value(x) for x in xs], [size(x) for x in xs]
    if where in ("seq-sum", "seq-mean"):
        n = 1 if where == "seq-sum" else len(xs)
        values, sizes = ([math.fsum(v) / n] * len(xs) for v in (values, sizes))
    pairs = zip(values, sizes, strict=True)
    near = [min(abs(v - low), abs(v - high)) <= ops * s for v, s in pairs]
    if where in ("seq-min", "seq-max"):  # of which only a token near the bound can decide
        fold = min if where == "seq-min" else max
        values, near = [fold(values)] * len(xs), [any(near)] * len(xs)
    return [low <= v <= high for v in values], near


def _weigh(c: Correction | None, xs: list[float], ops: float) -> Iterator[tuple[float, ...]]:
    """Weight, size of its rounding, near a bound, below, above of each token of a sequence."""
    level = None if c is None else c.level
    low, high = (0.0, INF) if c is None else c.bounds()
    whole, absolute = math.fsum(xs), math.fsum(map(abs, xs))
    for x in xs:
        at, size = {
            None: (0.0, 0.0),
            "token": (x, abs(x)),
            "sequence": (whole, absolute),
            "geometric": (whole / len(xs), absolute / len(xs)),
        }[level]
        ratio = math.exp(min(max(at, -20.0), 20.0))
        # Beyond the clamp nothing rounds but the exponential.
        size = ratio * (1 + (size if abs(at) <= 20 else 0))
        near = min(abs(ratio - low), abs(ratio - high)) <= ops * size
        weight = min(max(ratio, low), high)
        if c is not None and c.form == "mask" and weight != ratio:
            weight = 0.0
        yield weight, size, near, ratio < low, ratio > high


class Sums:
    """The statistics, and the sizes of what rounds on their way."""

    def __init__(self) -> None:
        self.values, self.sizes = (dict.fromkeys(ROLLOUT_FIELDS, 0.0) for _ in range(2))
        self.values["weight_min"], self.values["weight_max"] = INF, -INF

    def add(self, name: str, value: float, rounded: float = 0.0) -> None:
        self.values[name] += value
        self.sizes[name] += abs(value) + rounded

    def token(self, x: float, held: bool, weighed: tuple[float, ...]) -> None:
        w, rounded, _, below, above = weighed
        b = min(max(x, -20.0), 20.0)
        counts = {"tokens": 1, "rejected": not held, "below": below, "above": above}
        for name, count in counts.items():
            self.add(name, count)
        self.add("weight", w, rounded)
        self.add("weight_sq", w * w, 2 * w * rounded)
        self.add("k1", -x, abs(x))
        self.add("k3", _k3(b), abs(b * math.expm1(b)))
        self.add("ratio_sq", math.exp(2 * b), 2 * abs(b) * math.exp(2 * b))
        for name, extreme in (("weight_min", min), ("weight_max", max)):
            self.values[name] = extreme(self.values[name], w)
            self.sizes[name] = max(self.sizes[name], rounded)

    def sequence(self, pairs: list[tuple[float, float]], xs: list[float], held: bool) -> None:
        whole, absolute = math.fsum(xs), math.fsum(map(abs, xs))
        ratio_sq = math.exp(2 * min(max(whole, -20.0), 20.0))
        self.add("seqs", 1)
        self.add("rejected_seqs", not held)
        self.add("seq_ratio_sq", ratio_sq, 0 if abs(whole) > 20 else 2 * absolute * ratio_sq)
        a, b = (-math.fsum(v) / len(xs) for v in zip(*pairs, strict=True))
        self.add("log_ppl", a)
        self.add("rollout_log_ppl", b)
        for name, value, size in (
            ("ppl", a, abs(a)),
            ("rollout_ppl", b, abs(b)),
            ("ppl_ratio", a - b, abs(a) + abs(b)),
        ):
            e = math.exp(value) if value < 700 else INF
            self.add(name, e, e * size if math.isfinite(size) else 0.0)


def spelled(call: Call, sequences: list[list[int]], known: bool = True) -> Spelled:
    """The law, token by token in Python's floats; `sequences` are flat slots."""
    c, main = call.options["correction"], call.tensors["old_logprobs"]
    old, rollout = (
        call.tensors[k].double().flatten().tolist() for k in ("old_logprobs", "rollout_logprobs")
    )
    mask = call.tensors.get("mask")
    keep = [True] * len(old) if mask is None else mask.flatten().tolist()
    weights, size, kept, near = ([zero] * len(old) for zero in (0.0, 0.0, False, False))
    sums = Sums()
    for slots in ([i for i in slots if keep[i]] for slots in sequences):
        if not slots:
            continue
        ops = roundings(len(slots), main.dtype) * torch.finfo(compute(main.dtype)).eps
        pairs, xs = [], []
        for a, b in ((old[i], rollout[i]) for i in slots):
            missing = math.isnan(a - b)
            sums.add("missing", missing)
            known_one = next((v for v in (a, b) if math.isfinite(v)), 0.0)
            pairs.append((known_one, known_one) if missing else (a, b))
            xs.append(0.0 if missing else a - b)
        bounded = [min(max(x, -20.0), 20.0) for x in xs]
        tests = [_held(k, bound, bounded, ops) for k, bound in (() if c is None else c.reject)]
        for j, (i, weighed) in enumerate(zip(slots, _weigh(c, xs, ops), strict=True)):
            weights[i], size[i], edge = weighed[:3]
            kept[i] = all(held[j] for held, _ in tests)
            masked = c is not None and c.form == "mask"
            near[i] = any(close[j] for _, close in tests) or (edge and masked)
            sums.token(xs[j], kept[i], weighed)
        if known:
            sums.sequence(pairs, xs, all(kept[i] for i in slots))
    doubles = (torch.tensor(x, dtype=torch.float64).view(main.shape) for x in (weights, size))
    flags = (torch.tensor(x, dtype=torch.bool).view(main.shape) for x in (kept, near))
    return Spelled(*doubles, *flags, sums.values, sums.sizes)


def rows_of(call: Call) -> list[list[int]]:
    """Flat slots of every sequence."""
    x, cu = call.tensors["old_logprobs"], call.tensors.get("cu_seqlens")
    if x.dim() == 2:
        return torch.arange(x.numel()).view(x.shape).tolist()
    ends = [0, x.numel()] if cu is None else cu.tolist()
    return [list(range(a, b)) for a, b in itertools.pairwise(ends)]


def assert_is_the_law(call: Call, backend: str) -> Spelled:
    """Weights within their roundings, mask, sums; next to no slot is left out as near a bound."""
    with testing.poisoned_allocations():
        got = run(call, backend)
    known = call.tensors["old_logprobs"].dim() == 2 or "cu_seqlens" in call.tensors
    want = spelled(call, rows_of(call), known)
    clear = ~want.near
    assert int(want.near.sum()) <= 0.05 * want.near.numel()
    dtype = got["weights"].dtype
    ops = roundings(max(map(len, rows_of(call)), default=0), dtype)
    testing.assert_within_budget(
        got["weights"][clear], want.weights[clear], condition=want.size[clear], ops=ops
    )
    assert torch.equal(got["mask"][clear], want.kept[clear])
    counts = ("rejected", "below", "above", "rejected_seqs")
    for name, value in zip(ROLLOUT_FIELDS, got["stats"], strict=True):
        if name in counts or (bool(want.near.any()) and name.startswith("weight")):
            assert abs(float(value) - want.stats[name]) <= int(want.near.sum()) * 2, name
            continue
        exact = torch.tensor(want.stats[name], dtype=torch.float64)
        condition = want.stat_size[name] if math.isfinite(want.stat_size[name]) else 0.0
        testing.assert_within_budget(
            value, exact, condition=condition, ops=2 * ops, compute=dtype, name=name
        )
    return want


@pytest.mark.case("D7", "N18")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CORRECTIONS)
def test_within_budget(code: str, name: str, dtype: torch.dtype) -> None:
    """Masks, an empty row, missing and infinite log-probabilities; every level, form and key."""
    for call in (
        call_of(CORRECTIONS[name], dtype=dtype),
        with_gaps(call_of(CORRECTIONS[name], dtype=dtype)),
    ):
        assert_is_the_law(call, code)


@pytest.mark.parametrize("key", BOUNDS)
def test_the_bounds_above_part_the_inputs(key: str) -> None:
    """Each key's test has kept and rejected slots."""
    call = call_of(CORRECTIONS[key])
    kept = spelled(call, rows_of(call)).kept[call.tensors["mask"]]
    assert kept.any() and not kept.all()


@pytest.mark.parametrize("mask", [None, "all", "empty", "left", "right"])
@pytest.mark.parametrize("shape", [(3, 70), (1, 1), (0, 5), (4, 0), (23,)], ids=str)
def test_shapes_and_masks(code: str, shape: tuple[int, ...], mask: str | None) -> None:
    """A flat call without sequences has no perplexity and no number of sequences."""
    for name in ("token", "token-k2") if len(shape) == 1 else ("token mask", "every key"):
        assert_is_the_law(call_of(CORRECTIONS[name], shape, mask=mask), code)


@pytest.mark.parametrize("name", ["token mask", "sequence", "geometric", "every key"])
def test_packed(code: str, name: str) -> None:
    """Uneven sequences, empty ones among them."""
    cu = torch.tensor([0, 0, 5, 6, 120, 120, 300], dtype=torch.int32)
    call = call_of(CORRECTIONS[name], (300,), mask="random").replace(cu_seqlens=cu)
    assert_is_the_law(call, code)


def test_long_sequences(code: str) -> None:
    """Sequences of several segments of work beside short ones, and a rejected long one."""
    c = Correction("geometric", "mask", 0.999, 1.001, reject={"seq-max-k1": 1.46})
    cu = torch.tensor([0, 16384, 16389, 60000, 60001, 93000])
    call = call_of(c, (93000,), mask="random").replace(cu_seqlens=cu)
    want = assert_is_the_law(call, code)
    assert 0 < want.stats["rejected_seqs"] < 5


@pytest.mark.case("X12")
def test_differences_beyond_20_are_clamped(code: str) -> None:
    """e^±20 is the largest and smallest ratio; the mean of x, and k1, keep what is beyond."""
    old = torch.tensor([[-1.0, -60.0, -1.0, -2.0]])
    rollout = torch.tensor([[-50.0, -1.0, -1.0, -2.0]])
    token = ppo_fast.rollout_weights(
        old, rollout, correction=Correction("token", high=1e12), backend=code
    )
    ends = torch.tensor([[math.exp(20.0), math.exp(-20.0), 1.0, 1.0]])
    torch.testing.assert_close(token.weights, ends, rtol=3e-7, atol=0)
    assert token.stats.compute()["kl"] == (59.0 - 49.0) / 4
    mean = ppo_fast.rollout_weights(
        old, rollout, correction=Correction("geometric", high=2.0), backend=code
    )
    torch.testing.assert_close(mean.weights, torch.full((1, 4), math.exp(-2.5)), rtol=3e-7, atol=0)


@pytest.mark.case("X2")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["token mask", "sequence", "every key", "none"])
def test_masked_slots_reach_nothing(code: str, name: str, value: float) -> None:
    call = call_of(CORRECTIONS[name])
    want = run(testing.with_garbage(call, 0.0), code)
    got = run(testing.with_garbage(call, value), code)
    assert all(same_bits(got[k], want[k]) for k in want)
    out = call.tensors["mask"] == 0
    assert not got["weights"][out].any() and not got["mask"][out].any()


@pytest.mark.case("X15")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", testing.LAYOUTS)
@pytest.mark.parametrize("code", ISAS, indirect=True)
@pytest.mark.parametrize("name", ["token mask", "every key"])
def test_layouts(code: str, name: str, kind: str, dtype: torch.dtype) -> None:
    """Views give the bits of their contiguous copies."""
    view, dense = testing.with_layout(call_of(CORRECTIONS[name], (5, 70), dtype), kind)
    got, want = run(view, code), run(dense, code)
    assert all(same_bits(got[k], want[k]) for k in want)


def rowwise(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    out = run(call, backend)
    return out["weights"], out["mask"]


@pytest.mark.case("D2", "D3", "D4")
@pytest.mark.parametrize("name", ["token", "sequence", "geometric mask", "every key"])
def test_a_row_keeps_its_bits(code: str, name: str) -> None:
    """Alone, shuffled, padded to the right, and packed in any order."""
    call = call_of(CORRECTIONS[name], (9, 83), mask="right")
    weights, kept = rowwise(call, code)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for rows in (order, torch.cat([order, order]), order[:1], order[3:5]):
        some = rowwise(testing.with_rows(call, rows), code)
        assert same_bits(some[0], weights[rows]) and same_bits(some[1], kept[rows])
    for more in (1, 13, 100):
        wide = {k: torch.nn.functional.pad(v, (0, more)) for k, v in call.tensors.items()}
        padded = rowwise(call._replace(tensors=wide), code)
        assert same_bits(padded[0][:, :83], weights) and same_bits(padded[1][:, :83], kept)
    lengths = call.tensors["mask"].sum(1)
    for rows in (torch.arange(9), order):
        ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths[rows].cumsum(0)])
        flat = {
            k: torch.cat([v[r, : lengths[r]] for r in rows])
            for k, v in call.tensors.items()
            if k != "mask"
        }
        packed = rowwise(call._replace(tensors={**flat, "cu_seqlens": ends}), code)
        slots = torch.cat([torch.arange(int(lengths[r])) + 83 * r for r in rows])
        assert same_bits(packed[0], weights.flatten()[slots])
        assert same_bits(packed[1], kept.flatten()[slots])


@pytest.mark.case("D1")
@pytest.mark.parametrize("name", ["token", "sequence", "every key"])
def test_threads_change_no_bit(name: str) -> None:
    """Sums over rows and over the segments of long sequences too."""
    if not ISAS:
        pytest.skip("backend 'cpu' is not usable here")
    calls = [call_of(CORRECTIONS[name], (37, 1201), mask="random")]
    cu = torch.tensor([0, 3, 100_000])
    calls.append(call_of(CORRECTIONS[name], (100_000,), mask="random").replace(cu_seqlens=cu))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append([run(call, "cpu") for call in calls])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(same_bits(a[k], b[k]) for k in a)
