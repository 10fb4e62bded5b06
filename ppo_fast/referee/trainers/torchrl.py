"""torchrl: both of its GAEs, and the statements of ClipPPOLoss."""

from __future__ import annotations

import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ppo_fast.referee.cases import Edges, Steps
from ppo_fast.referee.formulas.advantages import StepGAE
from ppo_fast.referee.formulas.losses import PolicyLoss
from ppo_fast.referee.judge import Given
from ppo_fast.referee.statements import of_function
from ppo_fast.referee.trainers import Function, Missing, Probe
from ppo_fast.referee.trainers._control import LEFT_OUT, flat, single

PACKAGE = "torchrl"
OPTIONS: dict[str, Any] = {"gamma": 0.97, "lmbda": 0.9, "clip_epsilon": 0.2}


def probes(options: dict[str, Any]) -> list[Probe | Missing]:
    """GAE and policy loss."""
    loss: Any = importlib.import_module("torchrl.objectives").ClipPPOLoss
    functional: Any = importlib.import_module("torchrl.objectives.value.functional")
    clip = options["clip_epsilon"]
    formula = StepGAE(gamma=options["gamma"], lam=options["lmbda"])
    gaes = {
        "gae": functional.generalized_advantage_estimate,
        "vec_gae": functional.vec_generalized_advantage_estimate,
    }
    return [
        *(
            Probe(name, function, partial(_gae, options), formula, "steps")
            for name, function in gaes.items()
        ),
        Probe(
            "policy_loss",
            of_function(loss.forward, "gain1 = log_behav_weight", "gain = torch.stack("),
            flat(partial(_policy_loss, loss, clip)),
            PolicyLoss(clip_low=clip, clip_high=clip),
            case={"edges": Edges(clip, clip)},
            left_out=LEFT_OUT,
            taken=("the reduction is the mean",),
        ),
        Missing("value_loss", "needs a critic network within the loss module"),
    ]


def _gae(options: dict[str, Any], function: Function, batch: Steps) -> Given:
    steps = single(batch)
    rows = [x.movedim(0, 1)[..., None] for x in steps if x.ndim == 2]
    rewards, values, after, terminated, truncated = rows
    found = function(
        options["gamma"],
        options["lmbda"],
        values,
        after,
        rewards,
        terminated | truncated,
        terminated,
    )
    advantages, returns = (x[..., 0].movedim(1, 0) for x in found)
    return {"advantages": advantages, "returns": returns}


def _policy_loss(loss: Any, clip: float, function: Function, rows: dict[str, Tensor]) -> Tensor:
    log_weight = rows["logprobs"] - rows["old_logprobs"]
    own = SimpleNamespace(_asymmetric_clip=False, clip_epsilon=torch.tensor(clip))
    bounds = loss._clip_bounds
    get: Any = bounds.fget if isinstance(bounds, property) else bounds
    found = function(
        self=SimpleNamespace(_clip_bounds=get(own)),
        log_weight=log_weight,
        log_behav_weight=log_weight,
        log_is_weight=None,
        advantage=rows["advantages"],
    )
    return -found["gain"].mean()
