"""skrl on CartPole: its PPO agent and trainer, patched against unpatched."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from control import Weights, assert_near, assert_trains_alike, weights
from torch import Tensor, nn

from ppo_fast.integrations import NeverReachedError
from ppo_fast.integrations import skrl as swap
from ppo_fast.integrations._extract import extract

skrl = pytest.importorskip("skrl", reason="needs `pip install skrl gymnasium`, skrl 1.4 to 2.1")
gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("torch.utils.tensorboard", reason="needs `pip install tensorboard`")

from skrl.agents.torch.ppo import PPO
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, Model
from skrl.trainers.torch import SequentialTrainer

STEPS, UPDATES, ENVS = 32, 6, 2
# In 1.4 compute_gae is a function inside each agent's `_update`.
NESTED = not hasattr(importlib.import_module("skrl.agents.torch.ppo.ppo"), "compute_gae")
OBSERVATIONS = "states" if NESTED else "observations"


class Policy(CategoricalMixin, Model):
    def __init__(self, env: Any) -> None:
        Model.__init__(
            self,
            observation_space=env.observation_space,
            action_space=env.action_space,
            device="cpu",
        )
        CategoricalMixin.__init__(self)
        self.net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))

    def compute(self, inputs: dict[str, Any], role: str) -> tuple[Tensor, dict[str, Any]]:
        return self.net(inputs[OBSERVATIONS]), {}


class Value(DeterministicMixin, Model):
    def __init__(self, env: Any) -> None:
        Model.__init__(
            self,
            observation_space=env.observation_space,
            action_space=env.action_space,
            device="cpu",
        )
        DeterministicMixin.__init__(self)
        self.net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))

    def compute(self, inputs: dict[str, Any], role: str) -> tuple[Tensor, dict[str, Any]]:
        return self.net(inputs[OBSERVATIONS]), {}


class Flat(gymnasium.vector.VectorWrapper):
    """skrl 1.4 gives an action of one element to each environment, gymnasium takes a number."""

    def step(self, actions: np.ndarray) -> Any:
        return self.env.step(actions.reshape(-1))


def agent(time_limit_bootstrap: bool = False) -> tuple[Any, Any]:
    torch.manual_seed(0)
    # Episodes of at most 20 steps, so that some are truncated.
    env = wrap_env(Flat(gymnasium.make_vec("CartPole-v1", ENVS, max_episode_steps=20)))
    env._env.reset(seed=0)
    env._env.action_space.seed(0)
    ppo = PPO(
        models={"policy": Policy(env), "value": Value(env)},
        memory=RandomMemory(memory_size=STEPS, num_envs=ENVS, device="cpu"),
        observation_space=env.observation_space,
        action_space=env.action_space,
        device="cpu",
        cfg={
            "rollouts": STEPS,
            "learning_epochs": 2,
            "mini_batches": 2,
            "entropy_loss_scale": 0.01,
            "time_limit_bootstrap": time_limit_bootstrap,
            "experiment": {"write_interval": 0, "checkpoint_interval": 0},
        },
    )
    return ppo, env


def train(time_limit_bootstrap: bool) -> Weights:
    ppo, env = agent(time_limit_bootstrap)
    cfg = {
        "timesteps": STEPS * UPDATES,
        "headless": True,
        "disable_progressbar": True,
        "close_environment_at_exit": False,
    }
    SequentialTrainer(env=env, agents=ppo, cfg=cfg).train()
    env.close()
    return weights(ppo.policy, ppo.value)


@pytest.mark.parametrize("time_limit_bootstrap", [False, True])
def test_trains_alike(time_limit_bootstrap: bool) -> None:
    """Near, not to the bit: whitening's sums are in another order."""
    ppo, _ = agent()
    start = weights(ppo.policy, ppo.value)
    assert_trains_alike(
        swap.integration,
        lambda: train(time_limit_bootstrap),
        UPDATES,
        start,
        on_reference=assert_near,
    )


def own_functions() -> set[str]:
    """Every module of skrl's PyTorch agents with a compute_gae in it."""
    root = Path(str(skrl.__file__)).parent
    return {
        "skrl." + ".".join(path.relative_to(root).with_suffix("").parts)
        for path in root.rglob("*/torch/*/*.py")
        if "def compute_gae(" in path.read_text(encoding="utf-8")
    }


def test_every_agent_is_patched_and_put_back() -> None:
    found = swap.integration.find()
    assert {one.swap.place.partition(":")[0] for one in found} == own_functions()
    assert len(swap.apply()) == len(found)
    try:
        for one in found:
            patched = getattr(one.holder, one.key)
            assert patched is not one.original
            assert inspect.signature(patched) == inspect.signature(one.original)
    finally:
        with pytest.raises(NeverReachedError):
            swap.revert()
    assert all(getattr(one.holder, one.key) is one.original for one in found)


@pytest.mark.parametrize("agent", swap._AGENTS)
def test_every_agents_own_estimate(agent: str) -> None:
    """Random flags and values, all that its function, or its statements, take, in fp64."""
    (one,) = (x for x in swap.integration.find() if x.swap.place.startswith(f"skrl.{agent}:"))
    theirs: Any = one.original
    names = tuple(inspect.signature(theirs).parameters)
    if one.swap.block is not None:
        part = extract(theirs, {"gae": one.swap.block})[0]["gae"]
        theirs, names = part.original, part.inputs
        assert part.outputs == ("advantages", "returns")
    x = inputs()
    if agent.endswith("amp"):  # it has a next value for every step
        x["next_values"] = x["values"].flip(0) * ~x["terminated"]
    ours, own = (f(**{name: x[name] for name in names}) for f in (one.swap.fused, theirs))
    if one.swap.block is not None:
        ours, own = ([found[name] for name in part.outputs] for found in (ours, own))
    for a, b in zip(ours, own, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 9 * 8 * 2.0**-52 * 10 * float(b.abs().max())


def inputs() -> dict[str, Any]:
    """Of 9 steps of 4 environments, by all names that a version gives them."""
    g = torch.Generator().manual_seed(3)
    x: dict[str, Any] = {
        name: torch.randn(9, 4, 1, generator=g, dtype=torch.float64)
        for name in ("rewards", "values")
    }
    x |= {name: torch.rand(9, 4, 1, generator=g) < 0.2 for name in ("terminated", "truncated")}
    last = torch.randn(4, 1, generator=g, dtype=torch.float64)
    x |= {"dones": x["terminated"] | x["truncated"], "time_limit_bootstrap": True}
    x |= {"last_values": last, "next_values": last}
    return x | {"discount_factor": 31 / 32, "lambda_coefficient": 29 / 32}
