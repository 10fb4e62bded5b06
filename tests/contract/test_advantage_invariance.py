"""Bitwise: one sequence's advantages, whatever else is there; and what bad input is told.

Beside test_invariance.py: rows longer than a chunk, holes in the mask, λ and ends per step.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import usable

import ppo_fast
from ppo_fast import _checks, testing
from ppo_fast.testing import Call, gae_call, rlhf_call, run, same_bits

ENDS = ("next_values", "terminated", "truncated")
EXTRAS: dict[str, dict[str, Any]] = {
    "ends": {"extras": (*ENDS, "lam", "lam_returns")},
    "ends zero": {"extras": ENDS, "masked": "zero"},
    "vtrace": {"extras": ("bootstrap", "terminated", "rho", "c"), "lam": 0.9},
    "two lambdas": {"extras": ("bootstrap", "row_lam"), "lam_returns": 1.0},
}
PRESETS = pytest.mark.parametrize("options", EXTRAS.values(), ids=EXTRAS.keys())
PER_STEP = ("advantages", "returns")


def long_rows(backend: str, device: str, **options: Any) -> Call:
    """Rows of several chunks (interpreted 16 steps, else at most 128), with holes."""
    short = backend != "cpu" and device == "cpu"
    return gae_call((6, 37 if short else 300), mask="random", device=device, **options)


@pytest.mark.case("D2")
@PRESETS
def test_batching(backend: str, device: str, options: dict[str, Any]) -> None:
    call = long_rows(backend, device, **options)
    whole = run(call, backend)
    order = torch.tensor([5, 2, 0, 2], device=device)
    some = run(testing.with_rows(call, order), backend)
    alone = run(testing.with_rows(call, torch.tensor([3], device=device)), backend)
    for name in PER_STEP:
        assert same_bits(some[name], whole[name][order]), name
        assert same_bits(alone[name][0], whole[name][3]), name


def padded(call: Call, more: int) -> Call:
    """`more` masked steps of NaN, with every flag set, after every row."""
    tensors = {}
    for name, x in call.tensors.items():
        tensors[name] = x
        if x.dim() == 2:
            fill = math.nan if x.is_floating_point() else name != "mask"
            tensors[name] = torch.nn.functional.pad(x, (0, more), value=fill)
    return call._replace(tensors=tensors)


@pytest.mark.case("D3")
@PRESETS
def test_padding(backend: str, device: str, options: dict[str, Any]) -> None:
    call = long_rows(backend, device, **options)
    want, width = run(call, backend), call.tensors["mask"].shape[1]
    for more in (30,) if width < 100 else (1, 16, 129):
        got = run(padded(call, more), backend)
        for name in PER_STEP:
            assert same_bits(got[name][:, :width], want[name]), (more, name)
            assert not bool(got[name][:, width:].any()), (more, name)


@pytest.mark.case("D4")
@PRESETS
def test_packing(backend: str, device: str, options: dict[str, Any]) -> None:
    """Multi-turn rows of uneven length, their holes packed with them, in another order."""
    call = long_rows(backend, device, **options)
    rows, width = call.tensors["mask"].shape
    lengths = [width, 1, width // 3, 17, 0, width - 1]
    exists = torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]
    call = call.replace(mask=call.tensors["mask"] & exists)
    want, order = run(call, backend), [2, 4, 0, 5, 1, 3]
    slots = torch.cat([torch.arange(lengths[b]) + b * width for b in order]).to(device)
    ends = torch.tensor([0] + [lengths[b] for b in order]).cumsum(0).to(device)
    ends = ends.int() if "lam" in options else ends
    flat = {k: v[order] if v.dim() == 1 else v.flatten()[slots] for k, v in call.tensors.items()}
    got = run(call._replace(tensors=flat).replace(cu_seqlens=ends), backend)
    for name in PER_STEP:
        assert same_bits(got[name], want[name].flatten()[slots]), name
    assert float(got["moments"][0]) == float(want["moments"][0]) and rows == len(order)


@pytest.mark.case("D5")
@PRESETS
def test_time_major(backend: str, device: str, options: dict[str, Any]) -> None:
    """At most 2 ulp from batch-major, as a view and as dense memory."""
    call = long_rows(backend, device, **options)
    view = {k: v.T if v.dim() == 2 else v for k, v in call.tensors.items()}
    turned = call._replace(tensors=view).option(time_major=True)
    want, first = run(call, backend), run(turned, backend)
    dense = turned._replace(tensors={k: v.contiguous() for k, v in view.items()})
    second = run(dense, backend)
    for name in PER_STEP:
        assert same_bits(first[name], second[name]), name
        ulp = torch.finfo(torch.float32).eps * want[name].abs()
        assert bool(((first[name].T - want[name]).abs() <= 2 * ulp).all()), name


@pytest.mark.parametrize("masked", ["carry", "zero"])
def test_threads(masked: str) -> None:
    """Few long rows, many short ones, packed and time-major: the same bits with any number."""
    backend = usable("cpu")
    options: dict[str, Any] = {"masked": masked, "extras": (*ENDS, "lam")}
    calls = [
        gae_call((2, 40_000), **options),
        gae_call((3000, 11), **options),
        gae_call((70_000,), packed=True, **options),
        gae_call((200, 301), time_major=True, **options),
        rlhf_call((64, 700), score_at="first-pad", masked=masked),
        rlhf_call((50_000,), packed=True, mask="random", masked=masked),
    ]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([run(call, backend) for call in calls])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(same_bits(a[k], b[k]) for k in a)


PACKED_OPS = pytest.mark.parametrize("op", ["gae", "rlhf_advantages"])
BAD_OFFSETS = pytest.mark.parametrize(
    "offsets", [[1, 4, 40], [0, 20, 10, 40], [0, 10, 39], [0, 50, 40], [-1, 40], [3, 4]], ids=str
)


def with_offsets(op: str, offsets: list[int], device: str = "cpu") -> Call:
    call = testing.FACTORIES[op]((40,), packed=True, device=device)
    per_sequence = {
        k: torch.zeros(len(offsets) - 1, device=device)
        for k in ("scores", "bootstrap")
        if k in call.tensors
    }
    return call.replace(cu_seqlens=torch.tensor(offsets, device=device), **per_sequence)


@PACKED_OPS
@BAD_OFFSETS
def test_offsets_on_the_host_are_checked(backend: str, op: str, offsets: list[int]) -> None:
    """Descending, or not from 0 to N: no kernel follows them."""
    call = with_offsets(op, offsets)
    with pytest.raises(ValueError, match=rf"^{op}: cu_seqlens must rise from 0 to N = 40, got \["):
        run(call, backend)


@PACKED_OPS
@BAD_OFFSETS
def test_offsets_on_the_device_poison(
    op: str, offsets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad offsets that the host does not check: no access out of bounds, every output NaN."""
    backend, device = usable("triton"), "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(_checks, "offsets", lambda *_: None)  # interpreted, the host is the device
    out = run(with_offsets(op, offsets, device), backend)
    assert all(bool(x.isnan().all()) for x in out.values())


