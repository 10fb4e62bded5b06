"""skrl's PPO agent: `compute_gae`, which whitens, and the statements of `update`."""

from __future__ import annotations

import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ppo_fast.referee.cases import Edges, Steps
from ppo_fast.referee.formulas.advantages import StepGAE
from ppo_fast.referee.formulas.losses import PolicyLoss, ValueLoss
from ppo_fast.referee.judge import Given
from ppo_fast.referee.statements import of_function
from ppo_fast.referee.trainers import Function, Missing, Probe
from ppo_fast.referee.trainers._control import LEFT_OUT, flat, single

PACKAGE = "skrl"
OPTIONS: dict[str, Any] = {
    "discount_factor": 0.97,
    "gae_lambda": 0.9,
    "time_limit_bootstrap": False,
    "ratio_clip": 0.2,
    "value_clip": 0.2,
    "value_loss_scale": 1.0,
}


def probes(options: dict[str, Any]) -> list[Probe | Missing]:
    """GAE, policy and value loss."""
    ppo: Any = importlib.import_module("skrl.agents.torch.ppo.ppo")
    clip, shaped = options["ratio_clip"], options["time_limit_bootstrap"]
    shape = "if self.cfg.time_limit_bootstrap and truncated.any():"
    shaping = of_function(ppo.PPO.record_transition, shape, shape)
    return [
        Probe(
            "gae",
            ppo.compute_gae,
            partial(_gae, options, shaping if shaped else None),
            StepGAE(gamma=options["discount_factor"], lam=options["gae_lambda"], whiten=True),
            "steps",
            taken=("advantages are whitened within the function, 1e-8 is added to the deviation",),
        ),
        Probe(
            "policy_loss",
            of_function(ppo.PPO.update, "ratio = torch.exp(next_log_prob", "policy_loss = -torch"),
            flat(partial(_policy_loss, options)),
            PolicyLoss(clip_low=clip, clip_high=clip),
            case={"edges": Edges(clip, clip)},
            left_out=LEFT_OUT,
        ),
        Probe(
            "value_loss",
            of_function(ppo.PPO.update, "if self.cfg.value_clip > 0:", "value_loss = self.cfg"),
            flat(partial(_value_loss, options), "values"),
            ValueLoss(clip=options["value_clip"] or None, scale=options["value_loss_scale"]),
            left_out=LEFT_OUT,
            taken=("value_loss_scale stands for the factor ½",),
        ),
    ]


def _gae(options: dict[str, Any], shaping: Any, function: Function, batch: Steps) -> Given:
    steps = single(batch)
    rewards = steps.rewards.clone()
    if shaping is not None:
        own = SimpleNamespace(
            **vars(_own(options)),
            value=SimpleNamespace(act=lambda inputs, role: (inputs["states"], None)),
            _observation_preprocessor=lambda x: x,
            _state_preprocessor=lambda x: x,
            _value_preprocessor=lambda x, inverse: x,
        )
        names = {"next_observations": None, "next_states": steps.next_values}
        shaped = shaping(self=own, rewards=rewards, truncated=steps.truncated, **names)
        rewards = shaped["rewards"]
    returns, advantages = function(
        rewards=rewards[..., None],
        terminated=steps.terminated[..., None],
        truncated=steps.truncated[..., None],
        values=steps.values[..., None],
        last_values=steps.last_values[..., None],
        discount_factor=options["discount_factor"],
        lambda_coefficient=options["gae_lambda"],
        time_limit_bootstrap=options["time_limit_bootstrap"],
    )
    return {"advantages": advantages[..., 0], "returns": returns[..., 0]}


def _own(options: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(cfg=SimpleNamespace(**options))


def _policy_loss(options: dict[str, Any], function: Function, rows: dict[str, Tensor]) -> Tensor:
    return function(
        self=_own(options),
        next_log_prob=rows["logprobs"],
        sampled_log_prob=rows["old_logprobs"],
        sampled_advantages=rows["advantages"],
    )["policy_loss"]


def _value_loss(options: dict[str, Any], function: Function, rows: dict[str, Tensor]) -> Tensor:
    return function(
        self=_own(options),
        predicted_values=rows["values"],
        sampled_values=rows["old_values"],
        sampled_returns=rows["returns"],
    )["value_loss"]
