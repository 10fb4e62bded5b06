"""tianshou on CartPole: its on-policy trainer, patched against unpatched."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from control import Weights, assert_trains_alike, loop

import ppo_fast
from ppo_fast.integrations import tianshou as swap

pytest.importorskip("tianshou", reason="needs `pip install tianshou`, 1.2 to 2.0")
pytest.importorskip("gymnasium")

import tianshou_run
from tianshou_run import UPDATES, make, networks, train


def holder() -> type:
    """The class of `compute_episodic_return`: Algorithm, and in 1.2 BasePolicy."""
    if tianshou_run.ALGORITHMS:
        return importlib.import_module("tianshou.algorithm.algorithm_base").Algorithm
    return importlib.import_module("tianshou.policy.base").BasePolicy


@pytest.mark.parametrize("scaling", [False, True])
def test_trains_alike(scaling: bool) -> None:
    def run() -> Weights:
        return train(make(return_scaling=scaling))

    start = networks(make(return_scaling=scaling))
    assert_trains_alike(swap.integration, run, UPDATES, start)


def test_reinforce_trains_alike() -> None:
    """It has no critic: λ = 1 and values from the running mean of the returns."""
    start = networks(make("reinforce"))
    assert_trains_alike(swap.integration, lambda: train(make("reinforce")), UPDATES, start)


def test_making_an_algorithm_is_no_call() -> None:
    """Every algorithm has `_gae` compiled by calling it; that must not count as reached."""
    with pytest.raises(ppo_fast.integrations.NeverReachedError, match="gae"), swap.patched():
        make()


@pytest.mark.parametrize("ends", [[], [6], [0, 3], [0, 1, 2, 3, 4, 5, 6]], ids=str)
def test_episodes_of_any_length(ends: list[int]) -> None:
    """Beside a loop in doubles: none ending, one step each, the last one cut or not."""
    rng = np.random.default_rng(0)
    rewards, values, after = rng.standard_normal((3, 7))
    done = np.isin(np.arange(7), ends)
    got = swap._advantages(values, after, rewards, done, 0.9, 0.8)
    want = loop(rewards=rewards, values=values, next_values=after, done=done, gamma=0.9, lam=0.8)
    for name, exact in zip(("advantage", "returns"), want, strict=True):
        assert got[name].dtype == np.float64
        size = 10 * float(np.abs([rewards, values, after]).max())
        assert float(np.abs(got[name] - exact).max()) <= 7 * 8 * 2.0**-52 * size


def test_it_stays_a_static_method() -> None:
    before = vars(holder())["compute_episodic_return"]
    agent = make()
    with swap.patched():
        assert type(vars(holder())["compute_episodic_return"]) is staticmethod
        train(agent)
    assert vars(holder())["compute_episodic_return"] is before
