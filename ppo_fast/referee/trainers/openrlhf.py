"""OpenRLHF: PolicyLoss, ValueLoss, KL, advantages, log-probabilities, entropy.

A micro-batch's loss is divided by their number, as DeepSpeed does; the counts come from OpenRLHF's
own function, to which all ranks' masks are given where it would add them over ranks.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
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
from ppo_fast.referee.statements import of_function
from ppo_fast.referee.trainers import (
    Function,
    Missing,
    Probe,
    Window,
    over_step,
    values_and_gradient,
)

PACKAGE = "openrlhf"
OPTIONS: dict[str, Any] = {
    "policy_loss_type": "ppo",
    "token_level_loss": True,
    "clip_eps_low": 0.2,
    "clip_eps_high": 0.2,
    "dual_clip": None,
    "clip_eps": 0.5,
    "kl_estimator": "k3",
    "unbiased_gradient": False,
    "gamma": 0.97,
    "lambd": 0.9,
    "temperature": 0.7,
}
_EXCLUDED = {"denominator.empty-rows": "code comment: fully masked sequences are excluded"}
_GROUPS = {
    "group_norm": GroupAdvantages(eps=1e-9),
    "dr_grpo": GroupAdvantages(scale="none"),
    "rloo": GroupAdvantages("others", "none"),
}


def probes(options: dict[str, Any]) -> list[Probe | Missing]:
    """Every part of OpenRLHF that runs on a CPU."""
    _stand_ins()
    loss: Any = importlib.import_module("openrlhf.models.loss")
    utils: Any = importlib.import_module("openrlhf.models.utils")
    norm: Any = importlib.import_module("openrlhf.utils.loss_utils")
    maker: Any = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")
    maker = maker.RemoteExperienceMaker
    average = "token-mean" if options["token_level_loss"] else "seq-mean-token-mean"
    value = loss.ValueLoss(options["clip_eps"], options["token_level_loss"])
    normalised = "if args.algo.advantage.estimator in ['gae',"
    return [
        _policy_loss(options, loss, norm),
        Probe(
            "value_loss",
            loss.ValueLoss.forward,
            over_step(partial(_value_loss, value, norm), "values"),
            ValueLoss(clip=options["clip_eps"], reduction=average),
            documented=_EXCLUDED,
        ),
        Probe(
            "kl",
            utils.compute_approx_kl,
            values_and_gradient(partial(_kl, options), "logprobs", masked=True),
            KL(options["kl_estimator"], "k2" if options["unbiased_gradient"] else "own"),
            documented={"kl.clamp": "code comment: a final cap of the estimate"},
        ),
        Probe(
            "gae",
            maker.get_advantages_and_returns,
            partial(_gae, options),
            TokenGAE(gamma=options["gamma"], lam=options["lambd"]),
        ),
        Probe(
            "whiten",
            of_function(maker.compute_advantages_and_returns, normalised, normalised),
            _whitened,
            Whiten(eps=0.0),
            left_out={"one-token": "its deviation is 0/0"},
            taken=("the variance is at least 1e-8",),
        ),
        *(_group(name, maker) for name in _GROUPS),
        *_of_logits(options, utils),
        Missing("KL loss and entropy bonus", "their sums are statements of a Ray actor's step"),
    ]


def _of_logits(options: dict[str, Any], utils: Any) -> list[Probe]:
    heat = {"temperature": options["temperature"]}
    entropy = utils.compute_entropy
    return [
        Probe(
            "logprobs",
            utils.log_probs_from_logits,
            values_and_gradient(lambda f, x, b: f(x * 1, b.labels, b.temperature), "logits"),
            LogProbs(),
            "logits",
            heat,
        ),
        Probe(
            "entropy",
            getattr(entropy, "_torchdynamo_orig_callable", entropy),
            values_and_gradient(lambda f, x, b: f(x / b.temperature), "logits"),
            Entropy(),
            "logits",
            heat,
            taken=("the logits were divided by the temperature in place before",),
        ),
    ]


def _stand_ins() -> None:
    """Empty modules for imports that need a GPU and that nothing here calls."""
    os.environ.setdefault("DS_BUILD_OPS", "0")
    names: dict[str, tuple[str, ...]] = {
        "flash_attn": (),
        "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
        "flash_attn.utils": (),
        "flash_attn.utils.distributed": ("all_gather",),
        "vllm": (),
        "vllm.inputs": ("TokensPrompt",),
        "vllm.utils": ("random_uuid",),
    }
    absent = {
        root
        for root in ("flash_attn", "vllm")
        if root not in sys.modules and importlib.util.find_spec(root) is None
    }
    for name, attributes in names.items():
        if name.split(".")[0] in absent:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            module.__path__ = []
            vars(module).update(dict.fromkeys(attributes))
            sys.modules[name] = module


def _policy_loss(options: dict[str, Any], loss: Any, norm: Any) -> Probe:
    gspo = options["policy_loss_type"] == "gspo"
    by_token = options["token_level_loss"] and not gspo
    names = ("clip_eps_low", "clip_eps_high", "dual_clip", "token_level_loss")
    own = loss.PolicyLoss(
        policy_loss_type=options["policy_loss_type"], **{name: options[name] for name in names}
    )
    formula = PolicyLoss(
        level="sequence" if gspo else "token",
        clip_low=options["clip_eps_low"],
        clip_high=options["clip_eps_high"],
        dual_clip=options["dual_clip"],
        reduction="token-mean" if by_token else "seq-mean-token-mean",
    )
    return Probe(
        "policy_loss",
        loss.PolicyLoss.forward,
        over_step(partial(_loss, own, norm)),
        formula,
        case={"edges": formula.edges, "per_sequence": gspo},
        documented=_EXCLUDED,
    )


def _info(norm: Any, window: Window) -> dict[str, Any]:
    count = window.micro_batches
    return norm._optimizer_step_loss_norm(window.masks, None, window.ranks, count)


def _loss(own: Any, norm: Any, function: Function, batch: Tokens, window: Window) -> Tensor:
    found = function(
        own,
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        action_mask=batch.mask.float(),
        **_info(norm, window),
    )
    return found[0] / window.micro_batches


def _value_loss(own: Any, norm: Any, function: Function, batch: Tokens, window: Window) -> Tensor:
    found = function(
        own,
        batch.values,
        batch.old_values,
        batch.returns,
        action_mask=batch.mask.float(),
        **_info(norm, window),
    )
    return found / window.micro_batches


def _kl(options: dict[str, Any], function: Function, x: Tensor, batch: Tokens) -> Tensor:
    return function(
        x,
        batch.ref_logprobs.float(),
        kl_estimator=options["kl_estimator"],
        unbiased_gradient=options["unbiased_gradient"],
    )


def _gae(options: dict[str, Any], function: Function, batch: Tokens) -> Given:
    advantages, returns = function(
        None,
        batch.values.float(),
        batch.rewards.float(),
        batch.mask.float(),
        options["gamma"],
        options["lambd"],
    )
    return {"advantages": advantages, "returns": returns}


def _whitened(function: Function, batch: Tokens) -> Given:
    experience = SimpleNamespace(advantages=batch.rewards.float(), action_mask=batch.mask.float())
    advantage = SimpleNamespace(estimator="gae", no_std_norm=False)
    args = SimpleNamespace(algo=SimpleNamespace(advantage=advantage))
    function(args=args, experiences=[experience])
    return {"value": experience.advantages}


def _group(name: str, maker: Any) -> Probe:
    branch = "if args.algo.advantage.estimator == 'rloo':"

    def call(function: Function, batch: Groups) -> Given:
        args = SimpleNamespace(
            algo=SimpleNamespace(advantage=SimpleNamespace(estimator=name)),
            rollout=SimpleNamespace(n_samples_per_prompt=4),
        )
        found = function(args=args, rewards=batch.scores.float().reshape(-1, 4))
        return {"value": torch.flatten(found["rewards"])}

    function = of_function(maker.compute_advantages_and_returns, branch, branch)
    taken = ("1e-9 is added to the deviation",) if name == "group_norm" else ()
    return Probe(f"{name}_advantages", function, call, _GROUPS[name], "groups", taken=taken)
