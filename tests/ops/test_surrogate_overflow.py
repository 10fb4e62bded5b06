"""Surrogates beside a ratio that overflows, without `log_ratio_clamp`: a flat term has no NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import ppo_fast
from ppo_fast import _checks, surrogates
from ppo_fast.testing import Call, run

OVER = 200.0  # e^200 is a number in fp64, and inf in fp32


def one_row(device: str, variant: Any, level: str, adv: float, weight: float = 1.0) -> Call:
    new = torch.full((1, 2), -1.0, device=device)
    tensors = {
        "logprobs": new,
        "old_logprobs": new - OVER,
        "advantages": torch.full_like(new, adv),
        "is_weights": torch.full_like(new, weight),
    }
    options = {"variant": variant, "ratio_level": level, "log_ratio_clamp": None}
    loss = {"loss": torch.tensor(1.0, device=device)}
    return Call("ppo_loss", tensors, {"reduction": "token-sum", **options}, loss)


FLAT = {
    "clip above": (surrogates.clip(0.2, 0.3), 1.0, -2 * 1.3),
    "dual clip": (surrogates.clip(0.2, 0.3, 3.0), -1.0, 2 * 3.0),
    "sapo, A > 0": (surrogates.sapo(2.0, 4.0), 1.0, -2 * 2.0),
    "sapo, A < 0": (surrogates.sapo(2.0, 4.0), -1.0, 2 * 1.0),
    "dropped by dppo": (surrogates.dppo("tv", 0.1, 0.1), 1.0, 0.0),
    **{
        f"A = 0, {s.name}": (s, 0.0, 0.0)
        for s in (
            surrogates.clip(),
            surrogates.sapo(),
            surrogates.reinforce(),
            surrogates.cispo(),
            surrogates.dppo("kl", 0.1, 0.1),
        )
    },
}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("case", FLAT)
def test_flat_terms(backend: str, device: str, case: str, level: str) -> None:
    """Value by hand and a slope of exactly 0."""
    variant, adv, want = FLAT[case]
    out = run(one_row(device, variant, level, adv), backend)
    assert math.isclose(float(out["loss"]), want, rel_tol=1e-6, abs_tol=0.0)
    assert out["grad_logprobs"].abs().max() == 0.0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", [surrogates.clip(), surrogates.reinforce()])
def test_a_weight_of_0_drops_a_term_that_overflows(
    backend: str, device: str, surrogate: ppo_fast.Surrogate, level: str
) -> None:
    out = run(one_row(device, surrogate, level, -1.0, 0.0), backend)
    assert float(out["loss"]) == 0.0 and out["grad_logprobs"].abs().max() == 0.0
    out = run(one_row(device, surrogate, level, -1.0, 1.0), backend)
    assert float(out["loss"]) == math.inf and bool((out["grad_logprobs"] == math.inf).all())


@pytest.mark.parametrize("adv", [0.0, 1.0])
@pytest.mark.parametrize("surrogate", [surrogates.clip(), surrogates.sapo()])
def test_a_nan_shows(backend: str, device: str, surrogate: ppo_fast.Surrogate, adv: float) -> None:
    """A log-probability that is NaN is no ratio that overflows, whatever the advantage."""
    call = one_row(device, surrogate, "token", adv)
    call = call.replace(old_logprobs=torch.full((1, 2), math.nan, device=device))
    assert math.isnan(float(run(call, backend)["loss"]))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_does_not_reach_a_surrogate(backend: str) -> None:
    """A product in it stays fp32."""
    surrogate = ppo_fast.Surrogate(lambda t: -t.advantages * (t.ratio[:, None] @ eye)[:, 0])
    eye, old = torch.ones(1, 1), torch.linspace(-2.0, -1.0, 6).view(2, 3)
    new, adv = (old + 0.1).requires_grad_(), torch.ones(2, 3)
    want = torch.autograd.grad(
        ppo_fast.ppo_loss(new, old, adv, variant=surrogate, backend=backend).loss, new
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = ppo_fast.ppo_loss(new, old, adv, variant=surrogate, backend=backend)
    assert torch.equal(torch.autograd.grad(loss, new)[0], want[0])


@pytest.mark.parametrize("couples", [False, True])
def test_a_slope_that_is_not_finite_is_told_when_debugging(
    monkeypatch: pytest.MonkeyPatch, couples: bool
) -> None:
    def root(t: ppo_fast.TokenTerms) -> torch.Tensor:
        return -t.advantages * (t.ratio - 1.0).abs().sqrt()

    old, adv = torch.zeros(2, 3), torch.ones(2, 3)
    new = torch.full((2, 3), 0.1)
    new[1, 2] = 0.0  # the root's slope is infinite at a ratio of 1
    surrogate = ppo_fast.Surrogate(root, couples=couples)
    loss, _ = ppo_fast.ppo_loss(new, old, adv, variant=surrogate)
    assert bool(loss.isfinite())
    monkeypatch.setattr(_checks, "DEBUG", True)
    with pytest.raises(
        ValueError, match=r"Surrogate 'root': slopes must be finite, got .*\(1, 2\)"
    ):
        ppo_fast.ppo_loss(new, old, adv, variant=surrogate)
