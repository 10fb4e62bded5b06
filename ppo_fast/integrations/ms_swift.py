"""ms-swift's `GRPOTrainer` on ppo_fast: log-probabilities and entropies of logits, and the loss.

`apply()`, `revert()` and `patched()`. Metrics, rollout corrections, FIPO's influence and the
off-policy mask are ms-swift's own functions; so are the loss "real", Liger's path and Megatron.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast import Surrogate, TokenTerms, compat, surrogates
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._extract import Block
from ppo_fast.integrations._first_call import first_tokens
from ppo_fast.integrations._grpo import cispo, clip
from ppo_fast.integrations._patch import Arguments, Integration, Swap

_LEVELS = {"token": "token", "sequence": "sequence", "sequence_token": "sequence-token"}
_TRAINER = "swift.rlhf_trainers.grpo_trainer:GRPOTrainer"


def _logprobs(
    self: Any, logits: Tensor, input_ids: Tensor, logits_to_keep: int, compute_entropy: bool
) -> dict[str, Any]:
    """Both from one read of the logits, which are not divided by the temperature in place."""
    tokens = input_ids[:, -logits_to_keep:]
    out = ppo_fast.token_logprobs(logits, tokens, temperature=self.temperature)
    return {"logps": out.logprobs, "entropies": out.entropy if compute_entropy else None}


def _first_logits(arguments: Arguments) -> Arguments:
    count, kept = 64, arguments["logits_to_keep"]
    ids = arguments["input_ids"][:, -kept:]
    cut = first_tokens("logits", "input_ids", count=count)
    return cut({**arguments, "input_ids": ids, "logits_to_keep": min(count, kept)})


def _part_logprobs(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Log-probabilities of one rank's part of the sequences; the entropies are read elsewhere."""
    return {"per_token_logps": compat.selective_log_softmax(logits, labels)}


def _loss(
    self: Any,
    grpo_batch: Any,
    per_token_logps: Tensor,
    completion_mask: Tensor,
    entropy_mask: Tensor | None,
) -> dict[str, Any]:
    logps, mask, advantages = per_token_logps, completion_mask, grpo_batch.advantages
    old = grpo_batch.old_per_token_logps
    old = logps.detach() if old is None else old
    policy, level = _policy(self), _level(self)
    rollout, rollout_metrics = _rollout(self, grpo_batch, old, mask)
    found = _for_metrics(self, grpo_batch, logps, old, mask)
    weights = _product(entropy_mask, found.pop("influence", None), rollout, like=logps)
    if self.off_policy_sequence_mask_delta is not None:
        mask = mask & _kept(self, grpo_batch, logps.detach(), old, mask)
    options = _reduction(self, grpo_batch, len(mask))
    kl: dict[str, Any] = {}
    if found["per_token_kl"] is not None:  # its value bounded by 10, as by ppo_loss
        kl = {"ref_logprobs": grpo_batch.ref_per_token_logps, "kl_coef": self.beta}
    # `is_weights` are the policy term's, ms-swift's rollout weights are of both terms.
    apart = bool(kl) and rollout is not None
    loss, _ = ppo_fast.ppo_loss(
        logps,
        old,
        advantages,
        mask,
        ratio_level=level,
        is_weights=weights,
        log_ratio_clamp=None,
        **policy,
        **({} if apart else kl),
        **options,
    )
    if apart:
        loss = loss + self.beta * _weighted_kl(logps, kl["ref_logprobs"], mask, rollout, options)
    if self.loss_type in ("cispo", "dapo", "fipo"):
        loss = self._undo_gradient_accumulation_scaling(loss)
    return {
        "loss": loss,
        "advantages": advantages,
        "completion_mask": mask,
        "rollout_correction_metrics": rollout_metrics,
        **found,
    }


