"""Importance weights: their numbers, what they multiply, and what a run logs of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from loop_helpers import batch_of, trainer

import ppo_fast
from ppo_fast.loop import TrainConfig
from ppo_fast.loop.data.experience import importance, weighted
from ppo_fast.loop.update import accumulate


@pytest.mark.case("R11")
def test_weights_are_truncated_ratios_and_one_outside_the_mask() -> None:
    ratios = torch.tensor([[0.5, 1.0, 4.0], [2.0, 8.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    behaviour = torch.full((2, 3), -1.5, dtype=torch.float64)
    old = behaviour + ratios.log()
    old[1, 2] = math.nan  # nothing outside the mask may be read
    weights, stats = importance(old, behaviour, mask, 2.0)
    wanted = torch.tensor([[0.5, 1.0, 2.0], [2.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(weights, wanted, rtol=1e-15, atol=0)
    assert stats == {
        "is_mean": pytest.approx(5.5 / 4, rel=1e-14),
        "is_max": pytest.approx(4.0, rel=1e-14),
        "is_truncated": 0.25,
        "is_ess": pytest.approx(5.5**2 / (0.25 + 1 + 4 + 4) / 4, rel=1e-14),
    }


def test_equal_policies_weigh_one_exactly() -> None:
    old = torch.tensor([[-0.3, -7.0]])
    weights, stats = importance(old, old.clone(), torch.ones(1, 2, dtype=torch.bool), 2.0)
    assert weights.eq(1).all() and set(stats.values()) == {1.0, 0.0} and stats["is_ess"] == 1.0


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("head", ["linear", "logits"])
def test_weights_multiply_the_policy_term_only(tmp_path: Path, head: str, backend: str) -> None:
    """The loss of a minibatch against its sum written out; at ratio 1 a token loses -w·A."""
    options = {"head": head, "backend": backend, "entropy_coef": 0.1, "is_truncation": 1.25}
    t = trainer(tmp_path, dtype=torch.float64, **options)
    rollout, batch, plan = batch_of(t)
    behaviour = batch.scored.old + 0.3 * torch.randn_like(batch.scored.old)
    batch, stats = weighted(batch, rollout._replace(logprobs=behaviour), t.is_cap)
    assert 0 < stats["is_truncated"] < 1 and 0.5 < stats["is_ess"] < 1
    rows = torch.cat(plan[0])
    done = accumulate(t.agent, batch, plan[0], 0.0, t.backend, unchanged=True)
    assert done is not None
    computed = done.compute()
    mask = batch.seqs.mask[rows]
    advantages = ppo_fast.whiten(batch.advantages, moments=batch.moments)[rows][mask]
    weights = (batch.scored.old - behaviour).exp().clamp(max=1.25)[rows][mask]
    wanted = -(weights * advantages).mean() - 0.1 * computed["entropy"]
    assert computed["loss"] == pytest.approx(float(wanted), rel=1e-12)


def test_own_rollouts_weigh_one_up_to_the_samplers_rounding(tmp_path: Path) -> None:
    record = trainer(tmp_path / "a", dtype=torch.float64, is_truncation=2.0).step()
    assert record["is_mean"] == pytest.approx(1.0, abs=1e-6) and record["is_truncated"] == 0
    assert record["rollout_gap_max"] == pytest.approx(0.0, abs=1e-6)
    assert "is_mean" not in trainer(tmp_path / "b", dtype=torch.float64).step()


def test_bad_cap() -> None:
    with pytest.raises(ValueError, match="is_truncation must be positive, got 0"):
        TrainConfig(is_truncation=0.0)
