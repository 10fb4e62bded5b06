"""TRL 1.16's `GRPOTrainer` on ppo_fast: the head's log-probabilities and entropies, and the loss.

`apply()`, `revert()` and `patched()`. The entropy bonus, the clip-ratio metrics, rewards and
generation stay TRL's own. The op "logprobs", on whole logits, is what TRL's experimental trainers
call and GRPO does not: it is patched when named.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast import compat
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._extract import Block
from ppo_fast.integrations._first_call import first_of_head, first_tokens
from ppo_fast.integrations._patch import Arguments, Integration, Swap

_OUTPUTS = {"log_probs", "entropy"}
_UNBOUNDED = torch.finfo(torch.float32).max


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
    by_sequence = self.importance_sampling_level == "sequence"
    weights = _weights(
        self,
        inputs,
        per_token_logps,
        old_per_token_logps,
        advantages,
        mask,
        entropy_mask,
        by_sequence,
    )
    options, denom, normalizer = _options(self, inputs, mask, by_sequence)
    if by_sequence and advantages.shape[1] != 1:
        raise Uncovered("advantages per token beside importance_sampling_level 'sequence'")
    metrics = _for_metrics(self, inputs, per_token_logps, old_per_token_logps, mask, by_sequence)
    options |= {"log_ratio_clamp": None, "denom": denom}
    corrected = self.beta != 0.0 and self.args.use_bias_correction_kl
    if corrected and by_sequence:
        raise Uncovered("use_bias_correction_kl beside importance_sampling_level 'sequence'")
    kl = {}
    if self.beta != 0.0:
        # The gradient of ρ·k3 is ρ·d: the ratio times k2's, which is what "+" takes.
        kl = {
            "ref_logprobs": inputs["ref_per_token_logps"],
            "kl_coef": self.beta,
            "kl_estimator": "k3+" if corrected else "k3",
            "kl_clamp": None,
            "kl_ratio_clip": _UNBOUNDED if corrected else None,
        }
    loss, _ = ppo_fast.ppo_loss(
        per_token_logps, old_per_token_logps, advantages, mask, is_weights=weights, **options, **kl
    )
    if corrected:
        k3, ratio = metrics["per_token_kl"], (per_token_logps - old_per_token_logps).detach().exp()
        metrics["per_token_kl"] = ratio * k3
        # Only the value is missing. Where the ratio is 1 the policy term is −A: the same sum.
        reduction = {k: options[k] for k in ("reduction", "denom") if k in options}
        missing = self.beta * (k3 - ratio * k3)
        loss = (
            loss
            + ppo_fast.ppo_loss(per_token_logps.detach(), None, missing, mask, **reduction).loss
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
    by_sequence: bool,
) -> Tensor | None:
    """The product of what multiplies the policy term, or None.

    TRL's sequence ratio is one term for all tokens, so that a weight of one token reaches every
    token's gradient: only weights per sequence are the same in both.
    """
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
    if self.use_vllm and self.vllm_importance_sampling_correction:
        found.append(inputs["importance_sampling_ratio"])
    product = None
    for weight in found:
        if by_sequence and weight.shape[1] != 1:
            raise Uncovered("weights per token beside importance_sampling_level 'sequence'")
        weight = weight.to(logps.dtype)
        product = weight if product is None else product * weight
    return None if product is None else product.expand(logps.shape)


def _options(
    self: Any, inputs: dict[str, Any], mask: Tensor, by_sequence: bool
) -> tuple[dict[str, Any], float | Tensor | None, Any]:
    """ppo_loss's options, what Σ is divided by, and what TRL divides the loss by after that."""
    kind, delta = self.loss_type, self.args.delta
    training = self.model.training
    normalizer = self.current_gradient_accumulation_steps if training else 1.0
    clip = {"clip_low": self.epsilon_low, "clip_high": self.epsilon_high}
    variant = "gspo" if by_sequence else "clip"
    if kind == "cispo":
        if by_sequence or self.epsilon_high < 1:
            raise Uncovered(
                f"cispo with epsilon_high {self.epsilon_high} by {self.importance_sampling_level}"
            )
        variant, delta = "cispo", None
        clip = {"clip_low": 1.0, "clip_high": self.epsilon_high - 1}
    elif kind not in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        raise Uncovered(f"loss_type {kind!r}")
    if delta is not None and delta < 1 + self.epsilon_high:
        raise Uncovered(f"delta {delta} within epsilon_high {self.epsilon_high}")
    options = {"variant": variant, "dual_clip": delta, **clip}
    rows = float(len(mask))
    if kind == "grpo":
        return {**options, "reduction": "seq-mean-token-mean"}, rows, normalizer
    if kind == "luspo":
        return {**options, "reduction": "seq-mean-token-sum"}, rows, normalizer
    if kind == "bnpo":
        return options, None, normalizer
    if kind == "dr_grpo":
        return options, rows * self.max_completion_length, normalizer
    items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
    if training:
        items = items * self.current_gradient_accumulation_steps / self.args.steps_per_generation
    return options, items, 1.0


@torch.no_grad()
def _for_metrics(
    self: Any,
    inputs: dict[str, Any],
    logps: Tensor,
    old: Tensor,
    mask: Tensor,
    by_sequence: bool,
) -> dict[str, Any]:
    """The ratio and the KL that TRL's own metrics are taken from."""
    log_ratio = logps - old
    if by_sequence:
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    ratio = log_ratio.exp()
    if self.args.delta is not None and self.loss_type != "cispo":
        ratio = ratio.clamp(max=self.args.delta)
    found = {"coef_1": ratio}
    if self.beta != 0.0:
        d = inputs["ref_per_token_logps"] - logps
        found["per_token_kl"] = d.exp() - d - 1
    return found


def _compared(arguments: Arguments, result: dict[str, Any]) -> dict[str, Any]:
    """The names that the trainer uses afterwards; ratio and KL of padding are left out."""
    keep = arguments["mask"]
    per_token = {k: result.get(k) for k in ("coef_1", "per_token_kl")}
    masked = {k: (x * keep).detach() for k, x in per_token.items() if x is not None}
    return {"loss": result["loss"], "policy_loss": result["policy_loss"], **masked}


integration = Integration(
    name="trl_grpo",
    package="trl",
    version="1.16",
    extra="trl-grpo",
    on_request=("logprobs",),
    swaps=(
        Swap(
            "linear_logprobs",
            "trl.kernels.chunked_logprob:ChunkedLogProbFunction.apply",
            _linear_logprobs,
            sample=first_of_head("hidden", "weight", "targets", "bias"),
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
