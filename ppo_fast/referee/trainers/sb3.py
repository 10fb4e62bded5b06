"""Stable-Baselines3's PPO: its rollout buffer's GAE, and the statements of `train`."""

from __future__ import annotations

import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ppo_fast.referee.cases import Edges, Steps
from ppo_fast.referee.formulas.advantages import StepGAE, Whiten
from ppo_fast.referee.formulas.losses import PolicyLoss, ValueLoss
from ppo_fast.referee.judge import Given
from ppo_fast.referee.statements import of_function
from ppo_fast.referee.trainers import Function, Missing, Probe
from ppo_fast.referee.trainers._control import LEFT_OUT, ONE, flat, single, whitened

PACKAGE = "stable_baselines3"
OPTIONS: dict[str, Any] = {
    "gamma": 0.97,
    "gae_lambda": 0.9,
    "clip_range": 0.2,
    "clip_range_vf": 0.2,
}


def probes(options: dict[str, Any]) -> list[Probe | Missing]:
    """GAE, whitening, policy and value loss."""
    train = importlib.import_module("stable_baselines3.ppo.ppo").PPO.train
    buffers: Any = importlib.import_module("stable_baselines3.common.buffers")
    clip, value_clip = options["clip_range"], options["clip_range_vf"]
    normalise = "if self.normalize_advantage and len(advantages) > 1:"
    return [
        Probe(
            "gae",
            buffers.RolloutBuffer.compute_returns_and_advantage,
            partial(_gae, options),
            StepGAE(gamma=options["gamma"], lam=options["gae_lambda"]),
            "steps",
            taken=(
                "gamma times the terminal value is added to a truncated step's reward, as in"
                " collect_rollouts",
            ),
        ),
        Probe(
            "policy_loss",
            of_function(train, "ratio = th.exp(log_prob", "policy_loss = -th.min("),
            flat(partial(_policy_loss, clip)),
            PolicyLoss(clip_low=clip, clip_high=clip),
            case={"edges": Edges(clip, clip)},
            left_out=LEFT_OUT,
        ),
        Probe(
            "value_loss",
            of_function(train, "if self.clip_range_vf is None:\n    values_pred", "value_loss ="),
            flat(partial(_value_loss, value_clip), "values"),
            ValueLoss(clip=value_clip, scale=1.0),
            left_out=LEFT_OUT,
            taken=("vf_coef stands for the factor ½",),
        ),
        Probe(
            "whiten",
            of_function(train, normalise, normalise),
            whitened(_whitened),
            Whiten(eps_at="deviation"),
            left_out=LEFT_OUT | ONE,
            taken=("1e-8 is added to the deviation",),
        ),
    ]


def _gae(options: dict[str, Any], function: Function, batch: Steps) -> Given:
    steps = single(batch)
    ends = steps.terminated | steps.truncated
    starts = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    rewards = steps.rewards + options["gamma"] * steps.next_values * steps.truncated
    buffer = SimpleNamespace(
        buffer_size=len(rewards),
        gamma=options["gamma"],
        gae_lambda=options["gae_lambda"],
        rewards=rewards.numpy(),
        values=steps.values.numpy(),
        episode_starts=starts.float().numpy(),
        advantages=torch.zeros_like(rewards).numpy(),
    )
    function(buffer, steps.last_values, ends[-1].numpy())
    found = {"advantages": buffer.advantages, "returns": buffer.returns}
    return {name: torch.from_numpy(x) for name, x in found.items()}


def _policy_loss(clip: float, function: Function, rows: dict[str, Tensor]) -> Tensor:
    data = SimpleNamespace(old_log_prob=rows["old_logprobs"])
    return function(
        log_prob=rows["logprobs"],
        rollout_data=data,
        advantages=rows["advantages"],
        clip_range=clip,
    )["policy_loss"]


def _value_loss(clip: float | None, function: Function, rows: dict[str, Tensor]) -> Tensor:
    data = SimpleNamespace(old_values=rows["old_values"], returns=rows["returns"])
    return function(
        self=SimpleNamespace(clip_range_vf=clip),
        values=rows["values"],
        rollout_data=data,
        clip_range_vf=clip,
    )["value_loss"]


def _whitened(function: Function, x: Tensor) -> Tensor:
    own = SimpleNamespace(normalize_advantage=True)
    return function(self=own, advantages=x)["advantages"]
