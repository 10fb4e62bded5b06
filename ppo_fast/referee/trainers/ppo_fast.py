"""ppo_fast's own ops, put to the same batches as a trainer's."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

import ppo_fast
from ppo_fast.referee.cases import Steps, Tokens
from ppo_fast.referee.formulas.advantages import GroupAdvantages, StepGAE, TokenGAE, Whiten
from ppo_fast.referee.formulas.losses import PolicyLoss, ValueLoss
from ppo_fast.referee.formulas.tokens import Entropy, LogProbs
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
    "variant": "clip",
    "ratio_level": "token",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "log_ratio_clamp": 20.0,
    "reduction": "token-mean",
    "kl_coef": 0.05,
    "kl_estimator": "k3",
    "kl_clamp": None,
    "entropy_coef": 0.01,
    "clip": 0.2,
    "gamma": 0.97,
    "lam": 0.9,
    "masked": "carry",
    "temperature": 0.7,
    "backend": None,
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "gspo": {"level": "sequence-token"},
    "cispo": {"surrogate": "cispo"},
    "sapo": {"surrogate": "sapo"},
}


def probes(options: dict[str, Any]) -> list[Probe | Missing]:
    """Every op that has a formula here."""
    heat = {"temperature": options["temperature"]}
    ways = {"gamma": options["gamma"], "lam": options["lam"]}
    reduction = {"reduction": options["reduction"]}
    holes = {"carry": "skip", "zero": "zero"}[options["masked"]]

    def rows(output: str) -> Any:
        return values_and_gradient(
            lambda f, x, b: getattr(
                f(x, b.labels, temperature=b.temperature, backend=options["backend"]), output
            ),
            "logits",
        )

    return [
        _policy_loss(options),
        Probe(
            "value_loss",
            ppo_fast.value_loss,
            over_step(partial(_value_loss, options), "values"),
            ValueLoss(clip=options["clip"], **reduction),
        ),
        Probe("logprobs", ppo_fast.token_logprobs, rows("logprobs"), LogProbs(), "logits", heat),
        Probe("entropy", ppo_fast.token_logprobs, rows("entropy"), Entropy(), "logits", heat),
        Probe(
            "whiten",
            ppo_fast.whiten,
            lambda f, b: {"value": f(b.rewards.float(), b.mask, backend=options["backend"])},
            Whiten(),
            left_out={"one-token": "its deviation is 0/0"},
            taken=("1e-8 is added to the variance",),
        ),
        Probe("gae", ppo_fast.gae, partial(_gae, options), TokenGAE(holes=holes, **ways)),
        Probe("step_gae", ppo_fast.gae, partial(_step_gae, options), StepGAE(**ways), "steps"),
        Probe(
            "group_advantages",
            ppo_fast.group_advantages,
            lambda f, b: {"value": f(b.scores.float(), b.groups)},
            GroupAdvantages(),
            "groups",
            taken=("1e-6 is added to the deviation",),
        ),
    ]


def _policy_loss(options: dict[str, Any]) -> Probe | Missing:
    variant = options["variant"]
    if variant not in _VARIANTS:
        known = ", ".join(_VARIANTS)
        return Missing("policy_loss", f"no formula here for variant {variant}, one of {known}")
    level = {"sequence": "sequence"}.get(options["ratio_level"], "token")
    formula = PolicyLoss(
        **{
            "level": level,
            "clip_low": options["clip_low"],
            "clip_high": options["clip_high"],
            "dual_clip": options["dual_clip"],
            "clamp": options["log_ratio_clamp"],
            "reduction": options["reduction"],
            "kl_coef": options["kl_coef"],
            "kl": options["kl_estimator"],
            "entropy_coef": options["entropy_coef"],
            **_VARIANTS[variant],
        }
    )
    return Probe(
        "policy_loss",
        ppo_fast.ppo_loss,
        over_step(partial(_loss, options), entropies=bool(options["entropy_coef"])),
        formula,
        case={"edges": formula.edges},
    )


def _denom(options: dict[str, Any], window: Window) -> float:
    """The step's count, less what DDP divides by."""
    by_token = options["reduction"] == "token-mean"
    return (window.tokens if by_token else window.sequences) / window.ranks


def _loss(options: dict[str, Any], function: Function, batch: Tokens, window: Window) -> Tensor:
    names = ("variant", "ratio_level", "clip_low", "clip_high", "dual_clip", "log_ratio_clamp")
    more = ("reduction", "kl_coef", "kl_estimator", "kl_clamp", "entropy_coef", "backend")
    return function(
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.mask,
        entropy=batch.entropies if options["entropy_coef"] else None,
        ref_logprobs=batch.ref_logprobs if options["kl_coef"] else None,
        denom=_denom(options, window),
        **{name: options[name] for name in (*names, *more)},
    ).loss


def _value_loss(
    options: dict[str, Any], function: Function, batch: Tokens, window: Window
) -> Tensor:
    return function(
        batch.values,
        batch.old_values,
        batch.returns,
        batch.mask,
        denom=_denom(options, window),
        **{name: options[name] for name in ("clip", "reduction", "backend")},
    ).loss


def _gae(options: dict[str, Any], function: Function, batch: Tokens) -> Given:
    names = ("gamma", "lam", "masked", "backend")
    out = function(
        batch.rewards.float(),
        batch.values.float(),
        mask=batch.mask,
        **{name: options[name] for name in names},
    )
    return {"advantages": out.advantages, "returns": out.returns}


def _step_gae(options: dict[str, Any], function: Function, batch: Steps) -> Given:
    out = function(
        batch.rewards.float(),
        batch.values.float(),
        next_values=batch.next_values.float(),
        terminated=batch.terminated,
        truncated=batch.truncated,
        time_major=True,
        **{name: options[name] for name in ("gamma", "lam", "backend")},
    )
    return {"advantages": out.advantages, "returns": out.returns}
