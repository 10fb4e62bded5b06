"""verl: the policy losses of its registry, value loss, KL, advantages, log-probabilities."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ppo_fast.referee.cases import Groups, Tokens
from ppo_fast.referee.formulas.advantages import GroupAdvantages, TokenGAE, Whiten
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

PACKAGE = "verl"
OPTIONS: dict[str, Any] = {
    "loss_mode": "vanilla",
    "loss_agg_mode": "token-mean",
    "loss_scale_factor": None,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "clip_ratio_c": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "dro_beta": 0.1,
    "kl_loss_type": "low_var_kl",
    "cliprange_value": 0.5,
    "gamma": 0.97,
    "lam": 0.9,
    "temperature": 0.7,
}
_KINDS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
_DOCUMENTED = {
    "ratio.clamp": "code comment: clamped for stability",
    "ratio.ceiling": "code comment: clamped for numerical stability",
}


def probes(options: dict[str, Any]) -> list[Probe | Missing]:
    """Every part of verl that runs on a CPU."""
    with _without_plugins():
        core_algos: Any = importlib.import_module("verl.trainer.ppo.core_algos")
        torch_functional: Any = importlib.import_module("verl.utils.torch_functional")
    return [
        _policy_loss(options, core_algos),
        Probe(
            "value_loss",
            core_algos.compute_value_loss,
            over_step(partial(_value_loss, options), "values"),
            ValueLoss(
                clip=options["cliprange_value"],
                reduction=options["loss_agg_mode"],
                divisor=_divisor(options),
            ),
            left_out=_unlike_lengths(options),
        ),
        _kl(options, core_algos),
        Probe(
            "gae",
            core_algos.compute_gae_advantage_return,
            partial(_gae, options),
            TokenGAE(gamma=options["gamma"], lam=options["lam"], whiten=True),
            left_out={"one-token": "its deviation is 0/0, and verl refuses it"},
            taken=("advantages are whitened within the function, 1e-8 is added to the variance",),
        ),
        *(_group(name, core_algos) for name in ("grpo", "dr_grpo", "rloo")),
        Probe(
            "whiten",
            torch_functional.masked_whiten,
            lambda f, b: {"value": f(b.rewards.float(), b.mask.float())},
            Whiten(),
            left_out={"one-token": "its deviation is 0/0, and verl refuses it"},
            taken=("1e-8 is added to the variance",),
        ),
        *_of_logits(options, torch_functional),
        Missing("ppo_loss", "takes nested tensors of a whole model's output; its terms are above"),
    ]


def _of_logits(options: dict[str, Any], functions: Any) -> list[Probe]:
    heat = {"temperature": options["temperature"]}
    divided = ("the caller divides the logits by the temperature",)
    logprobs = values_and_gradient(
        lambda f, x, b: f(x / b.temperature, b.labels, inplace_backward=False), "logits"
    )
    entropy = values_and_gradient(lambda f, x, b: f(x / b.temperature), "logits")
    found = {
        "logprobs": (functions.logprobs_from_logits, logprobs, LogProbs()),
        "entropy": (functions.entropy_from_logits, entropy, Entropy()),
    }
    return [
        Probe(name, function, call, formula, "logits", heat, taken=divided)
        for name, (function, call, formula) in found.items()
    ]


@contextlib.contextmanager
def _without_plugins() -> Iterator[None]:
    """verl's import without its plugins, of which ppo_fast's own replaces what is to be run."""
    name = "VERL_USE_EXTERNAL_PLUGINS"
    before = os.environ.get(name)
    os.environ[name] = "none"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _divisor(options: dict[str, Any]) -> float:
    return float(options["loss_scale_factor"] or 1.0)


def _unlike_lengths(options: dict[str, Any]) -> dict[str, str]:
    if options["loss_agg_mode"] == "seq-mean-token-sum-norm" and not options["loss_scale_factor"]:
        why = "loss_scale_factor is not set: the divisor is each micro-batch's width"
        return {"long-tail": why} | dict.fromkeys(("random",), why)
    return {}


def _policy_loss(options: dict[str, Any], core_algos: Any) -> Probe | Missing:
    mode, agg = options["loss_mode"], options["loss_agg_mode"]
    low, high = options["clip_ratio_low"], options["clip_ratio_high"]
    of_mode: dict[str, dict[str, Any]] = {
        "vanilla": {"dual_clip": options["clip_ratio_c"]},
        "gspo": {"level": "sequence-token"},
        "cispo": {"surrogate": "cispo"},
        "sapo": {"surrogate": "sapo", "tau": (options["tau_pos"], options["tau_neg"])},
        "gpg": {"surrogate": "gpg"},
        "dro": {"surrogate": "dro", "beta": options["dro_beta"]},
        "dppo_tv": {"surrogate": "dppo_tv", "dual_clip": options["clip_ratio_c"]},
    }
    if mode not in of_mode:
        known = ", ".join(of_mode)
        return Missing("policy_loss", f"no formula here for loss_mode {mode}, one of {known}")
    if mode == "sapo":
        agg = "seq-mean-token-mean"
    formula = PolicyLoss(
        clip_low=low, clip_high=high, reduction=agg, divisor=_divisor(options), **of_mode[mode]
    )
    return Probe(
        "policy_loss",
        core_algos.get_policy_loss_fn(mode),
        over_step(partial(_loss, options)),
        formula,
        case={"edges": formula.edges, "per_sequence": False},
        left_out=_unlike_lengths(options),
        documented=_DOCUMENTED,
    )


def _info(options: dict[str, Any], window: Window) -> dict[str, Any]:
    """The counts that verl's engines give to the losses, of the mini-batch over all ranks."""
    return {
        "dp_size": window.ranks,
        "batch_num_tokens": window.tokens,
        "global_batch_size": window.sequences,
        "loss_scale_factor": options["loss_scale_factor"],
    }


