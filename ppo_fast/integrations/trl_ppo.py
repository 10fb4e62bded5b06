"""TRL's `PPOTrainer` on ppo_fast, which no release after 1.12.0 has.

`apply()`, `revert()` and `patched()` swap the log-probabilities, the whitening, the recursion and
both losses with their metrics; generation, rewards, optimiser and logging stay TRL's own.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast import compat
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._extract import Block
from ppo_fast.integrations._first_call import first_rows, first_tokens
from ppo_fast.integrations._patch import Arguments, Integration, Swap

_TRAIN = "trl.experimental.ppo.ppo_trainer:PPOTrainer.train"
# Entropy of the logits that were scored last, kept until `train` asks for it.
_scored: tuple[weakref.ref[Tensor], Tensor] | None = None


def _logprobs(logits: Tensor, index: Tensor) -> Tensor:
    global _scored
    if index.dim() != logits.dim() - 1:
        raise Uncovered(f"selective_log_softmax of several tokens a row, {tuple(index.shape)}")
    logprobs, entropy = ppo_fast.token_logprobs(logits, index)
    _scored = weakref.ref(logits), entropy.detach()
    return logprobs


def _entropy(logits: Tensor) -> Tensor:
    """Entropy from the pass that scored these logits, or from a new pass."""
    if _scored is not None and _scored[0]() is logits:
        return _scored[1]
    with torch.no_grad():
        return compat.entropy_from_logits(logits)


def _whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    return ppo_fast.whiten(values, mask, shift_mean=shift_mean)


def _kept(arguments: Arguments, result: Tensor) -> Tensor:
    return result * arguments["mask"]


def _gae(args: Any, rewards: Tensor, values: Tensor, **_: Any) -> dict[str, Any]:
    out = ppo_fast.gae(rewards, values, gamma=args.gamma, lam=args.lam)
    return {"advantages": out.advantages, "returns": out.returns}


def _value_loss(
    args: Any,
    vpred: Tensor,
    mb_values: Tensor,
    mb_return: Tensor,
    padding_mask_p1: Tensor,
    micro_batch_inds: Any,
) -> dict[str, Any]:
    loss, stats = ppo_fast.value_loss(
        vpred, mb_values, mb_return, ~padding_mask_p1[micro_batch_inds], clip=args.cliprange_value
    )
    return {"vf_loss": loss, "vf_clipfrac": stats.field("vf_clip") / stats.field("vf_n_tokens")}


def _policy_loss(
    args: Any,
    logits: Tensor,
    new_logprobs: Tensor,
    mb_logprobs: Tensor,
    mb_advantage: Tensor,
    padding_mask: Tensor,
    micro_batch_inds: Any,
) -> dict[str, Any]:
    """The metrics are means over all slots, as TRL's: a padded one has d = 0 and a ratio of 1."""
    loss, stats = ppo_fast.ppo_loss(
        new_logprobs,
        mb_logprobs,
        mb_advantage,
        ~padding_mask[micro_batch_inds],
        clip_low=args.cliprange,
        clip_high=args.cliprange,
        log_ratio_clamp=None,
    )
    slots, tokens = new_logprobs.numel(), stats.field("n_tokens")
    return {
        "pg_loss": loss,
        "pg_clipfrac": (stats.field("clip_low") + stats.field("clip_high")) / tokens,
        "approxkl": stats.field("kl_k2") / slots,
        "ratio": (stats.field("ratio") + slots - tokens) / slots,
        "entropy": _entropy(logits),
    }


_RESULTS = {
    "value_loss": ("vf_loss", "vf_clipfrac"),
    "policy_loss": ("pg_loss", "pg_clipfrac", "approxkl", "ratio", "entropy"),
    "gae": ("advantages", "returns"),
}


def _used(op: str) -> Any:
    """View of the names that `train` uses: the ratio's mean; of the losses, the gradient too."""

    def view(_: Arguments, result: dict[str, Any]) -> dict[str, Any]:
        used = {name: result[name] for name in _RESULTS[op]}
        used |= {k: x.mean() for k, x in used.items() if k == "ratio"}
        return {k: x if k.endswith("_loss") else x.detach() for k, x in used.items()}

    return view


_MICRO_BATCH = ("logits", "new_logprobs", "mb_logprobs", "mb_advantage", "micro_batch_inds")

integration = Integration(
    name="trl_ppo",
    package="trl",
    extra="trl-ppo",
    swaps=(
        Swap(
            "logprobs",
            "trl.trainer.utils:selective_log_softmax",
            _logprobs,
            sample=first_tokens("logits", "index"),
        ),
        Swap("whiten", "trl.experimental.ppo.ppo_trainer:masked_whiten", _whiten, view=_kept),
        Swap(
            "gae",
            _TRAIN,
            _gae,
            view=_used("gae"),
            block=Block("lastgaelam = 0", "returns = advantages + values"),
        ),
        Swap(
            "value_loss",
            _TRAIN,
            _value_loss,
            view=_used("value_loss"),
            block=Block("vpredclipped = torch.clamp(", "vf_clipfrac = masked_mean("),
        ),
        Swap(
            "policy_loss",
            _TRAIN,
            _policy_loss,
            view=_used("policy_loss"),
            sample=first_rows(*_MICRO_BATCH),
            block=Block(
                "logprobs_diff = new_logprobs",
                "pg_loss = masked_mean(",
                metrics=("pg_clipfrac = masked_mean(", "approxkl = "),
            ),
        ),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
