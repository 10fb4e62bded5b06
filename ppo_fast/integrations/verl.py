"""verl 0.9.1 on ppo_fast: policy losses by their registry, value loss, KL, GAE, log-probabilities
and the fused head.

`apply()`, `revert()` and `patched()` act on this process. verl's workers are processes of their
own: `ppo_fast.integrations.verl_plugin` patches each of them as it imports verl.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast import compat
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._first_call import first_of_head, first_tokens
from ppo_fast.integrations._patch import Arguments, Integration, Swap

_CORE = "verl.trainer.ppo.core_algos"
_FUSED = "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward"
_MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def _divisor(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[str, float | Tensor | None, float]:
    """`agg_loss`'s mode and batch as (reduction, denom, what the loss is then multiplied by)."""
    if mode == "token-sum":
        return mode, None, float(dp_size)
    if mode not in _MODES:
        raise Uncovered(f"loss_agg_mode {mode!r}")
    total = batch_num_tokens if mode == "token-mean" else global_batch_size
    if total is None and dp_size > 1:
        raise Uncovered(f"dp_size {dp_size} without the whole batch's count")
    if not isinstance(total, Tensor) and total is not None and total <= 0:
        raise Uncovered(f"an empty batch, {total}")
    width = 1.0
    if mode == "seq-mean-token-sum-norm":
        width = mask.shape[-1] if loss_scale_factor is None else float(loss_scale_factor)
        mode = "seq-mean-token-sum"
    return mode, total, dp_size / width


def _policy(variant: str, clamp: float | None) -> Any:
    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "seq-mean-token-mean" if variant == "gspo" else "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        low, high = config.clip_ratio_low, config.clip_ratio_high
        low = config.clip_ratio if low is None else low
        high = config.clip_ratio if high is None else high
        dual = config.get("clip_ratio_c", 3.0) if variant == "clip" else None
        reduction, denom, factor = _divisor(
            loss_agg_mode, response_mask, **config.global_batch_info
        )
        loss, stats = ppo_fast.ppo_loss(
            log_prob,
            old_log_prob,
            advantages,
            response_mask,
            variant=variant,
            clip_low=low,
            clip_high=high,
            dual_clip=dual,
            log_ratio_clamp=clamp,
            is_weights=rollout_is_weights,
            reduction=reduction,
            denom=denom,
        )
        found = stats.compute()
        metrics = {
            "actor/pg_clipfrac": found["clip_frac_eps" if variant == "cispo" else "clip_frac"],
            "actor/ppo_kl": found["kl_k1"],
            "actor/pg_clipfrac_lower": found["clip_frac_dual"],
        }
        # A mean over no token is 0 there.
        return loss * factor, {k: x if found["n_tokens"] else 0.0 for k, x in metrics.items()}

    return policy_loss


def _value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[Tensor, Tensor]:
    reduction, denom, factor = _divisor(
        loss_agg_mode,
        response_mask,
        dp_size,
        batch_num_tokens,
        global_batch_size,
        loss_scale_factor,
    )
    loss, stats = ppo_fast.value_loss(
        vpreds,
        values,
        returns,
        response_mask,
        clip=cliprange_value,
        reduction=reduction,
        denom=denom,
    )
    clipped = stats.field("vf_clip") / stats.field("vf_n_tokens").clamp(min=1)
    return loss * factor, clipped.float()


def _gae(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    out = ppo_fast.gae(token_level_rewards, values, gamma=gamma, lam=lam, mask=response_mask)
    return ppo_fast.whiten(out.advantages, response_mask, moments=out.moments), out.returns


def _kept(arguments: Arguments, result: Any) -> Any:
    """verl leaves numbers at masked slots, ppo_fast zeros."""
    keep = arguments["response_mask"] != 0
    return tuple(torch.where(keep, x, 0.0) for x in result)


def _logprobs(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    # In place where verl's own is, with flash-attn: elsewhere its callers may keep the logits.
    overwrite = inplace_backward and logits.is_cuda and not logits.is_leaf
    return compat.logprobs_from_logits(logits, labels, inplace_backward=overwrite)


def _linear(
    self: Any,
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """`chunk_size` and `impl_backend` choose how verl computes it, not what."""
    if hidden_states.dtype != vocab_weights.dtype:
        raise Uncovered(
            f"hidden states {hidden_states.dtype} beside a weight {vocab_weights.dtype}"
        )
    logprobs, entropy = ppo_fast.linear_token_logprobs(
        hidden_states, vocab_weights, input_ids, temperature=temperature
    )
    return logprobs, entropy.to(hidden_states.dtype)


integration = Integration(
    name="verl",
    package="verl",
    version="0.9.1",
    extra="verl",
    swaps=(
        Swap("policy_loss", f"{_CORE}:compute_policy_loss_vanilla", _policy("clip", 20.0)),
        Swap("policy_loss", f"{_CORE}:compute_policy_loss_gspo", _policy("gspo", None)),
        Swap("policy_loss", f"{_CORE}:compute_policy_loss_cispo", _policy("cispo", 20.0)),
        Swap("value_loss", f"{_CORE}:compute_value_loss", _value_loss),
        Swap("kl", f"{_CORE}:kl_penalty", compat.kl_penalty),
        Swap("gae", f"{_CORE}:compute_gae_advantage_return", _gae, view=_kept),
        Swap(
            "logprobs",
            "verl.utils.torch_functional:logprobs_from_logits",
            _logprobs,
            sample=first_tokens("logits", "labels"),
        ),
        Swap(
            "linear_logprobs",
            _FUSED,
            _linear,
            sample=first_of_head("hidden_states", "vocab_weights", "input_ids"),
        ),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
