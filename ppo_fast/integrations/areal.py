"""AReaL on ppo_fast: log-probabilities and entropies of logits, GAE, actor and critic losses.

`apply()`, `revert()` and `patched()` act on this process. AReaL trains in worker processes, which
docs/integrations/areal.md patches. Rejection sampling, M2PO's mask and every logged number are by
AReaL's own formulas.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import ppo_fast
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._extract import Block
from ppo_fast.integrations._first_call import first_tokens
from ppo_fast.integrations._patch import Arguments, Integration, Swap

_LOGITS = "areal.utils.functional.vocab_parallel"
_LOSSES = "areal.utils.functional.functional"
_ACTOR = "areal.trainer.ppo.actor:PPOActor"
Statistics = dict[str, Any]


def _logprobs(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    return _logprobs_entropy(logits, labels, temperature, tp_group)[0]


def _logprobs_entropy(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Both from one read of the logits, of which nothing is copied: there are no chunks."""
    shared = tp_group is not None and dist.get_world_size(tp_group) > 1
    group = tp_group if shared else None
    out = ppo_fast.token_logprobs(logits, labels, temperature=temperature, process_group=group)
    return out.logprobs, out.entropy


def _gae(
    self: Any,
    bs: int,
    max_seqlen: int,
    rewards: Tensor,
    values: Tensor,
    loss_mask: Tensor,
    seq_no_eos_mask: Tensor,
) -> dict[str, Tensor]:
    """The last slot takes no part: its value follows the last step of a sequence without EOS."""
    for name in ("discount", "gae_lambda"):
        if not 0 <= getattr(self, name) <= 1:
            raise Uncovered(f"{name} {getattr(self, name)}")
    values = values.to(rewards.dtype)
    out = ppo_fast.gae(
        rewards[:, :-1],
        values[:, :-1],
        gamma=self.discount,
        lam=self.gae_lambda,
        mask=loss_mask[:, :-1],
        bootstrap=torch.where(seq_no_eos_mask, values[:, -1], 0.0),
    )
    return {"advantages": torch.nn.functional.pad(out.advantages, (0, 1))}


def _kept(arguments: Arguments, result: dict[str, Tensor]) -> Tensor:
    """AReaL leaves the next kept slot's advantage at masked ones, ppo_fast zeros."""
    return torch.where(arguments["loss_mask"] != 0, result["advantages"], 0.0)


class _Terms(NamedTuple):
    """Terms of losses and statistics, per token and constant; the ratio is 0 at masked slots."""

    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor


@torch.no_grad()
def _terms(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    level: str,
    cu_seqlens: Tensor | None,
) -> _Terms:
    """Ratios, and advantages, which AReaL averages over a sequence where its ratio is one."""
    log_ratio = logprobs - old
    if level == "token":
        return _Terms(log_ratio, torch.where(mask, log_ratio.exp(), 0.0), advantages)
    if level != "sequence":
        raise Uncovered(f"importance_sampling_level {level!r}")
    of_sequences = sys.modules[_LOSSES]._compute_sequence_level_ratio_and_advantages
    return _Terms(log_ratio, *of_sequences(log_ratio, advantages, mask, cu_seqlens))


