"""TRL's PPOTrainer, up to 1.12: the statements of its `train`, and the functions they call."""

from __future__ import annotations

import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ppo_fast.referee.cases import Tokens
from ppo_fast.referee.formulas.advantages import TokenGAE, Whiten
from ppo_fast.referee.formulas.losses import PolicyLoss, ValueLoss
from ppo_fast.referee.formulas.tokens import LogProbs
from ppo_fast.referee.judge import Given
from ppo_fast.referee.statements import of_function
from ppo_fast.referee.trainers import (
    Function,
    Missing,
    Probe,
    Window,
    over_step,
    values_and_gradient,
)

PACKAGE = "trl"
OPTIONS: dict[str, Any] = {"gamma": 0.97, "lam": 0.9, "cliprange": 0.2, "cliprange_value": 0.2}
_ONE = {"one-token": "its deviation is 0/0"}
_HOLES = {"tool-tokens": "a response has no tokens of a tool"}


def probes(options: dict[str, Any]) -> list[Probe | Missing]:
    """GAE, whitening, losses, log-probabilities."""
    ppo: Any = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    utils: Any = importlib.import_module("trl.trainer.utils")
    train, clip = ppo.PPOTrainer.train, options["cliprange"]
    policy = PolicyLoss(clip_low=clip, clip_high=clip)
    return [
        Probe(
            "policy_loss",
            of_function(train, "logprobs_diff = new_logprobs", "pg_loss = masked_mean("),
            over_step(partial(_policy_loss, options)),
            policy,
            case={"edges": policy.edges},
        ),
        Probe(
            "value_loss",
            of_function(train, "vpredclipped = torch.clamp(", "vf_loss = 0.5"),
            over_step(partial(_value_loss, options), "values"),
            ValueLoss(clip=options["cliprange_value"]),
        ),
        Probe(
            "gae",
            of_function(train, "lastgaelam = 0", "advantages = masked_whiten("),
            partial(_gae, options),
            TokenGAE(gamma=options["gamma"], lam=options["lam"], whiten=True),
            left_out=_ONE | _HOLES,
            taken=("values and rewards of padding are 0, as `train` has filled them before",),
        ),
        Probe(
            "whiten",
            ppo.masked_whiten,
            lambda f, b: {"value": f(b.rewards.float(), b.mask)},
            Whiten(),
            left_out=_ONE,
            taken=("1e-8 is added to the variance",),
        ),
        Probe(
            "logprobs",
            utils.selective_log_softmax,
            values_and_gradient(lambda f, x, b: f(x, b.labels), "logits"),
            LogProbs(),
            "logits",
            {"temperature": 1.0},
        ),
    ]


def _policy_loss(
    options: dict[str, Any], function: Function, batch: Tokens, window: Window
) -> Tensor:
    found = function(
        args=SimpleNamespace(**options),
        new_logprobs=batch.logprobs,
        mb_logprobs=batch.old_logprobs,
        mb_advantage=batch.advantages,
        padding_mask=~batch.mask,
        micro_batch_inds=slice(None),
    )
    return found["pg_loss"] / window.micro_batches  # as accelerate's backward


def _value_loss(
    options: dict[str, Any], function: Function, batch: Tokens, window: Window
) -> Tensor:
    found = function(
        args=SimpleNamespace(**options),
        vpred=batch.values,
        mb_values=batch.old_values,
        mb_return=batch.returns,
        padding_mask_p1=~batch.mask,
        micro_batch_inds=slice(None),
    )
    return found["vf_loss"] / window.micro_batches


def _gae(options: dict[str, Any], function: Function, batch: Tokens) -> Given:
    rewards, values = (
        torch.where(batch.mask, x, 0).float() for x in (batch.rewards, batch.values)
    )
    found = function(
        args=SimpleNamespace(**options),
        responses=rewards,
        rewards=rewards,
        values=values,
        padding_mask=~batch.mask,
    )
    return {name: found[name] for name in ("advantages", "returns")}
