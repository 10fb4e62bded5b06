"""Training runs of tianshou on CartPole, in the words of 2.0 and, where it is older, of 1.2."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import gymnasium
import numpy as np
import torch
from control import Weights, weights
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.utils.net import discrete
from tianshou.utils.net.common import Net

UPDATES, STEPS = 6, 128
GAMMA, LAM = 0.97, 0.9
# In 1.2 an algorithm is a policy, which holds its networks and its optimiser.
ALGORITHMS = importlib.util.find_spec("tianshou.algorithm") is not None


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


def make(kind: str = "ppo", **options: Any) -> Any:
    """PPO, or REINFORCE, which has no critic."""
    seed()
    env = gymnasium.make("CartPole-v1")
    net = Net(state_shape=(4,), hidden_sizes=(32,))
    return (_algorithm if ALGORITHMS else _policy)(kind, net, env.action_space, options)


def _algorithm(kind: str, net: Any, actions: Any, options: dict[str, Any]) -> Any:
    algorithm = importlib.import_module("tianshou.algorithm")
    reinforce = importlib.import_module("tianshou.algorithm.modelfree.reinforce")
    optim = importlib.import_module("tianshou.algorithm.optim").AdamOptimizerFactory(lr=1e-3)
    actor = discrete.DiscreteActor(preprocess_net=net, action_shape=2, softmax_output=False)
    policy = reinforce.DiscreteActorPolicy(actor=actor, action_space=actions)
    if kind == "reinforce":
        return algorithm.Reinforce(policy=policy, optim=optim, gamma=GAMMA)
    return algorithm.PPO(
        policy=policy,
        critic=discrete.DiscreteCritic(preprocess_net=net),
        optim=optim,
        gamma=GAMMA,
        gae_lambda=LAM,
        **options,
    )


def _policy(kind: str, net: Any, actions: Any, options: dict[str, Any]) -> Any:
    policies = importlib.import_module("tianshou.policy")
    actor = discrete.Actor(preprocess_net=net, action_shape=2, softmax_output=False)
    critic = discrete.Critic(preprocess_net=net)
    networks = torch.nn.ModuleList([actor] if kind == "reinforce" else [actor, critic])
    shared = {
        "actor": actor,
        "optim": torch.optim.Adam(networks.parameters(), lr=1e-3),
        "dist_fn": lambda logits: torch.distributions.Categorical(logits=logits),
        "action_space": actions,
        "action_scaling": False,
        "discount_factor": GAMMA,
    }
    if kind == "reinforce":
        return policies.PGPolicy(**shared)
    scaling = options.pop("return_scaling", False)
    return policies.PPOPolicy(
        **shared, critic=critic, gae_lambda=LAM, reward_normalization=scaling, **options
    )


def train(agent: Any) -> Weights:
    """Six updates on 128 steps of two environments, in two passes each."""
    envs = DummyVectorEnv([lambda: gymnasium.make("CartPole-v1") for _ in range(2)])
    envs.seed(0)
    collector = Collector(agent, envs, VectorReplayBuffer(512, 2))
    trainer = importlib.import_module("tianshou.trainer")
    quiet = {"show_progress": False, "verbose": False, "batch_size": 64}
    if ALGORITHMS:
        params = trainer.OnPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=STEPS * UPDATES,
            collection_step_num_env_steps=STEPS,
            update_step_num_repetitions=2,
            **quiet,
        )
        agent.run_training(params)
    else:
        trainer.OnpolicyTrainer(
            policy=agent,
            train_collector=collector,
            max_epoch=1,
            step_per_epoch=STEPS * UPDATES,
            step_per_collect=STEPS,
            repeat_per_collect=2,
            episode_per_test=1,  # no test is asked for; its absence is refused
            **quiet,
        ).run()
    return networks(agent)


def networks(agent: Any) -> Weights:
    actor = agent.policy if ALGORITHMS else agent.actor
    return weights(actor, *([agent.critic] if hasattr(agent, "critic") else []))
