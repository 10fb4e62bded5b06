"""The CUDA advantage kernels: who computes a node of the tree changes no bit of it.

Which kernel a call gets follows from its lengths, see kRules in csrc/cuda/advantage/plan.h.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import usable
from torch import Tensor

from ppo_fast import testing
from ppo_fast._boundary import calls
from ppo_fast._boundary.options import Lambda
from ppo_fast.testing import Call, gae_call, rlhf_call, run, same_bits

LENGTH = 9000  # nine chunks: alone, each has a block of its own
ENDS = ("next_values", "terminated", "truncated")
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("gae", {"mask": None, "extras": ("bootstrap",)}),
    "carry": ("gae", {"extras": ("bootstrap",)}),
    "zero": ("gae", {"extras": ("bootstrap",), "masked": "zero"}),
    "ends": ("gae", {"extras": (*ENDS, "lam", "lam_returns")}),
    "vtrace": ("gae", {"extras": ("bootstrap", "terminated", "rho", "c"), "masked": "zero"}),
    "bf16": ("gae", {"extras": ("bootstrap", "row_lam"), "dtype": torch.bfloat16}),
    "last-token": ("rlhf_advantages", {"masked": "zero"}),
    "first-pad": ("rlhf_advantages", {"score_at": "first-pad", "mask": "random"}),
    "first-pad zero": ("rlhf_advantages", {"score_at": "first-pad", "masked": "zero"}),
    "per-token": ("rlhf_advantages", {"score_at": "per-token", "kl_estimator": "k3"}),
}
EVERY = pytest.mark.parametrize("op, options", PRESETS.values(), ids=PRESETS.keys())


@pytest.fixture(params=["cuda"])
def kernel(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


def rowwise(out: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in out.items() if k != "moments"}


def holes(call: Call, *gaps: tuple[int, int]) -> Call:
    """The call with steps [begin, end) of every row masked too."""
    if "mask" not in call.tensors:
        return call
    mask = call.tensors["mask"].clone()
    for begin, end in gaps:
        mask[:, begin:end] = False
    return call.replace(mask=mask)


def one_of_many(call: Call, others: Call) -> tuple[Call, slice]:
    """A row packed behind half of the others' rows, and where it stands."""
    half, length = others.tensors["values"].shape
    half //= 2
    width = call.tensors["values"].shape[1]

    def between(name: str, x: Tensor) -> Tensor:
        y = others.tensors[name]
        return torch.cat([y[:half].flatten(), x.flatten(), y[half:].flatten()])

    lengths = torch.full((2 * half + 1,), length)
    lengths[half] = width
    ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    flat = {name: between(name, x) for name, x in call.tensors.items()}
    flat["cu_seqlens"] = ends.to(call.tensors["values"].device)
    return call._replace(tensors=flat), slice(half * length, half * length + width)


@EVERY
@pytest.mark.parametrize("end", [LENGTH, 8192], ids=["full", "padded"])
def test_every_walk_gives_the_same_bits(
    kernel: str, device: str, op: str, options: dict[str, Any], end: int
) -> None:
    """A block for each chunk, a block, or a warp: gaps longer than a chunk, an end at one's."""
    call = testing.FACTORIES[op]((1, LENGTH), device=device, **options)
    call = holes(call, (2000, 5200), (end, LENGTH))
    want = rowwise(run(call, kernel))
    for count, length in ((6, 3), (140, 150), (140, 20)):
        others = testing.FACTORIES[op]((count, length), device=device, seed=1, **options)
        packed, where = one_of_many(call, others)
        got = run(packed, kernel)
        for name, x in want.items():
            assert same_bits(got[name][where], x[0]), (count, length, name)


