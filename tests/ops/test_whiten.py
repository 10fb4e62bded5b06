"""whiten and the moments that it takes."""

from __future__ import annotations

import itertools

import pytest
import torch

import ppo_fast
from ppo_fast import Moments, testing
from ppo_fast.testing import run, whiten_call

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = list(itertools.product([True, False], [True, False], ["var", "std"]))


@pytest.mark.parametrize("shift_mean, unbiased, eps_at", VARIANTS)
def test_within_budget(
    backend: str, device: str, shift_mean: bool, unbiased: bool, eps_at: str
) -> None:
    options = {"shift_mean": shift_mean, "unbiased": unbiased, "eps_at": eps_at, "device": device}
    for shape, mask in (((5, 13), "random"), ((37,), None)):
        testing.assert_agrees(whiten_call(shape, mask=mask, eps=1e-3, **options), backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_precisions(backend: str, device: str, dtype: torch.dtype) -> None:
    testing.assert_agrees(whiten_call((5, 13), dtype=dtype, device=device), backend)


@pytest.mark.case("N16")
@pytest.mark.parametrize("count", [2, 3, 1000, 100_000])
def test_far_from_zero(backend: str, device: str, count: int) -> None:
    """Around 1e4 with spread 1: mean within 1e-5 of 0, deviation within 1e-5 of 1."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(device) + 1e4
    out = ppo_fast.whiten(x, backend=backend).double()
    assert abs(float(out.mean())) <= 1e-5 and abs(float(out.std()) - 1) <= 1e-5
    out = ppo_fast.whiten(x, unbiased=False, backend=backend).double()
    assert abs(float(out.std(correction=0)) - 1) <= 1e-5


@pytest.mark.parametrize("op", ["gae", "rlhf_advantages"])
@pytest.mark.parametrize("mask", ["random", "right", "empty", "row"])
def test_moments_are_those_of_the_unmasked_advantages(
    backend: str, device: str, op: str, mask: str
) -> None:
    call = testing.FACTORIES[op]((5, 21), mask=mask, device=device)
    out = run(call, backend)
    kept = out["advantages"][call.tensors["mask"]].double()
    n, mean, m2 = out["moments"].tolist()
    assert n == kept.numel()
    want = float(kept.mean()) if n else 0.0
    assert mean == pytest.approx(want, rel=1e-6, abs=1e-7)
    assert m2 == pytest.approx(float((kept - want).square().sum()), rel=1e-6)


def test_given_moments_are_those_computed(backend: str, device: str) -> None:
    """The moments of `gae` whiten its advantages as a pass of whiten's own would."""
    call = testing.gae_call((5, 21), device=device)
    out, mask = run(call, backend), call.tensors["mask"]
    own = ppo_fast.whiten(out["advantages"], mask, backend=backend)
    given = ppo_fast.whiten(
        out["advantages"], mask, moments=Moments(out["moments"]), backend=backend
    )
    assert torch.allclose(own, given, rtol=1e-6, atol=1e-6)
    assert not bool(given[~mask].any())


@pytest.mark.case("X10")
@pytest.mark.parametrize("shift_mean, unbiased, eps_at", VARIANTS)
@pytest.mark.parametrize("kept", [0, 1, 5])
def test_without_variance(
    backend: str, device: str, kept: int, shift_mean: bool, unbiased: bool, eps_at: str
) -> None:
    """No sample, one, or equal ones give 0 (the mean without the shift), never NaN."""
    x = torch.full((2, 6), 3.0, device=device)
    mask = torch.zeros(2, 6, dtype=torch.bool, device=device)
    mask[1, :kept] = True
    out = ppo_fast.whiten(
        x, mask, shift_mean=shift_mean, unbiased=unbiased, eps_at=eps_at, eps=0.0, backend=backend
    )
    assert torch.equal(out, torch.where(mask, 0.0 if shift_mean else 3.0, 0.0))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (1, 1), (1,)], ids=str)
def test_small_shapes(backend: str, device: str, shape: tuple[int, ...]) -> None:
    out = ppo_fast.whiten(torch.ones(shape, device=device), backend=backend)
    assert out.shape == shape and not bool(out.any())
