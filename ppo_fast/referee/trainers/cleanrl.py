"""CleanRL's ppo.py: its statements, read from the file and not imported."""

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
from ppo_fast.referee.statements import of_script
from ppo_fast.referee.trainers import Function, Missing, Probe
from ppo_fast.referee.trainers._control import LEFT_OUT, ONE, flat, single, whitened

PACKAGE = "cleanrl"
OPTIONS: dict[str, Any] = {"gamma": 0.97, "gae_lambda": 0.9, "clip_coef": 0.2, "clip_vloss": True}


def probes(options: dict[str, Any]) -> list[Probe | Missing]:
    """GAE, whitening, policy and value loss."""
    clip = options["clip_coef"]
    scope = {"torch": torch, "np": importlib.import_module("numpy")}
    read = partial(of_script, "cleanrl.ppo", scope)
    return [
        Probe(
            "gae",
            read("advantages = torch.zeros_like(rewards)", "returns = advantages + values"),
            partial(_gae, options),
            StepGAE(gamma=options["gamma"], lam=options["gae_lambda"]),
            "steps",
            taken=("done is set where an episode is terminated or truncated, as gym gives it",),
        ),
        Probe(
            "policy_loss",
            read("logratio = newlogprob", "pg_loss = torch.max("),
            flat(partial(_policy_loss, options)),
            PolicyLoss(clip_low=clip, clip_high=clip),
            case={"edges": Edges(clip, clip)},
            left_out=LEFT_OUT,
        ),
        Probe(
            "value_loss",
            read("newvalue = newvalue.view(-1)", "if args.clip_vloss:"),
            flat(partial(_value_loss, options), "values"),
            ValueLoss(clip=clip if options["clip_vloss"] else None),
            left_out=LEFT_OUT,
        ),
        Probe(
            "whiten",
            read("if args.norm_adv:", "if args.norm_adv:"),
            whitened(_whitened),
            Whiten(eps_at="deviation"),
            left_out=LEFT_OUT | ONE,
            taken=("1e-8 is added to the deviation",),
        ),
    ]


def _args(options: dict[str, Any], **more: Any) -> SimpleNamespace:
    return SimpleNamespace(**options, **more)


def _gae(options: dict[str, Any], function: Function, batch: Steps) -> Given:
    steps = single(batch)
    ends = (steps.terminated | steps.truncated).float()
    found = function(
        args=_args(options, num_steps=len(ends)),
        device="cpu",
        rewards=steps.rewards,
        values=steps.values,
        dones=torch.cat([torch.zeros_like(ends[:1]), ends[:-1]]),
        next_done=ends[-1],
        next_value=steps.last_values[None],
    )
    return {"advantages": found["advantages"], "returns": found["returns"]}


def _policy_loss(options: dict[str, Any], function: Function, rows: dict[str, Tensor]) -> Tensor:
    return function(
        args=_args(options, norm_adv=False),
        newlogprob=rows["logprobs"],
        b_logprobs=rows["old_logprobs"],
        b_advantages=rows["advantages"],
        mb_inds=slice(None),
        clipfracs=[],
    )["pg_loss"]


def _value_loss(options: dict[str, Any], function: Function, rows: dict[str, Tensor]) -> Tensor:
    return function(
        args=_args(options),
        newvalue=rows["values"],
        b_values=rows["old_values"],
        b_returns=rows["returns"],
        mb_inds=slice(None),
    )["v_loss"]


def _whitened(function: Function, x: Tensor) -> Tensor:
    return function(args=SimpleNamespace(norm_adv=True), mb_advantages=x)["mb_advantages"]
