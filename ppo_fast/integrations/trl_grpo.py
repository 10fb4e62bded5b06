"""TRL's `GRPOTrainer` on ppo_fast: the head's log-probabilities and entropies, and the loss.

`apply()`, `revert()` and `patched()`. The entropy bonus, the clip-ratio metrics, rewards and
generation stay TRL's own. The op "logprobs", on whole logits, is what GRPO calls before 1.15, and
TRL's experimental trainers alone from there on: it is then patched when named.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast import compat, surrogates
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._extract import Block
from ppo_fast.integrations._first_call import first_of_head, first_tokens
from ppo_fast.integrations._grpo import cispo, clip
from ppo_fast.integrations._patch import Arguments, Integration, Swap

_OUTPUTS = {"log_probs", "entropy"}


def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
) -> tuple[Tensor, Tensor | None, None, None, None]:
    """z = cap·tanh(s·x / cap) / T is (cap/s)·tanh(x / (cap/s)) / (T/s)."""
    more = set(outputs) - _OUTPUTS
    if more:
        raise Uncovered(f"outputs {sorted(more)}")
    if logit_scale <= 0:
        raise Uncovered(f"logit_scale {logit_scale}")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise Uncovered(f"hidden states {hidden.dtype} beside a weight {weight.dtype}")
    if hasattr(weight, "ds_id"):
        raise Uncovered("a weight that DeepSpeed ZeRO-3 takes away between forward and backward")
    cap = final_logit_softcapping
    logprobs, entropy = ppo_fast.linear_token_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature / logit_scale,
        softcap=None if cap is None else cap / logit_scale,
    )
    return logprobs, entropy if "entropy" in outputs else None, None, None, None


def _entropy(logits: Tensor, chunk_size: int = 128) -> Tensor:
    return compat.entropy_from_logits(logits, chunk_size)


def _loss(
    self: Any,
    inputs: dict[str, Any],
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy_mask: Tensor | None,
) -> dict[str, Any]:
    logps, old = per_token_logps, old_per_token_logps
    metrics = _for_metrics(self, inputs, logps, old, advantages, mask)
    weights = _weights(self, inputs, logps, old, advantages, mask, entropy_mask)
    options, normalizer = _reduction(self, inputs, len(mask))
    if self.beta != 0.0:
        options |= {
            "ref_logprobs": inputs["ref_per_token_logps"],
            "kl_coef": self.beta,
            "kl_clamp": None,
            "kl_weight": "ratio" if self.args.use_bias_correction_kl else None,
        }
    loss, _ = ppo_fast.ppo_loss(
        logps,
        old,
        advantages * metrics["phi_seq"] if self.loss_type == "vespo" else advantages,
        mask,
        ratio_level=_level(self, advantages, weights),
        is_weights=weights,
        log_ratio_clamp=None,
        **_policy(self),
        **options,
    )
    mode = "train" if self.model.training else "eval"
    own = {"loss": loss / normalizer, "policy_loss": loss.detach(), "normalizer": normalizer}
    return {**own, "mode": mode, **metrics}


def _weights(
    self: Any,
    inputs: dict[str, Any],
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy_mask: Tensor | None,
) -> Tensor | None:
    """The product of what multiplies the policy term, `(B, T)` or `(B, 1)`, or None."""
    found = []
    if self.off_policy_mask_threshold is not None:
        found.append(
            self.get_off_policy_mask(
                advantages=advantages,
                per_token_logps=logps,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            )
        )
    if entropy_mask is not None:
        found.append(entropy_mask)
    correction = self.use_vllm and self.vllm_importance_sampling_correction
    if correction and self.loss_type != "vespo":  # which has the ratios in phi
        found.append(inputs["importance_sampling_ratio"])
    product = None
    for weight in found:
        weight = weight.to(logps.dtype)
        product = weight if product is None else product * weight
    return product


def _level(self: Any, advantages: Tensor, weights: Tensor | None) -> str:
    """The ratio's level; one that has kernels where a sequence's tokens have like terms.

    The mean's gradient is then each token's own, as every token counts as much as another.
    """
    level: str = self.importance_sampling_level
    like = all(x is None or x.shape[1] == 1 for x in (advantages, weights))
    corrected = self.beta != 0.0 and self.args.use_bias_correction_kl
    return "sequence-token" if level == "sequence" and like and not corrected else level


def _policy(self: Any) -> dict[str, Any]:
    """The policy term, as ppo_loss's options."""
    low, high, delta = self.epsilon_low, self.epsilon_high, self.args.delta
    if self.loss_type == "vespo":
        # −φ·A·logprobs: the advantages have φ, and a ratio clipped to [1, 1] is none.
        return {"variant": "cispo", "clip_low": 0.0, "clip_high": 0.0}
    if self.loss_type == "sapo":
        pos, neg = self.args.sapo_temperature_pos, self.args.sapo_temperature_neg
        return {"variant": surrogates.sapo(pos, neg)}
    if self.loss_type == "cispo":
        return cispo(high)
    return clip(low, high, delta)


