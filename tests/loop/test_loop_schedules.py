"""Learning rates over a run, the critic's own, and which weights decay."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import trainer, weights
from rich.console import Console

from ppo_fast.loop import CheckpointError, TrainConfig
from ppo_fast.loop.coefficients import lr_share

QUIET = Console(quiet=True)


def shares(**options: object) -> list[float]:
    config = TrainConfig(**{"updates": 8, "warmup": 2} | options)  # type: ignore[arg-type]
    return [lr_share(config, update) for update in range(8)]


def test_the_schedules_by_hand() -> None:
    assert shares() == [0.5, 1.0] + [1.0] * 6
    assert shares(lr_schedule="linear") == pytest.approx([0.5, 1] + [1 - k / 6 for k in range(6)])
    assert shares(lr_schedule="linear", lr_end=0.4) == pytest.approx(
        [0.5, 1] + [0.4 + 0.6 * (1 - k / 6) for k in range(6)]
    )
    cosine = [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert shares(lr_schedule="cosine") == pytest.approx([0.5, 1, *cosine])
    assert shares(lr_schedule="cosine", warmup=0)[0] == 1.0
    assert shares(lr_schedule="linear", warmup=50) == [(k + 1) / 50 for k in range(8)]


def test_the_optimizer_follows(tmp_path: Path) -> None:
    t = trainer(
        tmp_path, lr_schedule="linear", updates=4, critic_lr=0.01, lr=1e-3, weight_decay=0.25
    )
    seen = []
    for _ in range(4):
        record = t.step()
        groups = t.agent.optimizer.param_groups
        seen.append({(g["lr"], g["weight_decay"]) for g in groups})
        assert record["lr"] == max(lr for lr, _ in seen[-1] if lr <= 1e-3)
    for k, found in enumerate(seen):
        share = 1 - k / 4
        assert found == {(x * share, d) for x in (1e-3, 0.01) for d in (0.0, 0.25)}


def test_matrices_decay_and_norms_do_not(tmp_path: Path) -> None:
    """Of weights whose gradient is zero AdamW leaves p · (1 − lr · decay) each step."""
    t = trainer(tmp_path, lr=0.01, critic_lr=0.1, weight_decay=0.5)
    with torch.no_grad():
        for p in t.agent.parameters:
            p.fill_(2.0)
            p.grad = torch.zeros_like(p)
    t.agent.set_lr(1.0)
    t.agent.optimizer.step()
    names = [n for n, p in t.agent.policy.model.named_parameters() if p.requires_grad]
    assert any("norm" in name for name in names)
    for p in t.agent.modules["policy"].parameters():
        if p.requires_grad:
            want = 2.0 * (1 - 0.01 * 0.5) if p.dim() > 1 else 2.0
            torch.testing.assert_close(p, torch.full_like(p, want))
    head = t.agent.modules["critic"].head
    torch.testing.assert_close(head.weight, torch.full_like(head.weight, 2.0 * (1 - 0.1 * 0.5)))
    torch.testing.assert_close(head.bias, torch.full_like(head.bias, 2.0))


def test_groups_of_weights_resume_bit_for_bit(tmp_path: Path) -> None:
    """The optimiser's state goes by weight: its groups have them in another order."""
    options: dict[str, Any] = {"critic_lr": 0.01, "weight_decay": 0.1, "lr_schedule": "cosine"}
    options |= {"save_every": 1, "train_layers": 0}  # norms stand between the layers' matrices
    whole = trainer(tmp_path / "a", updates=4, **options)
    whole.run(QUIET)
    cut = trainer(tmp_path / "b", updates=4, **options)
    for _ in range(2):
        cut.step()
    cut.checkpoints.save(cut)
    resumed = trainer(tmp_path / "b", updates=4, resume=True, **options)
    resumed.run(QUIET)
    for ours, theirs in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(ours, theirs)
    wanted = "updates, which the schedule needs, is 9, the checkpoint's is 4"
    with pytest.raises(CheckpointError, match=wanted):
        trainer(tmp_path / "b", updates=9, resume=True, **options).run(QUIET)