def _loss(
    logprobs: Tensor,
    old: Tensor,
    terms: _Terms,
    mask: Tensor,
    count: Tensor,
    level: str,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> Tensor:
    """The mean over `count` tokens; only a ratio of whole sequences asks where they begin."""
    packed = level == "sequence" and logprobs.dim() == 1
    return ppo_fast.ppo_loss(
        logprobs,
        old,
        terms.advantages,
        mask,
        ratio_level=level,
        log_ratio_clamp=None,
        denom=count.clamp(min=1),
        cu_seqlens=cu_seqlens if packed else None,
        **options,
    ).loss


def _actor_loss(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    eps_clip: float,
    loss_mask: Tensor,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    rejection_sampling: Any = None,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Statistics]:
    """The divisor counts the tokens that rejection sampling drops, too."""
    if c_clip is not None and c_clip <= 1:
        raise Uncovered(f"c_clip {c_clip}")
    count, weights, rejected = loss_mask.count_nonzero(), None, {}
    if rejection_sampling is not None:
        found = sys.modules[_LOSSES].apply_rejection_sampling(
            proximal_logprobs, old_logprobs, loss_mask, cu_seqlens, rejection_sampling
        )
        loss_mask, weights = found.loss_mask, found.behave_imp_weight
        weights = weights.to(torch.promote_types(weights.dtype, logprobs.dtype))
        rejected = _rejected(found, proximal_logprobs, old_logprobs)
    high = eps_clip if eps_clip_higher is None else eps_clip_higher
    sequences = importance_sampling_level, cu_seqlens
    terms = _terms(logprobs, proximal_logprobs, advantages, loss_mask, *sequences)
    loss = _loss(
        logprobs,
        proximal_logprobs,
        terms,
        loss_mask,
        count,
        *sequences,
        clip_low=min(eps_clip, 1.0),
        clip_high=high,
        dual_clip=c_clip,
        is_weights=weights,
    )
    clipped = _clipped(terms, 1.0 - eps_clip, 1.0 + high, c_clip)
    if weights is not None:
        clipped["loss"] = clipped["loss"] * weights
    masks = {name: clipped[name] & loss_mask for name in ("clip_mask", "dual_clip_mask")}
    return loss, clipped | masks | rejected


@torch.no_grad()
def _rejected(found: Any, proximal: Tensor, old: Tensor) -> Statistics:
    kept = (found.behave_imp_weight > 0) & found.loss_mask
    return {
        "behave_approx_kl": torch.where(kept, proximal - old, 0.0),
        "behave_imp_weight": found.behave_imp_weight,
        "behave_mask": kept,
        "filtered_fraction": found.filtered_fraction,
    }


@torch.no_grad()
def _clipped(terms: _Terms, low: float, high: float, cap: float | None) -> Statistics:
    """Every token's loss, and which of its bounds is the active one."""
    plain = -terms.advantages * terms.ratio
    bounded = -terms.advantages * terms.ratio.clamp(low, high)
    loss, clipped = torch.max(plain, bounded), plain < bounded
    capped = torch.zeros_like(clipped)
    if cap is not None:
        most = cap * terms.advantages.abs()
        loss, capped = torch.min(loss, most), most < loss
    return {
        "loss": loss,
        "importance_weight": terms.ratio,
        "approx_kl": terms.log_ratio,
        "clip_mask": clipped,
        "dual_clip_mask": capped,
    }


def _critic_loss(
    value: Tensor,
    old_value: Tensor,
    target_value: Tensor,
    value_eps_clip: float,
    loss_mask: Tensor | None = None,
    loss_fn_type: str = "mse",
) -> tuple[Tensor, Statistics]:
    if loss_fn_type != "mse":
        raise Uncovered(f"loss_fn_type {loss_fn_type!r}")
    loss = ppo_fast.value_loss(value, old_value, target_value, loss_mask, clip=value_eps_clip).loss
    with torch.no_grad():
        held = old_value + (value - old_value).clamp(-value_eps_clip, value_eps_clip)
        plain, bounded = (0.5 * (x - target_value) ** 2 for x in (value, held))
        clipped = bounded > plain
        if loss_mask is not None:
            clipped &= loss_mask
        return loss, {"clip_mask": clipped, "loss": torch.max(plain, bounded)}


def _of_kept(arguments: Arguments, result: tuple[Tensor, Statistics]) -> tuple[Tensor, Statistics]:
    """Statistics of the kept tokens, which are those that AReaL logs."""
    loss, found = result
    mask = arguments.get("loss_mask")
    if mask is None:
        return result
    kept = {k: torch.where(mask, x, 0) for k, x in found.items() if isinstance(x, Tensor)}
    return loss, found | kept


def _chunked(name: str, of_shards: str) -> tuple[str, ...]:
    """Functions behind `gather_logprobs` and `gather_logprobs_entropy`."""
    per_rank = f"_vocab_parallel_{name}", f"{of_shards}.apply"
    return (f"_chunked_gather_{name}", f"_gather_{name}", "_chunked_apply", *per_rank)


integration = Integration(
    name="areal",
    package="areal",
    extra="areal",
    swaps=(
        Swap(
            "logprobs",
            f"{_LOGITS}:gather_logprobs",
            _logprobs,
            sample=first_tokens("logits", "labels"),
            helpers=_chunked("logprobs", "_VocabParallelLogProbs"),
        ),
        Swap(
            "logprobs",
            f"{_LOGITS}:gather_logprobs_entropy",
            _logprobs_entropy,
            sample=first_tokens("logits", "labels"),
            helpers=_chunked("logprobs_entropy", "_VocabParallelLogProbsEntropy"),
        ),
        Swap(
            "gae",
            f"{_ACTOR}._compute_advantages",
            _gae,
            view=_kept,
            block=Block("advantages_reversed = ", "advantages = torch.stack("),
        ),
        Swap(
            "policy_loss",
            f"{_LOSSES}:ppo_actor_loss_fn",
            _actor_loss,
            view=_of_kept,
            helpers=("_compute_sequence_level_ratio_and_advantages",),
        ),
        Swap(
            "value_loss",
            f"{_LOSSES}:ppo_critic_loss_fn",
            _critic_loss,
            view=_of_kept,
            helpers=("_mse_loss",),
        ),
    ),
    on_request=("value_loss",),  # runs without a critic do not reach it
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
