"""OpenRLHF on ppo_fast: `PolicyLoss`, `ValueLoss`, log-probabilities, entropy, advantages.

`apply()`, `revert()` and `patched()` act on this process. The entropy comes after the temperature,
as there; the KL estimate runs on PyTorch (`compat.compute_approx_kl`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ppo_fast
from ppo_fast import compat
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._first_call import first_tokens
from ppo_fast.integrations._patch import Arguments, Integration, Swap

_POLICY = "openrlhf.models.loss:PolicyLoss.forward"
_VALUE = "openrlhf.models.loss:ValueLoss.forward"
_UTILS = "openrlhf.models.utils"
_KL = f"{_UTILS}:compute_approx_kl"
# Statements that tell the versions of a function apart, where its parameters do not.
_GATED, _CLAMPED = "low, high = self.is_correction_threshold", "raw_policy_log_ratio = "


class _Gate(NamedTuple):
    """A correction of the policy term: which units are gated, how, by what, within which bounds.

    `level` is "off", "token" or "seq", `mode` "mask" or "clip", `by` "ratio", "binary_kl" or "tv".
    """

    level: str
    mode: str = "mask"
    by: str = "ratio"
    bounds: tuple[float, float] = (0.0, math.inf)


# `vllm_is_correction_type`, the correction's option up to 0.11.1.
_TYPES = {"tis": ("token", "clip"), "icepop": ("token", "mask"), "seq-mask-tis": ("seq", "mask")}


def _gate(loss: Any) -> _Gate:
    return _Gate(
        loss.is_correction_level,
        loss.is_correction_mode,
        loss.is_correction_gating,
        loss.is_correction_threshold,
    )


def _gate_by_type(loss: Any) -> _Gate:
    if not loss.enable_vllm_is_correction:
        return _Gate("off")
    level, mode = _TYPES[loss.vllm_is_correction_type]
    return _Gate(level, mode, "ratio", loss.vllm_is_truncated_threshold)


class _Loss(NamedTuple):
    """A policy loss and its metrics; the last two are None without a correction of the term."""

    loss: Tensor
    clipped: Tensor
    kl: Tensor
    rollout_kl: Tensor | None
    filtered: Tensor | None


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


def _mean_divisor(like: Tensor, mask: Tensor | None, by_token: bool) -> dict[str, Any]:
    """The means of 0.10.0 to 0.10.2, over all rows: NaN if one of them has no token, as there."""
    if by_token:
        return {"reduction": "token-mean", "denom": None}
    rows = torch.full((), float(like.shape[0]), device=like.device)
    if mask is not None:
        rows = torch.where((mask != 0).any(-1).all(), rows, math.nan)
    return {"reduction": "seq-mean-token-mean", "denom": rows}


def _policy(
    self: Any,
    gate: _Gate,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None,
    rollout_log_probs: Tensor | None,
    divisor: dict[str, Any],
    log_ratio_clamp: float | None = 20.0,
) -> _Loss:
    gspo, corrects = self.policy_loss_type == "gspo", gate.level != "off"
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
            weights, filtered = _correction(gate, old, rollout_log_probs, keep)
            gap = _mean(rollout_log_probs - old, keep)
    loss, stats = ppo_fast.ppo_loss(
        log_probs,
        old,
        advantages,
        keep,
        ratio_level="sequence" if gspo else "token",
        log_ratio_clamp=None if gspo else log_ratio_clamp,
        clip_low=self.clip_eps_low,
        clip_high=self.clip_eps_high,
        dual_clip=self.dual_clip,
        is_weights=weights,
        **divisor,
    )
    clipped = (stats.field("clip_low") + stats.field("clip_high")) / stats.field("n_tokens")
    # Without the clamp of the ratio that the loss is taken of.
    kl = _mean((old_log_probs - log_probs).detach(), keep)
    return _Loss(loss, clipped.to(loss.dtype), kl, gap, filtered)


def _policy_loss(gate: Callable[[Any], _Gate], count: int) -> Any:
    """`PolicyLoss.forward` with the first `count` results."""

    def forward(
        self: Any,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor | None, ...]:
        divisor = _divisor(
            action_mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
        )
        tensors = log_probs, old_log_probs, advantages, action_mask, rollout_log_probs
        return _policy(self, gate(self), *tensors, divisor)[:count]

    return forward


def _mean_policy_loss(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Of 0.10.0 to 0.10.2: the micro-batch's own means, log-ratios without a clamp.

    The KL is of the log-ratio that is formed last: with a correction, of one to the rollout.
    """
    gate = _gate_by_type(self)
    divisor = _mean_divisor(log_probs, action_mask, self.token_level_loss)
    tensors = log_probs, old_log_probs, advantages, action_mask, rollout_log_probs
    found = _policy(self, gate, *tensors, divisor, log_ratio_clamp=None)
    kl = found.kl if found.rollout_kl is None else found.rollout_kl
    if gate.level != "off" and self.policy_loss_type == "gspo":
        assert rollout_log_probs is not None and action_mask is not None
        kl = _mean((rollout_log_probs - log_probs).detach(), action_mask != 0)
    return found.loss, found.clipped, kl, found.rollout_kl


