"""Tests of the lines on docs/integrations/prime_rl.md against prime-rl's formulas in fp64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from by_path import CLOSE, compared, lines, normal
from torch import Tensor

from ppo_fast import compat


class Outputs(NamedTuple):
    """prime-rl's LossOutputs."""

    loss: Tensor
    metrics: dict[str, Tensor]


def prime_inputs(weighted: bool) -> SimpleNamespace:
    n = 60
    rollout = normal(0, n).exp().neg()
    mask = normal(1, n) > -1
    nan = torch.where(mask, 0.0, float("nan"))
    weights = normal(2, n).abs() if weighted else None
    return SimpleNamespace(
        trainer_logprobs=(rollout + normal(3, n, scale=0.3)).clamp(max=-1e-3),
        inference_logprobs=rollout,
        ref_logprobs=None,
        advantages=normal(4, n) + nan,
        loss_mask=mask,
        loss_weights=weights,
    )


def prime_loss(x: SimpleNamespace, new: Tensor, kind: str) -> Tensor:
    """Σ w (−M A τ_A ρ + τ_KL d²) over the mask; M drops by the difference of probabilities."""
    d = new - x.inference_logprobs
    gap = new.detach().exp() - x.inference_logprobs.exp()
    advantages = 0.7 * torch.where(x.loss_mask, x.advantages, 0.0)
    if kind == "dppo":
        dropped = torch.where(advantages > 0, gap > 0.05, gap < -0.08)
    else:
        dropped = gap.abs() > 0.06
    terms = torch.where(dropped, 0.0, -advantages * d.exp()) + 0.01 * d**2
    weights = 1.0 if x.loss_weights is None else x.loss_weights
    return torch.where(x.loss_mask, terms * weights, 0.0).sum()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", ["dppo", "ipo"])
def test_prime_rl(kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines(
        monkeypatch, "prime_rl", "def dppo", prime_rl__trainer__rl__loss={"LossOutputs": Outputs}
    )
    x = prime_inputs(weighted)
    bounds = {"low": 0.08, "high": 0.05} if kind == "dppo" else {"threshold": 0.06}

    def ours(new: Tensor) -> Tensor:
        out = found[kind](
            SimpleNamespace(**{**vars(x), "trainer_logprobs": new}),
            **bounds,
            adv_tau=0.7,
            kl_tau=0.01,
        )
        d = (new - x.inference_logprobs).detach()[x.loss_mask]
        torch.testing.assert_close(
            out.metrics["mismatch_kl"], (d.exp() - d - 1).mean(), rtol=1e-12, atol=1e-12
        )
        gap = (new.detach().exp() - x.inference_logprobs.exp())[x.loss_mask]
        up = x.advantages[x.loss_mask] > 0
        dropped = torch.where(up, gap > 0.05, gap < -0.08) if kind == "dppo" else gap.abs() > 0.06
        assert 0 < int(dropped.sum()) < dropped.numel()
        assert float(out.metrics["is_masked"]) == pytest.approx(float(dropped.double().mean()))
        return out.loss

    compared(ours, lambda new: prime_loss(x, new, kind), x.trainer_logprobs)


def test_prime_rl_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"selective_log_softmax": None, "compute_entropy": None}
    found = lines(monkeypatch, "prime_rl", "as trainer", prime_rl__trainer__rl__train=names)[
        "trainer"
    ]
    assert found.selective_log_softmax is compat.selective_log_softmax
    logits = normal(5, 2, 7, 11)
    p = logits.log_softmax(-1)
    torch.testing.assert_close(found.compute_entropy(logits), -(p.exp() * p).sum(-1), **CLOSE)
