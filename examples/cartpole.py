"""PPO on CartPole-v1 with the ops of ppo_fast: Schulman et al. 2017 on a two-action policy.

python examples/cartpole.py --seed 0    (needs: pip install 'ppo_fast[examples]')
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

import ppo_fast

ENVS, STEPS, UPDATES = 8, 64, 200  # 102,400 environment steps
EPOCHS, MINIBATCH, LR, MAX_GRAD_NORM = 10, 128, 2e-3, 0.5
GAMMA, LAM = 0.98, 0.9
LOSS = {"clip_low": 0.2, "clip_high": 0.2, "entropy_coef": 0.005}


class Rollout(NamedTuple):
    """T steps of B environments: observations (T, B, 4), the rest (T, B).

    `next_values` are the critic's of the state a step led to, also where an episode ended in it.
    """

    observations: Tensor
    actions: Tensor
    logprobs: Tensor
    rewards: Tensor
    values: Tensor
    next_values: Tensor
    terminated: Tensor
    truncated: Tensor


def network(outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64, orthogonal initialisation."""
    layers = [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, scale in zip(layers[::2], (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def make_envs(n: int) -> gym.vector.VectorEnv:
    """Environments that begin the next episode within the step that ends one."""
    mode = gym.vector.AutoresetMode.SAME_STEP
    return gym.make_vec("CartPole-v1", n, "sync", vector_kwargs={"autoreset_mode": mode})


class PPO:
    """Policy, critic and their optimiser, on environments that never stand still."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.policy, self.critic = network(2, gain=0.01), network(1, gain=1.0)
        self.parameters = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR, eps=1e-5)
        self.envs = make_envs(ENVS)
        self.observation = torch.from_numpy(self.envs.reset(seed=seed)[0])

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """Follow the policy for STEPS steps."""
        steps, following = [], []
        for _ in range(STEPS):
            logits = self.policy(self.observation)
            action = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
            logprob = ppo_fast.token_logprobs(logits, action).logprobs
            after, reward, terminated, truncated, info = self.envs.step(action.numpy())
            last = after.copy()
            for i in np.flatnonzero(terminated | truncated):
                last[i] = info["final_obs"][i]
            numbers = (torch.from_numpy(x) for x in (reward.astype("f4"), terminated, truncated))
            steps.append((self.observation, action, logprob, *numbers))
            following.append(torch.from_numpy(last))
            self.observation = torch.from_numpy(after)
        observations, actions, logprobs, rewards, terminated, truncated = (
            torch.stack(x) for x in zip(*steps, strict=True)
        )
        values = self.critic(observations).squeeze(-1)
        next_values = self.critic(torch.stack(following)).squeeze(-1)
        return Rollout(
            observations, actions, logprobs, rewards, values, next_values, terminated, truncated
        )

    def update(self, r: Rollout) -> ppo_fast.Stats:
        """Epochs of clipped updates on one rollout; returns the statistics of them all."""
        ends = {name: getattr(r, name) for name in ("next_values", "terminated", "truncated")}
        gae = ppo_fast.gae(r.rewards, r.values, gamma=GAMMA, lam=LAM, time_major=True, **ends)
        columns = (*r[:3], gae.advantages, gae.returns)
        flat = [x.flatten(0, 1) for x in columns]
        total: ppo_fast.Stats | None = None
        orders = torch.cat([torch.randperm(STEPS * ENVS) for _ in range(EPOCHS)])
        for rows in orders.split(MINIBATCH):
            observations, actions, old, advantages, returns = (x[rows] for x in flat)
            new = ppo_fast.token_logprobs(self.policy(observations), actions)
            policy = ppo_fast.ppo_loss(
                new.logprobs, old, ppo_fast.whiten(advantages), entropy=new.entropy, **LOSS
            )
            values = self.critic(observations).squeeze(-1)
            critic = ppo_fast.value_loss(values, None, returns, clip=None)
            self.optimizer.zero_grad()
            (policy.loss + critic.loss).backward()
            nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
            self.optimizer.step()
            stats = policy.stats + critic.stats
            total = stats if total is None else total + stats
        return total

    @torch.no_grad()
    def evaluate(self, episodes: int, seed: int) -> float:
        """Mean return of fresh episodes under the likelier action; 500 is the longest."""
        envs = make_envs(episodes)
        observation, _ = envs.reset(seed=seed)
        alive, returns = np.ones(episodes, bool), np.zeros(episodes)
        while alive.any():
            action = self.policy(torch.from_numpy(observation)).argmax(-1)
            observation, reward, terminated, truncated, _ = envs.step(action.numpy())
            returns += reward * alive
            alive &= ~(terminated | truncated)
        return float(returns.mean())


def train(seed: int, updates: int = UPDATES) -> PPO:
    """Train, the learning rate falling to zero, and return the agent."""
    agent = PPO(seed)
    for i in range(updates):
        agent.optimizer.param_groups[0]["lr"] = LR * (1 - i / updates)
        stats = agent.update(agent.rollout())
        if (i + 1) % 40 == 0:
            s = stats.compute()
            print(f"update {i + 1}: entropy {s['entropy']:.3f}, KL {s['kl_k3']:.4f}", flush=True)
    return agent


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="PPO on CartPole-v1")
    parser.add_argument("--seed", type=int, default=0)
    seed, start = parser.parse_args().seed, time.perf_counter()
    score = train(seed).evaluate(100, seed=10_000 + seed)
    seconds = time.perf_counter() - start
    print(f"seed {seed}: mean return of 100 episodes {score:.1f}, {seconds:.0f} s")