def _correction(gate: _Gate, old: Tensor, rollout: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The policy term's weights of a gate, and the fraction of filtered units.

    In PyTorch, since a gate may be a divergence, which no key of `Correction` is. A unit is a
    token, or at level "seq" a sequence; one without a token counts as filtered, as there.
    """
    by_ratio, by_sequence = gate.by == "ratio", gate.level == "seq"
    low, high = gate.bounds
    log_ratio = (old - rollout).detach()
    found = log_ratio if by_ratio else _divergence(gate.by, old, rollout)
    if by_sequence:
        found = _mean(found, keep, dim=-1)[:, None]
    if by_ratio:
        found = found.exp()
    passes = (found >= low) & (found <= high)
    if gate.mode == "clip":
        weights = found.clamp(low, high)
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
    divisor = _divisor(
        action_mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
    )
    return _value(self, values, old_values, returns, action_mask, divisor)


def _mean_value_loss(
    self: Any,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
) -> Tensor:
    """Of 0.10.0 to 0.10.2."""
    divisor = _mean_divisor(values, action_mask, self.token_level_loss)
    return _value(self, values, old_values, returns, action_mask, divisor)


def _value(
    self: Any,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    divisor: dict[str, Any],
) -> Tensor:
    old = None if self.clip_eps is None else old_values
    return ppo_fast.value_loss(values, old, returns, mask, clip=self.clip_eps, **divisor).loss


def _approx_kl(log_probs: Tensor, log_probs_base: Tensor, kl_estimator: str = "k1") -> Tensor:
    """Of 0.10.0 to 0.11.0: without an unbiased gradient."""
    return compat.compute_approx_kl(log_probs, log_probs_base, kl_estimator=kl_estimator)


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


def _reduced(op: str, place: str, fused: Any, having: str = "") -> Swap:
    return Swap(op, place, fused, having=having, helpers=("aggregate_loss", "masked_mean"))


integration = Integration(
    name="openrlhf",
    package="openrlhf",
    extra="openrlhf",
    swaps=(
        (
            _reduced("policy_loss", _POLICY, _policy_loss(_gate, 5), _GATED),
            _reduced("policy_loss", _POLICY, _policy_loss(_gate_by_type, 4), _CLAMPED),
            _reduced("policy_loss", _POLICY, _mean_policy_loss),
        ),
        (
            _reduced("value_loss", _VALUE, _value_loss, "loss = aggregate_loss("),
            _reduced("value_loss", _VALUE, _mean_value_loss),
        ),
        Swap(
            "logprobs",
            f"{_UTILS}:log_probs_from_logits",
            _logprobs,
            sample=first_tokens("logits", "labels"),
            helpers=("_logsumexp_by_chunk",),
        ),
        Swap("entropy", f"{_UTILS}:compute_entropy", _entropy, sample=first_tokens("logits")),
        (
            Swap("kl", _KL, compat.compute_approx_kl),
            Swap("kl", _KL, _approx_kl),
        ),
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
