"""verl: its functions on logits, losses and advantages, and its two fused heads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.case import Case
from benchmarks.peers.base import (
    BF16_LOGITS,
    Bound,
    Provider,
    batched,
    leaves,
    needs,
    pair,
    timed,
)
from benchmarks.peers.layout import SequenceRows
from ppo_fast.testing import Call

# A peer is measured as it is, not with the plugin that ppo_fast installs into it.
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
_PACKAGE = "verl==0.9.1"
# Fifteen operations a step.
_MOST_STEPS = 16384


def of(case: Case) -> Iterator[Provider]:
    """The function that verl's workers call for the op."""
    if case.is_call:
        return
    bind, module, computes = _OPS.get(case.op, (None, "", ""))
    rounded = 0.0 if case.dtype == "fp32" else BF16_LOGITS
    if bind is not None:
        there = needs(module, _PACKAGE)

        def missing() -> str | None:
            steps = case.shape.dims[1]
            if case.op == "gae" and steps > _MOST_STEPS:
                return f"a loop over {steps:,} steps takes too long to be timed"
            return there()

        yield Provider("verl", bind, missing, plain=True, roundings=rounded, computes=computes)
    if case.op == "linear_token_logprobs" and case.device == "cuda":
        module = "verl.utils.kernel.linear_cross_entropy"
        yield Provider("verl-triton", _linear_triton, needs(module, _PACKAGE), roundings=rounded)


def _logits(case: Case, call: Call) -> Bound:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    tensors, inputs = leaves(case, call)

    def run() -> tuple[Tensor, Tensor]:
        logits, tokens = batched(tensors["logits"]), batched(tensors["tokens"])
        logprobs = logprobs_from_logits(logits, tokens, inplace_backward=False)
        return logprobs.flatten(), entropy_from_logits(logits).flatten()

    return timed(case, call, run, inputs, pair("logprobs", "entropy"))


def _linear(case: Case, call: Call) -> Bound:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    t, head = call.tensors, FusedLinearForPPO()
    return Bound(lambda: head(t["hidden"], t["weight"], t["tokens"]), pair("logprobs", "entropy"))


def _stats(case: Case, call: Call) -> Bound:
    """Of whole logits: its fused heads have no Σπ²."""
    from verl.utils.torch_functional import (
        calculate_sum_pi_squared_from_logits,
        entropy_from_logits,
        logprobs_from_logits,
    )

    t = call.tensors

    def run() -> tuple[Tensor, ...]:
        logits = F.linear(t["hidden"], t["weight"])
        logprobs = logprobs_from_logits(logits, t["tokens"])
        squares = calculate_sum_pi_squared_from_logits(logits)
        return logprobs, entropy_from_logits(logits), squares.log()

    return Bound(run, pair("logprobs", "entropy", "log_sum_sq_probs"))


def _linear_triton(case: Case, call: Call) -> Bound:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    t = call.tensors
    return Bound(
        lambda: linear_cross_entropy(t["hidden"], t["weight"], t["tokens"]),
        pair("logprobs", "entropy"),
    )


def _ppo_loss(case: Case, call: Call) -> Bound:
    from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla, kl_penalty
    from verl.workers.config import ActorConfig

    t, inputs = leaves(case, call)
    mask, coef = t["mask"].to(t["logprobs"].dtype), call.options
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=coef["clip_low"],
        clip_ratio_high=coef["clip_high"],
    )

    def run() -> Any:
        policy, metrics = compute_policy_loss_vanilla(
            t["old_logprobs"], t["logprobs"], t["advantages"], mask, config=config
        )
        entropy = agg_loss(t["entropy"], mask, "token-mean")
        kl = agg_loss(
            kl_penalty(t["logprobs"], t["ref_logprobs"], "low_var_kl"), mask, "token-mean"
        )
        loss = policy - coef["entropy_coef"] * entropy + coef["kl_coef"] * kl
        return loss, policy, entropy, kl, metrics

    def named(out: Any) -> dict[str, Tensor]:
        loss, policy, entropy, kl, metrics = out
        return {
            "loss": loss,
            "policy_loss": policy,
            "entropy": entropy,
            "ref_kl": kl,
            "clip_frac": loss.new_tensor(metrics["actor/pg_clipfrac"]),
            "kl_k1": loss.new_tensor(metrics["actor/ppo_kl"]),
        }

    return timed(case, call, run, inputs, named)


def _value_loss(case: Case, call: Call) -> Bound:
    from verl.trainer.ppo.core_algos import compute_value_loss

    t, inputs = leaves(case, call)
    mask, clip = t["mask"].to(t["values"].dtype), call.options["clip"]

    def run() -> Any:
        return compute_value_loss(t["values"], t["returns"], t["old_values"], mask, clip)

    return timed(case, call, run, inputs, pair("loss", "vf_clip_frac"))


def _gae(case: Case, call: Call) -> Bound:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    rows, (gamma, lam) = SequenceRows(call), (call.options[k] for k in ("gamma", "lam"))

    def run() -> Tensor:
        mask = rows.exists
        return compute_gae_advantage_return(rows.rewards, rows.values, mask, gamma, lam)[1]

    return Bound(run, lambda out: {"returns": rows.back(out)})


def _whiten(case: Case, call: Call) -> Bound:
    from verl.utils.torch_functional import masked_whiten

    x, keep = call.tensors["x"], call.tensors["mask"]
    mask = keep.to(x.dtype)
    return Bound(lambda: masked_whiten(x, mask), lambda out: {"out": out * mask})


def _rollout_weights(case: Case, call: Call) -> Bound:
    from verl.trainer.ppo.rollout_corr_helper import (
        SUPPORTED_ROLLOUT_RS_OPTIONS,
        compute_rollout_correction_and_rejection_mask,
    )

    t, c = call.tensors, call.options["correction"]
    mask = t["mask"].to(t["old_logprobs"].dtype)
    reject = {key.replace("-", "_"): bound for key, bound in c.reject}
    keys = sorted(reject.keys() & SUPPORTED_ROLLOUT_RS_OPTIONS)
    bounds = [b if isinstance(b := reject[key], tuple) else (b,) for key in keys]

    def run() -> Any:
        return compute_rollout_correction_and_rejection_mask(
            t["old_logprobs"],
            t["rollout_logprobs"],
            mask,
            rollout_is="token",
            rollout_is_threshold=c.high,
            rollout_rs=",".join(keys),
            rollout_rs_threshold=",".join("_".join(map(str, b)) for b in bounds),
        )

    return Bound(run, lambda out: {"weights": out[0].batch["rollout_is_weights"]})


_FUNCTIONS, _ALGORITHMS = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
_OPS: dict[str, tuple[Callable[[Case, Call], Bound], str, str]] = {
    "token_logprobs": (_logits, _FUNCTIONS, ""),
    "linear_token_logprobs": (_linear, "verl.utils.experimental.torch_functional", ""),
    "linear_token_stats": (_stats, _FUNCTIONS, "3 of 6 statistics, of whole logits"),
    "ppo_loss": (_ppo_loss, _ALGORITHMS, "6 of 17 statistics; adds its dual clip"),
    "value_loss": (_value_loss, _ALGORITHMS, "2 of 4 statistics"),
    "gae": (_gae, _ALGORITHMS, "whitened advantages (not gated) and returns"),
    "whiten": (_whiten, _FUNCTIONS, "masked slots too"),
    "rollout_weights": (
        _rollout_weights,
        "verl.trainer.ppo.rollout_corr_helper",
        "11 of 20 rejections (not gated); waits for each statistic",
    ),
}