@pytest.mark.parametrize("steps", [5, 100, 1100])
@pytest.mark.parametrize(
    "options",
    [p[1] for p in PRESETS.values() if p[0] == "gae"],
    ids=[k for k, p in PRESETS.items() if p[0] == "gae"],
)
def test_time_major_gives_the_same_bits(
    kernel: str, device: str, options: dict[str, Any], steps: int
) -> None:
    """Slabs of many sequences' steps against a warp or a block for each of some."""
    rows = {5: 300, 100: 70, 1100: 1030}[steps]
    call = holes(gae_call((rows, steps), device=device, **options), (steps // 3, steps // 2))
    turned = {k: v.T.contiguous() if v.dim() == 2 else v for k, v in call.tensors.items()}
    got = run(call._replace(tensors=turned).option(time_major=True), kernel)
    some = torch.tensor([0, 33, rows - 1], device=device)
    want = run(testing.with_rows(call, some), kernel)
    for name, x in rowwise(want).items():
        assert same_bits(got[name].T[some].contiguous(), x), name


@pytest.mark.parametrize("mask", [None, "random"])
@pytest.mark.parametrize("steps", [5, 100])
def test_time_major_of_any_stride_gives_the_same_bits(
    kernel: str, device: str, steps: int, mask: str | None
) -> None:
    """Columns side by side, where one offset serves all tensors, and columns apart."""
    options: dict[str, Any] = {"mask": mask, "extras": ("bootstrap",), "time_major": True}
    call = gae_call((steps, 70), device=device, **options)
    tables = {k: v for k, v in call.tensors.items() if v.dim() == 2}
    apart = call.replace(**{k: v.repeat_interleave(2, 1)[:, ::2] for k, v in tables.items()})
    a, b = run(call, kernel), run(apart, kernel)
    assert all(same_bits(a[k], b[k]) for k in a)


@pytest.mark.parametrize("op", ["gae", "rlhf_advantages"])
def test_every_walk_gives_the_same_moments(kernel: str, device: str, op: str) -> None:
    """To rounding: who adds what is the launch's choice."""
    for shape in ((3, LENGTH), (140, 300), (40, 90)):
        call = testing.FACTORIES[op](shape, mask="right", device=device)
        out = run(call, kernel)
        keep = call.tensors["mask"]
        live = out["advantages"][keep].double()
        want = torch.stack([keep.sum(), live.mean(), (live - live.mean()).square().sum()])
        assert torch.allclose(out["moments"], want, rtol=1e-12, atol=1e-12), shape


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_precisions(kernel: str, device: str, first: torch.dtype) -> None:
    call = gae_call((3, 50), device=device, extras=(*ENDS, "rho"), dtype=first)
    for other in (torch.float32, torch.bfloat16, torch.float16):
        low = {"values": call.tensors["values"].to(other), "rho": call.tensors["rho"].to(other)}
        testing.assert_agrees(call.replace(**low), kernel)


@pytest.mark.parametrize("op", ["gae", "rlhf_advantages"])
def test_offsets_of_any_stride(kernel: str, device: str, op: str) -> None:
    call = testing.FACTORIES[op]((60,), packed=True, device=device)
    ends = call.tensors["cu_seqlens"]
    spread = torch.stack([ends, -ends], 1)[:, 0]
    a, b = run(call, kernel), run(call.replace(cu_seqlens=spread), kernel)
    assert all(same_bits(a[k], b[k]) for k in a)


BAD = ([1, 4], [0, 20, 10], [0, 50_000], [-1, 7], [0, 1 << 40], [-(1 << 40), 3])


def of_offsets(op: str, n: int, ends: list[int], device: str) -> tuple[Tensor, ...]:
    """Straight from the kernel: on a CPU, Python would have looked at the offsets."""
    call = (gae_call if op == "gae" else rlhf_call)(
        (n,), mask="random", packed=True, device=device
    )
    t, cu = call.tensors, torch.tensor(ends, device=device)
    if op == "gae":
        lam = Lambda(0.95, None, 0)
        return calls.gae(
            "cuda",
            t["rewards"],
            t["values"],
            gamma=0.99,
            lam_adv=lam,
            lam_ret=lam,
            mask=t["mask"],
            masked=0,
            cu_seqlens=cu,
            time_major=False,
            **dict.fromkeys(("next_values", "bootstrap", "terminated", "truncated", "rho", "c")),
        )
    return calls.rlhf_advantages(
        "cuda",
        torch.ones(len(ends) - 1, device=device),
        t["logprobs"],
        t["ref_logprobs"],
        t["values"],
        t["mask"],
        kl_coef=0.2,
        kl_coef_tensor=None,
        estimator=0,
        kl_clamp=math.inf,
        gamma=0.99,
        lam=0.95,
        score_at=0,
        masked=0,
        bootstrap=None,
        reward_min=-math.inf,
        reward_max=math.inf,
        cu_seqlens=cu,
    )


@pytest.mark.parametrize("op", ["gae", "rlhf_advantages"])
@pytest.mark.parametrize("n", [40, 600, 9000])
def test_bad_offsets_on_the_device_make_nan(kernel: str, device: str, op: str, n: int) -> None:
    """Nothing outside is touched, every output is NaN, and the next call is as ever."""
    for ends in (*([*start, n] for start in BAD), [0, n - 1], [0, n + 1], [0]):
        for out in of_offsets(op, n, ends, device):
            assert bool(out.isnan().all()), ends
    good = of_offsets(op, n, [0, 3, n], device)
    assert not any(bool(out.isnan().any()) for out in good)
