"""OpenRLHF 0.11.2 on ppo_fast: `PolicyLoss`, `ValueLoss`, log-probabilities, entropy, advantages.

`apply()`, `revert()` and `patched()` act on this process. The entropy comes after the temperature,
as there; the KL estimate runs on PyTorch (`compat.compute_approx_kl`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast import compat
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._first_call import first_tokens
from ppo_fast.integrations._patch import Arguments, Integration, Swap

_LOSS = "openrlhf.models.loss"
_UTILS = "openrlhf.models.utils"


def _divisor(
    mask: Tensor,
    by_token: bool,
    dp_size: int,
    batch_num_tokens: float | Tensor | None,
    global_batch_size: float | Tensor | None,
) -> dict[str, Any]:
    """`aggregate_loss` as ppo_fast's reduction and denom."""
    total = batch_num_tokens if by_token else global_batch_size
    if not isinstance(total, Tensor) and total is not None and total <= 0:
        raise Uncovered(f"an empty batch, {total}")
    reduction = "token-mean" if by_token else "seq-mean-token-mean"
    return {"reduction": reduction, "denom": None if total is None else total / dp_size}


def _policy_loss(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    if self.policy_loss_type != "ppo":
        # Its ratio's gradient goes through the mean of all tokens; ppo_fast's through each
        # token's own. They agree only for one advantage a sequence, which no option says.
        raise Uncovered(f"policy_loss_type {self.policy_loss_type!r}")
    if self.is_correction_level != "off":
        raise Uncovered(f"is_correction_level {self.is_correction_level!r}")
    if action_mask is None:
        raise Uncovered("no action_mask")
    loss, stats = ppo_fast.ppo_loss(
        log_probs,
        old_log_probs,
        advantages,
        action_mask,
        clip_low=self.clip_eps_low,
        clip_high=self.clip_eps_high,
        dual_clip=self.dual_clip,
        **_divisor(
            action_mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
        ),
    )
    tokens = stats.field("n_tokens")
    clipped = (stats.field("clip_low") + stats.field("clip_high")) / tokens
    # Without the clamp of the ratio that the loss is taken of.
    k1 = (old_log_probs - log_probs).detach()
    mean_kl = torch.where(action_mask != 0, k1, 0.0).sum() / tokens
    return loss, clipped.to(loss.dtype), mean_kl.to(loss.dtype), None, None


def _value_loss(
    self: Any,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Tensor:
    if action_mask is None:
        raise Uncovered("no action_mask")
    return ppo_fast.value_loss(
        values,
        None if self.clip_eps is None else old_values,
        returns,
        action_mask,
        clip=self.clip_eps,
        **_divisor(
            action_mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
        ),
    ).loss


def _logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """OpenRLHF divides the logits in place; they are left as they are here."""
    return ppo_fast.token_logprobs(logits, labels, temperature=temperature).logprobs


def _entropy(logits: Tensor) -> Tensor:
    return compat.entropy_from_logits(logits)


def _advantages(
    self: Any,
    values: Tensor,
    rewards: Tensor,
    action_mask: Tensor | None,
    gamma: float,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    out = ppo_fast.gae(rewards, values, gamma=gamma, lam=lambd, mask=action_mask, masked="zero")
    return out.advantages, out.returns


def _kept(arguments: Arguments, result: Any) -> Any:
    """OpenRLHF goes on through masked slots, ppo_fast leaves zeros there."""
    mask = arguments["action_mask"]
    return result if mask is None else tuple(x * (mask != 0) for x in result)


integration = Integration(
    name="openrlhf",
    package="openrlhf",
    version="0.11.2",
    extra="openrlhf",
    swaps=(
        Swap("policy_loss", f"{_LOSS}:PolicyLoss.forward", _policy_loss),
        Swap("value_loss", f"{_LOSS}:ValueLoss.forward", _value_loss),
        Swap(
            "logprobs",
            f"{_UTILS}:log_probs_from_logits",
            _logprobs,
            sample=first_tokens("logits", "labels"),
        ),
        Swap("entropy", f"{_UTILS}:compute_entropy", _entropy, sample=first_tokens("logits")),
        Swap("kl", f"{_UTILS}:compute_approx_kl", compat.compute_approx_kl),
        Swap(
            "advantages",
            "openrlhf.trainer.ppo_utils.experience_maker:"
            "RemoteExperienceMaker.get_advantages_and_returns",
            _advantages,
            view=_kept,
        ),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