def _weighted_kl(
    logps: Tensor, ref: Tensor, mask: Tensor, weights: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Σ w·k3 / D by the loss's reduction: a policy term of advantage 1."""
    ones = torch.ones_like(logps[:, :1])
    variant = Surrogate(_k3)
    return ppo_fast.ppo_loss(
        logps,
        ref,
        ones,
        mask,
        variant=variant,
        is_weights=weights,
        log_ratio_clamp=None,
        **options,
    ).loss


def _k3(t: TokenTerms) -> Tensor:
    """min(e^−d − 1 + d, 10), d from the reference; no gradient beyond, and no overflow in it."""
    d = t.log_ratio.clamp(-20.0, 20.0)
    return (torch.expm1(-d) + d).clamp(max=10.0)


def _level(self: Any) -> str:
    level = self.importance_sampling_level
    if level not in _LEVELS:
        raise Uncovered(f"importance_sampling_level {level!r}")
    return _LEVELS[level]


def _policy(self: Any) -> dict[str, Any]:
    """The policy term, as ppo_loss's options."""
    kind = self.loss_type
    per_sequence = kind in ("real", "fipo") or self.off_policy_sequence_mask_delta is not None
    if self._has_teacher and per_sequence:
        raise Uncovered(f"a teacher with loss_type {kind!r} or an off-policy mask")
    if kind == "cispo":
        return cispo(self.epsilon_high)
    if kind == "sapo":
        return {"variant": surrogates.sapo(self.tau_pos, self.tau_neg)}
    if kind in ("grpo", "bnpo", "dr_grpo", "dapo", "fipo"):
        return clip(self.epsilon_low, self.epsilon_high, self.args.delta)
    raise Uncovered(f"loss_type {kind!r}")


def _reduction(self: Any, batch: Any, rows: int) -> dict[str, Any]:
    """ppo_loss's reduction and divisor."""
    kind = self.loss_type
    if kind in ("grpo", "sapo"):
        return {"reduction": "seq-mean-token-mean", "denom": float(rows)}
    if kind == "bnpo":
        return {"reduction": "token-mean"}
    if kind == "dr_grpo":
        return {"denom": float(rows * self.max_completion_length)}
    return {"denom": batch.num_items_in_batch / self.accelerator.num_processes}


def _product(*weights: Tensor | None, like: Tensor) -> Tensor | None:
    product = None
    for weight in weights:
        if weight is not None:
            weight = weight.to(like.dtype)
            product = weight if product is None else product * weight
    return product


@torch.no_grad()
def _kept(self: Any, batch: Any, logps: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """Sequences that the off-policy mask keeps, `(B, 1)`; the advantage is their tokens' mean."""
    rollout = batch.rollout_per_token_logps
    of = old if rollout is None else rollout
    mean = (batch.advantages * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
    kept: Tensor = self._compute_off_policy_sequence_mask(logps, of, mask, mean)
    return kept[:, None]


@torch.no_grad()
def _rollout(
    self: Any, batch: Any, old: Tensor, mask: Tensor
) -> tuple[Tensor | None, dict[str, Any]]:
    """Weights for samples of another policy, `(B, T)` or None, and what is logged of them."""
    from accelerate.utils import gather_object

    mode, rollout = self.rollout_importance_sampling_mode, batch.rollout_per_token_logps
    if mode is None and not self.log_rollout_offpolicy_metrics:
        return None, {}
    everywhere = all(gather_object([rollout is not None]))
    if self.disable_rollout_importance_sampling or not everywhere:
        return None, {}
    metrics = self._compute_rollout_offpolicy_metrics(old, rollout, mask)
    log_ratio, weights = self._get_rollout_is_correction(old, rollout, mask)
    if log_ratio is not None:
        metrics.update(self._compute_is_correction_metrics(log_ratio, weights, mask))
    return weights, metrics


@torch.no_grad()
def _for_metrics(
    self: Any, batch: Any, logps: Tensor, old: Tensor, mask: Tensor
) -> dict[str, Any]:
    """The ratio, the KL and FIPO's influence by ms-swift's formulas; its metrics are of them."""
    log_ratio = logps - old
    if self.importance_sampling_level == "token":
        ratio = log_ratio.exp()
    else:
        lengths = mask.sum(-1, keepdim=True).clamp(min=1.0)
        ratio = ((log_ratio * mask).sum(-1, keepdim=True) / lengths).exp()
    if self.importance_sampling_level == "sequence_token":
        ratio = ratio.expand_as(logps)
    found: dict[str, Any] = {"coef_1": ratio, "per_token_kl": None, "fipo_metrics": None}
    if self.beta != 0.0 and not self.kl_in_reward:
        d = (batch.ref_per_token_logps - logps).clamp(-20.0, 20.0)
        found["per_token_kl"] = (d.exp() - d - 1).clamp(-10.0, 10.0)
    if self.loss_type == "fipo":
        influence = self._compute_fipo_influence(log_ratio, ratio, batch.advantages, mask)
        found["influence"], found["fipo_metrics"] = influence
    if self.args.delta is not None and self.loss_type not in ("cispo", "sapo"):
        found["coef_1"] = ratio.clamp(max=self.args.delta)
    return found


def _compared(arguments: Arguments, result: dict[str, Any]) -> dict[str, Any]:
    """The names that the trainer uses afterwards; ratio and KL of padding are left out."""
    keep = arguments["completion_mask"]
    per_token = {"coef_1": result["coef_1"], "per_token_kl": result["per_token_kl"]}
    per_token |= result["fipo_metrics"] or {}
    same = {k: result[k] for k in ("loss", "completion_mask", "rollout_correction_metrics")}
    return {**same, **{k: (x * keep).detach() for k, x in per_token.items() if x is not None}}


integration = Integration(
    name="ms_swift",
    package="ms-swift",
    module="swift",
    extra="ms-swift",
    swaps=(
        Swap(
            "logprobs",
            f"{_TRAINER}._get_logps_via_local_forward",
            _logprobs,
            sample=_first_logits,
            block=Block("logits.div_(self.temperature)", "if is_padding_free:"),
        ),
        Swap(
            "logprobs",
            f"{_TRAINER}._get_logps_via_sp",
            _part_logprobs,
            sample=first_tokens("logits", "labels"),
            block=Block("per_token_logps = selective_log", "per_token_logps = selective_log"),
        ),
        Swap(
            "loss",
            f"{_TRAINER}._compute_loss_and_metrics",
            _loss,
            view=_compared,
            block=Block("per_token_kl = None", "if self.loss_type in ['grpo', 'sapo']:"),
        ),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
