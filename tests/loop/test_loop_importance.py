"""Importance weights: their numbers, what they multiply, and what a run logs of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from loop_helpers import batch_of, trainer

import ppo_fast
from ppo_fast.loop import TrainConfig
from ppo_fast.loop.data.experience import corrected
from ppo_fast.loop.update import accumulate


@pytest.mark.case("R11")
def test_the_log_has_the_weights_before_and_after_their_bound(tmp_path: Path) -> None:
    t = trainer(tmp_path, dtype=torch.float64)
    rollout, batch, _ = batch_of(t)
    old, mask = batch.scored.old, batch.seqs.mask
    ratios = torch.ones_like(old)
    ratios[0, 0], ratios[1, 0] = 4.0, 0.5
    behaviour = torch.where(mask, old - ratios.log(), math.nan)  # masked slots are not read
    correction = ppo_fast.Correction("token", high=2.0)
    batch, stats = corrected(batch, rollout._replace(logprobs=behaviour), correction, "auto")
    n = int(mask.sum())
    total, squares = n - 2 + 2.5, n - 2 + 4.25
    want = {
        "is_mean": total / n,
        "is_max": 4.0,
        "is_truncated": 1 / n,
        "is_rejected": 0.0,
        "is_ess": total**2 / squares / n,
        "is_unscored": 0.0,
        "rollout_k3": (4 - 1 - math.log(4) + 0.5 - 1 - math.log(0.5)) / n,
    }
    assert stats == {name: pytest.approx(x, rel=1e-12) for name, x in want.items()}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("head", ["linear", "logits"])
def test_weights_multiply_the_policy_term_only(tmp_path: Path, head: str, backend: str) -> None:
    """The loss of a minibatch against its sum written out; at ratio 1 a token loses -w·A."""
    options = {"head": head, "backend": backend, "entropy_coef": 0.1, "correction_high": 1.25}
    t = trainer(tmp_path, dtype=torch.float64, **options)
    rollout, batch, plan = batch_of(t)
    behaviour = batch.scored.old + 0.3 * torch.randn_like(batch.scored.old)
    batch, stats = corrected(batch, rollout._replace(logprobs=behaviour), t.correction, backend)
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
    record = trainer(tmp_path / "a", dtype=torch.float64, correction_high=2.0).step()
    assert record["is_mean"] == pytest.approx(1.0, abs=1e-6) and record["is_truncated"] == 0
    assert record["rollout_gap_max"] == pytest.approx(0.0, abs=1e-6)
    assert "is_mean" not in trainer(tmp_path / "b", dtype=torch.float64).step()


def test_bad_cap() -> None:
    with pytest.raises(ValueError, match="correction_high must be positive, got 0"):
        TrainConfig(correction_high=0.0)