def _loss(options: dict[str, Any], function: Function, batch: Tokens, window: Window) -> Tensor:
    configs: Any = importlib.import_module("verl.workers.config")
    config = configs.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=options["clip_ratio_low"],
        clip_ratio_high=options["clip_ratio_high"],
        clip_ratio_c=options["clip_ratio_c"],
        tau_pos=options["tau_pos"],
        tau_neg=options["tau_neg"],
        policy_loss=configs.PolicyLossConfig(
            loss_mode=options["loss_mode"], dro_beta=options["dro_beta"]
        ),
        global_batch_info=_info(options, window),
    )
    found = function(
        old_log_prob=batch.old_logprobs,
        log_prob=batch.logprobs,
        advantages=batch.advantages,
        response_mask=batch.mask,
        loss_agg_mode=options["loss_agg_mode"],
        config=config,
        rollout_is_weights=None,
    )
    return found[0]


def _value_loss(
    options: dict[str, Any], function: Function, batch: Tokens, window: Window
) -> Tensor:
    return function(
        vpreds=batch.values,
        returns=batch.returns,
        values=batch.old_values,
        response_mask=batch.mask,
        cliprange_value=options["cliprange_value"],
        loss_agg_mode=options["loss_agg_mode"],
        **_info(options, window),
    )[0]


def _kl(options: dict[str, Any], core_algos: Any) -> Probe:
    kind = options["kl_loss_type"]
    base = kind.removesuffix("+")
    return Probe(
        "kl",
        core_algos.kl_penalty,
        values_and_gradient(
            lambda f, x, b: f(x, b.ref_logprobs.float(), kind), "logprobs", masked=True
        ),
        KL(_KINDS.get(base, base), "k2" if kind.endswith("+") else "own"),
        documented={"kl.clamp": "code comment: for numerical stability"},
    )


def _gae(options: dict[str, Any], function: Function, batch: Tokens) -> Given:
    rewards, values = batch.rewards.float(), batch.values.float()
    advantages, returns = function(
        rewards, values, batch.mask.float(), options["gamma"], options["lam"]
    )
    return {"advantages": advantages, "returns": returns}


def _group(name: str, core_algos: Any) -> Probe:
    """Of a reward on a completion's only token."""
    estimator = "grpo" if name == "dr_grpo" else name
    options = {"norm_adv_by_std_in_grpo": name == "grpo"} if estimator == "grpo" else {}

    def call(function: Function, batch: Groups) -> Given:
        scores = batch.scores.float()[:, None]
        index = batch.groups.numpy()
        mask = torch.ones_like(scores)
        found = function(
            token_level_rewards=scores,
            response_mask=mask,
            index=index,
            config=SimpleNamespace(),
            **options,
        )
        return {"value": found[0][:, 0]}

    formula = {
        "grpo": GroupAdvantages(),
        "dr_grpo": GroupAdvantages(scale="none"),
        "rloo": GroupAdvantages("others", "none"),
    }[name]
    taken = ("1e-6 is added to the deviation",) if name == "grpo" else ()
    function = core_algos.get_adv_estimator_fn(estimator)
    return Probe(f"{name}_advantages", function, call, formula, "groups", taken=taken)
