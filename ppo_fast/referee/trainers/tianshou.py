"""tianshou's PPO: its GAE, and the statements of its update."""

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

PACKAGE = "tianshou"
OPTIONS: dict[str, Any] = {
    "gamma": 0.97,
    "gae_lambda": 0.9,
    "eps_clip": 0.2,
    "dual_clip": None,
    "value_clip": True,
}


def probes(options: dict[str, Any]) -> list[Probe | Missing]:
    """GAE, whitening, policy and value loss."""
    base: Any = importlib.import_module("tianshou.algorithm.algorithm_base")
    ppo: Any = importlib.import_module("tianshou.algorithm.modelfree.ppo")
    clip, dual = options["eps_clip"], options["dual_clip"]
    update, normalise = ppo.PPO._update_with_batch, "if self.advantage_normalization:"
    return [
        Probe(
            "gae",
            base._gae,
            partial(_gae, options),
            StepGAE(gamma=options["gamma"], lam=options["gae_lambda"]),
            "steps",
            taken=("the next value is 0 where terminated, as compute_episodic_return makes it",),
        ),
        Probe(
            "policy_loss",
            of_function(update, "ratios = (dist.log_prob(", "if self.dual_clip:"),
            flat(partial(_policy_loss, options)),
            PolicyLoss(clip_low=clip, clip_high=clip, dual_clip=dual),
            case={"edges": Edges(clip, clip, dual)},
            left_out=LEFT_OUT,
        ),
        Probe(
            "value_loss",
            of_function(update, "value = self.critic(", "if self.value_clip:"),
            flat(partial(_value_loss, options), "values"),
            ValueLoss(clip=clip if options["value_clip"] else None, scale=1.0),
            left_out=LEFT_OUT,
            taken=("vf_coef stands for the factor ½",),
        ),
        Probe(
            "whiten",
            of_function(update, normalise, normalise),
            whitened(_whitened),
            Whiten(eps_at="deviation"),
            left_out=LEFT_OUT | ONE,
            taken=("1e-8 is added to the deviation",),
        ),
    ]


def _gae(options: dict[str, Any], function: Function, batch: Steps) -> Given:
    steps = single(batch)
    after = torch.where(steps.terminated, 0.0, steps.next_values)
    ends = steps.terminated | steps.truncated
    columns = [
        function(
            *(x[:, env].numpy() for x in (steps.values, after, steps.rewards, ends)),
            options["gamma"],
            options["gae_lambda"],
        )
        for env in range(ends.shape[1])
    ]
    advantages = torch.stack([torch.from_numpy(x) for x in columns], 1)
    return {"advantages": advantages, "returns": advantages + steps.values}


def _policy_loss(options: dict[str, Any], function: Function, rows: dict[str, Tensor]) -> Tensor:
    return function(
        self=SimpleNamespace(**options),
        dist=SimpleNamespace(log_prob=lambda _: rows["logprobs"]),
        minibatch=SimpleNamespace(act=None, logp_old=rows["old_logprobs"]),
        advantages=rows["advantages"],
    )["clip_loss"]


def _value_loss(options: dict[str, Any], function: Function, rows: dict[str, Tensor]) -> Tensor:
    return function(
        self=SimpleNamespace(**options, critic=lambda _: rows["values"]),
        minibatch=SimpleNamespace(obs=None, v_s=rows["old_values"], returns=rows["returns"]),
    )["vf_loss"]


def _whitened(function: Function, x: Tensor) -> Tensor:
    own = SimpleNamespace(advantage_normalization=True, _eps=1e-8)
    return function(self=own, advantages=x)["advantages"]
