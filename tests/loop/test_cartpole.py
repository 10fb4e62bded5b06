"""The CartPole example: what it collects, that it improves, and that it solves its task."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("gymnasium", reason="the example steps gymnasium's environments")
PATH = Path(__file__).resolve().parents[2] / "examples" / "cartpole.py"


@pytest.fixture(scope="module")
def cartpole() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cartpole", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_stays_short() -> None:
    assert len(PATH.read_text().splitlines()) <= 150


def test_a_rollout_closes_episodes_with_the_state_they_ended_in(cartpole: ModuleType) -> None:
    agent = cartpole.PPO(seed=0)
    r = agent.rollout()
    ended = r.terminated | r.truncated
    assert ended.sum() > 5 and r.rewards.eq(1).all()
    # What follows a step within an episode is the next row; where one ended, it is not.
    following = torch.cat([r.values[1:], r.values[-1:]])
    inside = ~ended
    inside[-1] = False
    assert torch.equal(r.next_values[inside], following[inside])
    assert not torch.isclose(r.next_values, following)[:-1][ended[:-1]].any()
    # CartPole ends beyond 2.4 units or 12 degrees; each new row is again near the middle.
    fresh = r.observations[1:][ended[:-1]]
    assert fresh.abs().max() <= 0.05


def test_updates_improve_and_repeat_bitwise(cartpole: ModuleType) -> None:
    agents = [cartpole.train(seed=0, updates=6) for _ in range(2)]
    for a, b in zip(*(agent.parameters for agent in agents), strict=True):
        assert torch.equal(a, b)
    trained = agents[0].evaluate(20, seed=1)
    assert trained == agents[1].evaluate(20, seed=1)
    untrained = cartpole.PPO(seed=0).evaluate(20, seed=1)
    assert trained > 1.5 * untrained  # 90 and 238 when this was written


@pytest.mark.long
def test_one_seed_solves_it(cartpole: ModuleType) -> None:
    assert cartpole.train(seed=0).evaluate(100, seed=10_000) >= 475