NAN = math.nan
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("gae", {"gamma": NAN}, r"gamma must be in \[0, 1\], got nan"),
    ("gae", {"gamma": -0.1}, r"gamma must be in \[0, 1\], got -0.1"),
    ("gae", {"lam": NAN}, r"lam must be in \[0, 1\], got nan"),
    ("gae", {"lam": -0.1}, r"lam must be in \[0, 1\], got -0.1"),
    ("gae", {"lam_returns": NAN}, r"lam_returns must be in \[0, 1\], got nan"),
    ("gae", {"lam_returns": 1.5}, r"lam_returns must be in \[0, 1\], got 1.5"),
    ("rlhf_advantages", {"gamma": NAN}, r"gamma must be in \[0, 1\], got nan"),
    ("rlhf_advantages", {"gamma": 1.01}, r"gamma must be in \[0, 1\], got 1.01"),
    ("rlhf_advantages", {"lam": NAN}, r"lam must be in \[0, 1\], got nan"),
    ("rlhf_advantages", {"lam": 2.0}, r"lam must be in \[0, 1\], got 2.0"),
    ("rlhf_advantages", {"kl_coef": NAN}, r"kl_coef must be in \[-inf, inf\], got nan"),
]


@pytest.mark.parametrize("op, options, text", BAD, ids=str)
def test_numbers_out_of_range(
    backend: str, device: str, op: str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{op}: {text}$"):
        run(testing.FACTORIES[op](device=device).option(**options), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_next_values_are_given_once(backend: str, device: str, dtype: torch.dtype) -> None:
    """V' everywhere or the one after the end, not both; a truncation needs the first."""
    ones = torch.ones(2, 3, dtype=dtype, device=device)
    both = {"next_values": ones, "bootstrap": ones[:, 0]}
    with pytest.raises(ValueError, match=r"^gae: bootstrap must be None with next_values, got"):
        ppo_fast.gae(ones, ones, **both, backend=backend)
    for other in ({}, {"bootstrap": ones[:, 0]}):
        with pytest.raises(ValueError, match=r"^gae: next_values must be given with truncated"):
            ppo_fast.gae(ones, ones, truncated=ones != 0, **other, backend=backend)


@pytest.mark.parametrize("extras", [(*ENDS, "rho", "c", "lam"), ("bootstrap", "row_lam", "rho")])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_nothing_with_everything_given(
    backend: str, device: str, shape: tuple[int, int], extras: tuple[str, ...]
) -> None:
    for time_major in (False, True):
        call = gae_call(shape, mask="all", extras=extras, time_major=time_major, device=device)
        out = run(call, backend)
        assert out["advantages"].shape == out["returns"].shape == shape
        assert out["moments"].tolist() == [0.0, 0.0, 0.0]
