"""tianshou on CartPole: its on-policy trainer, patched against unpatched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from control import Weights, assert_trains_alike, loop, weights

import ppo_fast
from ppo_fast.integrations import tianshou as swap

tianshou = pytest.importorskip("tianshou", reason="needs `pip install tianshou==2.0.1`")
gymnasium = pytest.importorskip("gymnasium")

from tianshou.algorithm import PPO, Reinforce
from tianshou.algorithm.algorithm_base import Algorithm
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

UPDATES = 6


def algorithm(kind: str = "ppo", **options: Any) -> Any:
    torch.manual_seed(0)
    np.random.seed(0)
    env = gymnasium.make("CartPole-v1")
    net = Net(state_shape=(4,), hidden_sizes=(32,))
    actor = DiscreteActor(preprocess_net=net, action_shape=2, softmax_output=False)
    policy = DiscreteActorPolicy(actor=actor, action_space=env.action_space)
    optim = AdamOptimizerFactory(lr=1e-3)
    if kind == "reinforce":
        return Reinforce(policy=policy, optim=optim, gamma=0.97)
    return PPO(
        policy=policy,
        critic=DiscreteCritic(preprocess_net=net),
        optim=optim,
        gamma=0.97,
        gae_lambda=0.9,
        **options,
    )


def train(agent: Any) -> Weights:
    """Six updates on 128 steps of two environments, in two passes each."""
    envs = DummyVectorEnv([lambda: gymnasium.make("CartPole-v1") for _ in range(2)])
    envs.seed(0)
    collector = Collector(agent, envs, VectorReplayBuffer(512, 2))
    agent.run_training(
        OnPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=128 * UPDATES,
            collection_step_num_env_steps=128,
            update_step_num_repetitions=2,
            batch_size=64,
            show_progress=False,
            verbose=False,
        )
    )
    return networks(agent)


def networks(agent: Any) -> Weights:
    return weights(agent.policy, *([agent.critic] if hasattr(agent, "critic") else []))


@pytest.mark.parametrize("scaling", [False, True])
def test_trains_alike(scaling: bool) -> None:
    def run() -> Weights:
        return train(algorithm(return_scaling=scaling))

    start = networks(algorithm(return_scaling=scaling))
    assert_trains_alike(swap.integration, run, UPDATES, start)


def test_reinforce_trains_alike() -> None:
    """It has no critic: λ = 1 and values from the running mean of the returns."""
    start = networks(algorithm("reinforce"))
    assert_trains_alike(swap.integration, lambda: train(algorithm("reinforce")), UPDATES, start)


def test_making_an_algorithm_is_no_call() -> None:
    """Every algorithm has `_gae` compiled by calling it; that must not count as reached."""
    with pytest.raises(ppo_fast.integrations.NeverReachedError, match="gae"), swap.patched():
        algorithm()


@pytest.mark.parametrize("ends", [[], [6], [0, 3], [0, 1, 2, 3, 4, 5, 6]], ids=str)
def test_episodes_of_any_length(ends: list[int]) -> None:
    """Beside a loop in doubles: none ending, one step each, the last one cut or not."""
    rng = np.random.default_rng(0)
    rewards, values, after = rng.standard_normal((3, 7))
    done = np.isin(np.arange(7), ends)
    got = swap.integration.swaps[0].fused(values, after, rewards, done, 0.9, 0.8)
    want = loop(rewards=rewards, values=values, next_values=after, done=done, gamma=0.9, lam=0.8)
    for name, exact in zip(("advantage", "returns"), want, strict=True):
        assert got[name].dtype == np.float64
        size = 10 * float(np.abs([rewards, values, after]).max())
        assert float(np.abs(got[name] - exact).max()) <= 7 * 8 * 2.0**-52 * size


def test_it_stays_a_static_method() -> None:
    before = vars(Algorithm)["compute_episodic_return"]
    agent = algorithm()
    with swap.patched():
        assert type(vars(Algorithm)["compute_episodic_return"]) is staticmethod
        train(agent)
    assert vars(Algorithm)["compute_episodic_return"] is before
