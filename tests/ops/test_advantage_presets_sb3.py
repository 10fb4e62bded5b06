"""Stable-Baselines3's rollout buffer, whose flags (and CleanRL's) say that an episode starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from installed import assert_near, reach
from preset_inputs import ENVS, STEPS, Episodes, episodes
from torch import Tensor

import ppo_fast

GAMMA, LAM = 0.97, 0.9


def sb3(x: Episodes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SB3's rollout buffer, filled as its collector does: `(T, B)`, episode starts for flags."""
    buffers = pytest.importorskip(
        "stable_baselines3.common.buffers", reason="needs `pip install stable-baselines3==2.9.*`"
    )
    spaces = pytest.importorskip("gymnasium").spaces
    buffer = buffers.RolloutBuffer(
        STEPS, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", LAM, GAMMA, n_envs=ENVS
    )
    # The collector's time limits: γV(final observation) goes into the reward.
    rewards = x.rewards + GAMMA * x.next_values * x.truncated
    start = torch.ones(ENVS)
    for t in range(STEPS):
        nothing = np.zeros((ENVS, 1))
        buffer.add(
            nothing,
            nothing,
            rewards[:, t].numpy(),
            start.numpy(),
            x.values[:, t],
            torch.zeros(ENVS),
        )
        start = x.done[:, t].float()
    buffer.compute_returns_and_advantage(x.next_values[:, -1], x.done[:, -1].numpy())
    arrays = buffer.advantages, buffer.returns, buffer.rewards, buffer.episode_starts
    a, b, c, d = (torch.from_numpy(y.copy()) for y in arrays)
    return a, b, c, d


def float32(x: Episodes) -> Episodes:
    return Episodes(*(y.float() for y in x[:3]), *x[3:])


@pytest.mark.case("N8")
def test_sb3_with_its_flags_shifted(backend: str, device: str) -> None:
    """A flag says that an episode starts *at* t: shifted by one step it ends one. fp32 only."""
    x = float32(episodes(backend))
    advantages, returns, rewards, starts = sb3(x)
    ends = torch.cat([starts[1:], x.done[:, -1:].T.float()])
    out = ppo_fast.gae(
        rewards.to(device),
        x.values.T.to(device),
        gamma=GAMMA,
        lam=LAM,
        bootstrap=x.next_values[:, -1].to(device),
        terminated=ends.to(device),
        time_major=True,
        backend=backend,
    )
    size = reach(rewards, x.values, GAMMA, LAM)
    assert_near(out.advantages.cpu(), advantages, size, STEPS)
    assert_near(out.returns.cpu(), returns, size, STEPS)


def test_sb3_time_limits_are_truncations(backend: str, device: str) -> None:
    """`truncated` and V' do what SB3 does by adding to the reward at a time limit."""
    x = float32(episodes(backend))
    advantages, returns, *_ = sb3(x)
    out = ppo_fast.gae(**x.on(device).kwargs(), gamma=GAMMA, lam=LAM, backend=backend)
    size = reach(x.rewards, torch.cat([x.values, x.next_values]), GAMMA, LAM)
    assert_near(out.advantages.T.cpu(), advantages, size, STEPS)
    assert_near(out.returns.T.cpu(), returns, size, STEPS)


@pytest.mark.case("N8")
def test_start_flags_left_unshifted_are_wrong(backend: str, device: str) -> None:
    """Rewards 1, V = 0, γ = λ = 1, a new episode at step 2: two steps are left of each.

    As end flags they would end the first episode one step late, in the second one's reward.
    """
    starts, ones = torch.tensor([[1, 0, 1, 0]]), torch.ones(1, 4)
    ends = torch.cat([starts[:, 1:], torch.ones(1, 1, dtype=torch.long)], 1)
    right, wrong = (
        ppo_fast.gae(
            ones.to(device),
            0 * ones.to(device),
            gamma=1.0,
            lam=1.0,
            terminated=flags.to(device),
            backend=backend,
        ).advantages.tolist()
        for flags in (ends, starts)
    )
    assert right == [[2.0, 1.0, 2.0, 1.0]]
    assert wrong == [[1.0, 2.0, 1.0, 1.0]]
