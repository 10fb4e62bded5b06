"""skrl on CartPole: its PPO agent and trainer, patched against unpatched."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from control import Weights, assert_near, assert_trains_alike, weights
from torch import Tensor, nn

from ppo_fast.integrations import skrl as swap

skrl = pytest.importorskip("skrl", reason="needs `pip install skrl==2.1.* gymnasium`")
gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("torch.utils.tensorboard", reason="needs `pip install tensorboard`")

from skrl.agents.torch.ppo import PPO
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, Model
from skrl.trainers.torch import SequentialTrainer

STEPS, UPDATES, ENVS = 32, 6, 2


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
        return self.net(inputs["observations"]), {}


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
        return self.net(inputs["observations"]), {}


def agent(time_limit_bootstrap: bool = False) -> tuple[Any, Any]:
    torch.manual_seed(0)
    # Episodes of at most 20 steps, so that some are truncated.
    env = wrap_env(gymnasium.make_vec("CartPole-v1", ENVS, max_episode_steps=20))
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
    modules = sorted(own_functions())
    before = {name: importlib.import_module(name).compute_gae for name in modules}
    places = swap.apply()
    try:
        assert sorted(places) == [f"{name}.compute_gae" for name in modules]
        for name in modules:
            module = importlib.import_module(name)
            assert inspect.signature(module.compute_gae) == inspect.signature(before[name])
            assert_same_estimate(module.compute_gae, before[name])
    finally:
        calls = swap.revert()
    assert calls["gae"].fused == len(modules)
    assert {name: importlib.import_module(name).compute_gae for name in modules} == before


def assert_same_estimate(ours: Any, theirs: Any) -> None:
    """Random flags and values, both kinds of signature, in fp64."""
    g = torch.Generator().manual_seed(3)
    x: dict[str, Any] = {
        name: torch.randn(9, 4, 1, generator=g, dtype=torch.float64)
        for name in ("rewards", "values")
    }
    x |= {name: torch.rand(9, 4, 1, generator=g) < 0.2 for name in ("terminated", "truncated")}
    last = torch.randn(4, 1, generator=g, dtype=torch.float64)
    x |= {"last_values": last, "next_values": last, "time_limit_bootstrap": True}
    x |= {"discount_factor": 31 / 32, "lambda_coefficient": 29 / 32}
    names = inspect.signature(theirs).parameters
    given = {name: value for name, value in x.items() if name in names}
    for a, b in zip(ours(**given), theirs(**given), strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 9 * 8 * 2.0**-52 * 10 * float(b.abs().max())
