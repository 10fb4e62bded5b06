"""Functions of one's own with plain arguments: no trainer is needed.

A function names the arguments that it wants, and gets those. Losses are called once for each
micro-batch of each rank; those of a rank are added, ranks are averaged.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppo_fast.referee.formulas.advantages import GroupAdvantages, StepGAE, TokenGAE, Whiten
from ppo_fast.referee.formulas.losses import PolicyLoss, ValueLoss
from ppo_fast.referee.formulas.tokens import KL, Entropy, LogProbs
from ppo_fast.referee.judge import Given
from ppo_fast.referee.trainers import (
    Function,
    Missing,
    Probe,
    Window,
    over_step,
    values_and_gradient,
)

PACKAGE = None
OPTIONS: dict[str, Any] = {
    "surrogate": "clip",
    "level": "token",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "reduction": "token-mean",
    "kl_coef": 0.0,
    "kl": "k3",
    "kl_weight": None,
    "entropy_coef": 0.0,
    "value_clip": 0.2,
    "value_scale": 0.5,
    "gamma": 0.97,
    "lam": 0.9,
    "temperature": 0.7,
    "unbiased": True,
    "eps": 1e-8,
}
_WIDTH = 64.0


def probes(options: dict[str, Any]) -> list[Probe | Missing]:
    """The parts that a function can stand for; each needs one."""
    policy = PolicyLoss(
        **{name: options[name] for name in ("surrogate", "level", "clip_low", "clip_high")},
        **{name: options[name] for name in ("dual_clip", "reduction", "kl_coef", "kl")},
        kl_weight=options["kl_weight"],
        entropy_coef=options["entropy_coef"],
        divisor=_WIDTH,
    )
    value = ValueLoss(
        clip=options["value_clip"],
        scale=options["value_scale"],
        reduction=options["reduction"],
        divisor=_WIDTH,
    )
    whiten = Whiten(unbiased=options["unbiased"], eps=options["eps"])
    ways = {"gamma": options["gamma"], "lam": options["lam"]}
    heat = {"temperature": options["temperature"]}
    bonus = bool(options["entropy_coef"])
    edges = {"edges": policy.edges}
    one = {"one-token": "its deviation is 0/0"}
    ask = partial(_asked, options)
    row = values_and_gradient(lambda f, x, b: ask(f, b._replace(logits=x)), "logits")
    kl = values_and_gradient(
        lambda f, x, b: ask(f, replace(b, logprobs=x)), "logprobs", masked=True
    )
    return [
        Probe("policy_loss", _none, over_step(ask, entropies=bonus), policy, case=edges),
        Probe("value_loss", _none, over_step(ask, "values"), value),
        Probe("kl", _none, kl, KL(options["kl"])),
        Probe("logprobs", _none, row, LogProbs(), "logits", heat),
        Probe("entropy", _none, row, Entropy(), "logits", heat),
        Probe("whiten", _none, lambda f, b: {"value": ask(f, b)}, whiten, left_out=one),
        Probe("gae", _none, partial(_pair, ask), TokenGAE(**ways)),
        Probe("step_gae", _none, partial(_pair, ask), StepGAE(**ways), "steps"),
        Probe(
            "group_advantages",
            _none,
            lambda f, b: {"value": ask(f, b)},
            GroupAdvantages(unbiased=options["unbiased"], eps=options["eps"]),
            "groups",
        ),
    ]


def _none(**_: Any) -> None:
    """No function: `plain` is what a function of one's own is like."""


def _pair(ask: Any, function: Function, batch: Any) -> Given:
    advantages, returns = ask(function, batch)
    return {"advantages": advantages, "returns": returns}


def _asked(
    options: dict[str, Any], function: Function, batch: Any, window: Window | None = None
) -> Any:
    """The function's result for the arguments that it names."""
    fields = batch._asdict() if hasattr(batch, "_asdict") else dict(vars(batch))
    counts = {} if window is None else window._asdict()
    known = {**options, **fields, **counts}
    wanted = inspect.signature(function).parameters
    for name, parameter in wanted.items():
        if name not in known and parameter.default is inspect.Parameter.empty:
            raise TypeError(f"an argument {name!r}; there are {', '.join(sorted(known))}")
    given = {name: known[name] for name in wanted if name in known}
    return function(**{name: _single(x) for name, x in given.items()})


def _single(x: Any) -> Any:
    """fp32 for fp64."""
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.float64 else x