def _reduction(self: Any, inputs: dict[str, Any], rows: int) -> tuple[dict[str, Any], float]:
    """ppo_loss's reduction and divisor, and what TRL divides the loss by after that."""
    kind, training = self.loss_type, self.model.training
    normalizer = self.current_gradient_accumulation_steps if training else 1.0
    if kind in ("grpo", "sapo"):
        return {"reduction": "seq-mean-token-mean", "denom": float(rows)}, normalizer
    if kind == "luspo":
        return {"reduction": "seq-mean-token-sum", "denom": float(rows)}, normalizer
    if kind == "bnpo":
        return {"reduction": "token-mean"}, normalizer
    if kind == "dr_grpo":
        return {"denom": float(rows * self.max_completion_length)}, normalizer
    if kind not in ("cispo", "dapo", "vespo"):
        raise Uncovered(f"loss_type {kind!r}")
    items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
    if training:
        items = items * self.current_gradient_accumulation_steps / self.args.steps_per_generation
    return {"denom": items}, 1.0


@torch.no_grad()
def _for_metrics(
    self: Any,
    inputs: dict[str, Any],
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
) -> dict[str, Any]:
    """The ratio, the KL and φ that TRL's own metrics are taken from, by TRL's formulas."""
    level, log_ratio = self.importance_sampling_level, logps - old
    if level not in ("token", "sequence"):
        raise Uncovered(f"importance_sampling_level {level!r}")
    ratio = log_ratio.exp()
    if level == "sequence":
        mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
        ratio = mean.exp()
    found = {"coef_1": ratio}
    if self.beta != 0.0:
        d = inputs["ref_per_token_logps"] - logps
        kl = d.exp() - d - 1
        found["per_token_kl"] = kl * ratio if self.args.use_bias_correction_kl else kl
    if self.loss_type == "vespo":
        found["phi_seq"] = self.get_gamma_weights(
            advantages=advantages,
            log_ratio_per_token=log_ratio,
            mask=mask,
            importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
            k_pos=self.args.vespo_k_pos,
            lambda_pos=self.args.vespo_lambda_pos,
            k_neg=self.args.vespo_k_neg,
            lambda_neg=self.args.vespo_lambda_neg,
        )
    elif self.args.delta is not None and self.loss_type not in ("cispo", "sapo"):
        found["coef_1"] = ratio.clamp(max=self.args.delta)
    return found


def _compared(arguments: Arguments, result: dict[str, Any]) -> dict[str, Any]:
    """The names that the trainer uses afterwards; ratio and KL of padding are left out."""
    keep = arguments["mask"]
    per_token = {k: result.get(k) for k in ("coef_1", "per_token_kl", "phi_seq")}
    masked = {k: (x * keep).detach() for k, x in per_token.items() if x is not None}
    return {"loss": result["loss"], "policy_loss": result["policy_loss"], **masked}


integration = Integration(
    name="trl_grpo",
    package="trl",
    extra="trl-grpo",
    on_request=("logprobs",),
    instead={"linear_logprobs": "logprobs"},
    swaps=(
        Swap(
            "linear_logprobs",
            "trl.kernels.chunked_logprob:ChunkedLogProbFunction.apply",
            _linear_logprobs,
            sample=first_of_head("hidden", "weight", "targets", "bias"),
            optional=True,
        ),
        Swap(
            "loss",
            "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss",
            _loss,
            view=_compared,
            block=Block(
                "if self.off_policy_mask_threshold is not None:\n    sampling_per_token_logps",
                "if self.loss_type in ['grpo', 'sapo']:",
            ),
        ),
        Swap(
            "logprobs",
            "trl.trainer.utils:selective_log_softmax",
            compat.selective_log_softmax,
            sample=first_tokens("logits", "index", "row_mask"),
        ),
        Swap(
            "logprobs",
            "trl.trainer.utils:selective_log_softmax_and_entropy",
            compat.selective_log_softmax_and_entropy,
            sample=first_tokens("logits", "index", "row_mask"),
            optional=True,
        ),
        Swap(
            "logprobs",
            "trl.trainer.utils:entropy_from_logits",
            _entropy,
            sample=first_tokens("logits"),
        ),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
