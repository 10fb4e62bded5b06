"""Stable-Baselines3 on CartPole: the fast rollout buffer against its own."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from control import Weights, assert_near, assert_same_bits, assert_trains_alike, weights

import ppo_fast
from ppo_fast.integrations import MismatchError
from ppo_fast.integrations._patch import Integration, Swap

sb3 = pytest.importorskip(
    "stable_baselines3", reason="needs `pip install stable-baselines3 gymnasium`, 2.7 to 2.9"
)
gymnasium = pytest.importorskip("gymnasium")

from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from ppo_fast.integrations import sb3 as swap

ROLLOUT = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs")
RESULTS = ("advantages", "returns")


class Rollouts(BaseCallback):
    """Parameters and buffers as they are when a rollout has been collected."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Weights, dict[str, np.ndarray]]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        arrays = {
            name: getattr(buffer, name).copy() for name in (*ROLLOUT, "advantages", "returns")
        }
        self.seen.append((weights(self.model.policy), arrays))


def model(buffer: type | None = None, envs: int = 1, wrapper: Any = None, **options: Any) -> Any:
    env = make_vec_env("CartPole-v1", envs, seed=0, wrapper_class=wrapper)
    policy = "MlpPolicy" if wrapper is None else "MultiInputPolicy"
    options = {"n_epochs": 4, **options}
    return sb3.PPO(policy, env, seed=0, device="cpu", rollout_buffer_class=buffer, **options)


class AsDict(gymnasium.ObservationWrapper):
    """CartPole whose observation is a dict of position and angle."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        box = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
        self.observation_space = gymnasium.spaces.Dict({"cart": box, "pole": box})

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return {"cart": observation[:2], "pole": observation[2:]}


def test_trains_alike() -> None:
    """Eight updates of PPO on two environments, through `patched()`."""

    def train() -> Weights:
        return weights(model(envs=2, n_steps=128, batch_size=64).learn(2048).policy)

    assert_trains_alike(swap.integration, train, 8, weights(model(envs=2).policy))


def test_a2c_trains_alike() -> None:
    """A2C makes a buffer of 5 steps for itself."""

    def agent() -> Any:
        return sb3.A2C("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), seed=0, device="cpu")

    def train() -> Weights:
        return weights(agent().learn(200).policy)

    assert_trains_alike(swap.integration, train, 20, weights(agent().policy))


def test_the_first_2048_steps_are_the_originals_to_the_bit() -> None:
    """One rollout: parameters, observations, actions, values and rewards, with the kernels.

    The advantages come after it, and the update that they make is near the original's. With the
    reference's arithmetic the update too is the original's to the bit.
    """
    runs = {}
    for name, buffer, backend in (
        ("theirs", None, "cpu"),
        ("ours", swap.FastRolloutBuffer, "cpu"),
        ("reference", swap.FastRolloutBuffer, "reference"),
    ):
        rollouts = Rollouts()
        with ppo_fast.use_backend(backend):
            trained = model(buffer).learn(2048, callback=rollouts)
        ((before, arrays),) = rollouts.seen
        runs[name] = before, arrays, weights(trained.policy)
    for name in ("ours", "reference"):
        assert_same_bits(runs[name][0], runs["theirs"][0])
        for key in ROLLOUT:
            assert runs[name][1][key].tobytes() == runs["theirs"][1][key].tobytes()
    assert_near(runs["ours"][2], runs["theirs"][2])
    assert_same_bits(runs["reference"][2], runs["theirs"][2])
    for key in RESULTS:
        assert runs["reference"][1][key].tobytes() == runs["theirs"][1][key].tobytes()


def test_dict_observations() -> None:
    theirs = model(wrapper=AsDict, n_steps=256).learn(512)
    with ppo_fast.use_backend("reference"):
        ours = model(swap.FastDictRolloutBuffer, wrapper=AsDict, n_steps=256).learn(512)
    assert type(ours.rollout_buffer).__name__ == "FastDictRolloutBuffer"
    assert_same_bits(weights(ours.policy), weights(theirs.policy))


def test_a_model_is_saved_and_loaded_with_its_buffer() -> None:
    file = io.BytesIO()
    model(swap.FastRolloutBuffer, n_steps=64).save(file)
    file.seek(0)
    loaded = sb3.PPO.load(file, env=make_vec_env("CartPole-v1", 1, seed=0), device="cpu")
    assert type(loaded.rollout_buffer) is swap.FastRolloutBuffer


def unshifted(self: Any, last_values: torch.Tensor, dones: np.ndarray) -> None:
    """The misuse: `episode_starts` taken for ends."""
    rewards, values, starts = map(
        torch.from_numpy, (self.rewards, self.values, self.episode_starts)
    )
    out = ppo_fast.gae(
        rewards,
        values,
        bootstrap=last_values.flatten(),
        terminated=starts,
        gamma=self.gamma,
        lam=self.gae_lambda,
        time_major=True,
    )
    self.advantages, self.returns = out.advantages.numpy(), out.returns.numpy()


def test_unshifted_flags_are_refused() -> None:
    """They end every episode one step late, and the first call is where that comes out."""
    (own,) = swap.integration.swaps
    wrong = Integration(
        "sb3",
        "stable_baselines3",
        "sb3",
        (Swap("gae", own.place, unshifted, view=own.view),),
    )
    method = RolloutBuffer.compute_returns_and_advantage
    message = r"sb3: gae: .*advantages.*the original gives"
    with pytest.raises(MismatchError, match=message), wrong.patched():
        model(n_steps=128).learn(128)
    assert RolloutBuffer.compute_returns_and_advantage is method


def test_unshifted_flags_are_wrong_by_whole_rewards() -> None:
    """On a real rollout with ends in it: nothing fails, and every episode's end is off."""
    trained = model(n_steps=128).learn(128)
    buffer = trained.rollout_buffer
    buffer.reset()
    rollouts = Rollouts()
    trained.learn(128, callback=rollouts, reset_num_timesteps=False)
    arrays = rollouts.seen[0][1]
    ends = np.flatnonzero(arrays["episode_starts"][1:, 0])
    assert ends.size >= 2
    theirs = arrays["advantages"][ends, 0]
    for name in (*ROLLOUT, *RESULTS):
        setattr(buffer, name, arrays[name])
    unshifted(buffer, torch.zeros(1), np.zeros(1))
    assert float(np.abs(buffer.advantages[ends, 0] - theirs).min()) > 0.5


def test_cartpole_is_solved() -> None:
    """475 of 500, the mean of 20 episodes of the policy as it acts when it is used."""
    trained = model(
        swap.FastRolloutBuffer,
        envs=8,
        n_steps=32,
        batch_size=256,
        n_epochs=20,
        gae_lambda=0.8,
        gamma=0.98,
        learning_rate=lambda left: 1e-3 * left,
        clip_range=lambda left: 0.2 * left,
    ).learn(100_000)
    mean, _ = evaluate_policy(trained, make_vec_env("CartPole-v1", 1, seed=7), n_eval_episodes=20)
    assert mean >= 475
