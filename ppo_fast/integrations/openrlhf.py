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
    mask: Tensor | None,
    by_token: bool,
    dp_size: int,
    batch_num_tokens: float | Tensor | None,
    global_batch_size: float | Tensor | None,
) -> dict[str, Any]:
    """`aggregate_loss` as ppo_fast's reduction and denom."""
    total = batch_num_tokens if by_token else global_batch_size
    if mask is None and (not by_token or total is not None):
        raise Uncovered("no action_mask")  # of which only the plain mean over tokens is defined
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    gspo, corrects = self.policy_loss_type == "gspo", self.is_correction_level != "off"
    if not gspo and self.policy_loss_type != "ppo":
        raise Uncovered(f"policy_loss_type {self.policy_loss_type!r}")
    if gspo and action_mask is None:
        raise Uncovered("no action_mask")
    keep = torch.ones_like(log_probs) if action_mask is None else action_mask
    keep = keep != 0
    old, weights, gap, filtered = old_log_probs, None, None, None
    if corrects:
        if rollout_log_probs is None:
            raise Uncovered("no rollout_log_probs")
        if gspo:
            old = rollout_log_probs
        else:
            weights, filtered = _correction(self, old, rollout_log_probs, keep)
            gap = _mean(rollout_log_probs - old, keep)
    loss, stats = ppo_fast.ppo_loss(
        log_probs,
        old,
        advantages,
        keep,
        ratio_level="sequence" if gspo else "token",
        log_ratio_clamp=None if gspo else 20.0,
        clip_low=self.clip_eps_low,
        clip_high=self.clip_eps_high,
        dual_clip=self.dual_clip,
        is_weights=weights,
        **_divisor(
            action_mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
        ),
    )
    clipped = (stats.field("clip_low") + stats.field("clip_high")) / stats.field("n_tokens")
    # Without the clamp of the ratio that the loss is taken of.
    kl = _mean((old_log_probs - log_probs).detach(), keep)
    return loss, clipped.to(loss.dtype), kl, gap, filtered


def _correction(self: Any, old: Tensor, rollout: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The policy term's weights of `is_correction_*`, and the fraction of filtered units.

    In PyTorch, since a gate may be a divergence, which no key of `Correction` is. A unit is a
    token, or at level "seq" a sequence; one without a token counts as filtered, as there.
    """
    by_ratio = self.is_correction_gating == "ratio"
    by_sequence = self.is_correction_level == "seq"
    low, high = self.is_correction_threshold
    log_ratio = (old - rollout).detach()
    gate = log_ratio if by_ratio else _divergence(self.is_correction_gating, old, rollout)
    if by_sequence:
        gate = _mean(gate, keep, dim=-1)[:, None]
    if by_ratio:
        gate = gate.exp()
    passes = (gate >= low) & (gate <= high)
    if self.is_correction_mode == "clip":
        weights = gate.clamp(low, high)
    else:
        weights = torch.where(passes, log_ratio.exp(), 0.0)
    failed = (~passes).to(torch.float32)
    return weights, failed.mean() if by_sequence else _mean(failed, keep)


def _divergence(kind: str, old: Tensor, rollout: Tensor) -> Tensor:
    """Of the two-sided coin of each sampled token: KL(rollout‖old), or the total variation."""
    p, q = (x.detach().exp().clamp(1e-6, 1.0 - 1e-6) for x in (rollout, old))
    if kind == "tv":
        return (p - q).abs()
    return p * (p / q).log() + (1.0 - p) * ((1.0 - p) / (1.0 - q)).log()


def _mean(x: Tensor, keep: Tensor, dim: int | None = None) -> Tensor:
    """The mean over unmasked slots; NaN over none, as there."""
    found: Tensor = torch.where(keep, x, 0.0).sum(dim) / keep.sum(dim)
    return found


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
