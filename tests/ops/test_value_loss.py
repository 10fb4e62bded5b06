"""value_loss: both forms, the unclipped one, every reduction, statistics."""

from __future__ import annotations

import math

import pytest
import torch

import ppo_fast
from ppo_fast import testing
from ppo_fast._boundary.schema import REDUCTIONS
from ppo_fast.testing import run, value_call

FORMS: list[dict[str, object]] = [{"form": "max"}, {"form": "clipped"}, {"clip": None}]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_within_budget(backend: str, device: str, form: dict[str, object], reduction: str) -> None:
    testing.assert_agrees(
        value_call(mask="row", reduction=reduction, device=device, **form), backend
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_precisions(
    backend: str, device: str, dtype: torch.dtype, form: dict[str, object]
) -> None:
    for mask in (None, "random"):
        testing.assert_agrees(value_call(dtype=dtype, mask=mask, device=device, **form), backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed(backend: str, device: str, reduction: str) -> None:
    options = {"denom": 11.0} if reduction.endswith("norm") else {}
    call = value_call((41,), packed=True, reduction=reduction, device=device, **options)
    testing.assert_agrees(call, backend)


def test_scale_and_denom(backend: str, device: str) -> None:
    testing.assert_agrees(value_call(scale=1.7, denom=3.0, clip=0.05, device=device), backend)
    call = value_call(denom=4.0, device=device)
    tensor = call.option(denom=torch.tensor(4.0, device=device))
    a, b = run(call, backend), run(tensor, backend)
    assert all(testing.same_bits(a[k], b[k]) for k in a)


def test_many_blocks(backend: str, device: str) -> None:
    testing.assert_agrees(value_call((3, 1500), device=device), backend)


def tiny(
    device: str, values: list[float], old: list[float], target: list[float], **options: object
) -> testing.Call:
    tensors = {
        name: torch.tensor(x, device=device)
        for name, x in (("values", values), ("old_values", old), ("returns", target))
    }
    loss = {"loss": torch.tensor(1.0, device=device)}
    return testing.Call(
        "value_loss", tensors, {"reduction": "token-sum", "clip": 0.5, **options}, loss
    )


def test_max_takes_the_worse_term(backend: str, device: str) -> None:
    """Moved towards the target beyond the clip: no gradient. Away from it: the plain gradient."""
    out = run(tiny(device, [1.0, 1.0, 0.25], [0.0, 0.0, 0.0], [2.0, 0.0, 1.0]), backend)
    assert math.isclose(float(out["loss"]), 0.5 * (1.5**2 + 1.0 + 0.75**2), rel_tol=1e-6)
    assert out["grad_values"].tolist() == [0.0, 1.0, -0.75]
    assert ppo_fast.Stats(out["stats"]).compute()["vf_clip_frac"] == pytest.approx(1 / 3)


def test_clipped_stops_outside(backend: str, device: str) -> None:
    call = tiny(device, [1.0, -1.0, 0.5], [0.0, 0.0, 0.0], [2.0, 0.0, 1.0], form="clipped")
    out = run(call, backend)
    assert math.isclose(float(out["loss"]), 0.5 * (1.5**2 + 0.5**2 + 0.5**2), rel_tol=1e-6)
    assert out["grad_values"].tolist() == [0.0, 0.0, -0.5]
    assert ppo_fast.Stats(out["stats"]).compute()["vf_clip_frac"] == pytest.approx(2 / 3)


def test_explained_variance(backend: str, device: str) -> None:
    """1 − Var(R − V)/Var(R), V the old values where given, else the new; exact far from 0."""
    for clip in (0.2, None):
        call = value_call((30,), clip=clip, device=device, mask=None)
        target = call.tensors["returns"] + 1000.0
        shifted = {
            k: call.tensors[k] + 1000.0 for k in ("values", "old_values") if k in call.tensors
        }
        out = run(call.replace(returns=target, **shifted), backend)
        base = shifted.get("old_values", shifted["values"]).double()
        want = 1 - (target.double() - base).var() / target.double().var()
        got = ppo_fast.Stats(out["stats"]).compute()["explained_variance"]
        assert math.isclose(got, float(want), rel_tol=1e-5, abs_tol=1e-5)


@pytest.mark.case("X10")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_kept(backend: str, device: str, reduction: str) -> None:
    out = run(value_call(mask="empty", reduction=reduction, device=device), backend)
    assert float(out["loss"]) == 0.0 and not bool(out["grad_values"].any())


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (1, 1)], ids=str)
def test_small_shapes(backend: str, device: str, shape: tuple[int, ...]) -> None:
    testing.assert_agrees(value_call(shape, device=device, mask="all"), backend)
