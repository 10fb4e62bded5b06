"""`ppo_loss`: surrogate, KL, entropy bonus, gradients and every statistic in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._results import Loss, Moments, Stats
from ppo_fast.corrections import Correction
from ppo_fast.ops.backward import n_grads, once_differentiable, scaled
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.loss_options import Bounds, Coefficient, Variant, loss_options
from ppo_fast.ops.policy import PolicyInputs, check_policy
from ppo_fast.ops.policy_loss import policy_loss

_OP = "ppo_loss"


class _PPOLoss(torch.autograd.Function):
    """The gradient is formed in the forward; the backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        constants: tuple[Tensor | None, PolicyInputs, int, str],
    ) -> Any:
        mask, policy, grads, backend = constants
        loss, stats, *saved = policy_loss(policy, backend, logprobs, mask, entropy, grads)
        ctx.save_for_backward(*saved)
        ctx.backend = backend
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        if grad is None:
            return None, None, None
        scale, grads = ctx.saved_tensors
        by_logprobs, by_entropy, *_ = ctx.needs_input_grad
        grads = scaled(ctx.backend, grads, grad, scale)
        by = grads[0] if by_logprobs else None, grads[1] if by_entropy else None
        return *by, None


@derivatives("logprobs", "entropy")
def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    variant: Variant = "clip",
    ratio_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    log_ratio_clamp: Bounds = 20.0,
    is_weights: Tensor | None = None,
    sequence_weights: Tensor | None = None,
    advantage_moments: Moments | None = None,
    entropy: Tensor | None = None,
    entropy_coef: Coefficient = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: Coefficient = 0.0,
    kl_estimator: str = "k3",
    kl_clamp: float | None = 10.0,
    kl_ratio_clip: float | None = None,
    kl_weight: str | None = None,
    reduction: str = "token-mean",
    denom: Coefficient | None = None,
    cu_seqlens: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    correction: Correction | None = None,
    context_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Loss:
    """Σ w·(policy + kl_coef·kl − entropy_coef·entropy) / D over the unmasked tokens.

    With d = logprobs − old_logprobs (clamped) and ρ = exp d, the policy term is

    - "clip": max(−Aρ, −A·clip(ρ, 1 − clip_low, 1 + clip_high)), Schulman et al. 2017, eq. 7;
      `dual_clip` c > 1 caps it at −Ac where A < 0 (Ye et al. 2020, eq. 5);
    - "gspo": the same with the sequence's ρ = exp(mean d) (Zheng et al. 2025), gradient through
      each token's own log-probability;
    - "cispo": −sg(clip ρ)·A·logprobs (MiniMax-M1 2025, eq. 4);
    - "penalty": −ρA + kl_coef·KL(old‖new), no `ref_logprobs` (Schulman et al. 2017, eq. 8);
    - "linear": −(ρA − kl_coef·(ρ − ρ')A), ρ' = exp(ref_logprobs − old_logprobs), kl_coef < 1;
    - "sapo", "dppo-tv", "dppo-kl" (thresholds `clip_low`, `clip_high`) and "reinforce":
      `ppo_fast.surrogates` with their default options;
    - a `ppo_fast.Surrogate`: any function of a token's terms. docs/losses.md has the table.

    Args:
        logprobs: `(B, T)`, or flat `(N,)`; differentiable. fp32, bf16, fp16 (fp64 except Triton).
        old_logprobs: same shape, or None for the current ones detached (ρ exactly 1).
        advantages: same shape, or `(B, 1)`, broadcast without a copy.
        mask: same shape, any real dtype, non-zero keeps.
        ratio_level: ρ of the "token"; "sequence": exp(mean d), its gradient through the mean;
            "sequence-token": the same value, each token's own gradient ("gspo" is "clip" with it).
        clip_low, clip_high: half-widths below and above 1; 1.0 and inf switch a bound off.
        ratio_cap: for dppo and reinforce, c makes the term −A·sg(min(ρ, c))·logprobs, None −A·ρ.
        log_ratio_clamp: number, (low, high) or None; no gradient outside. Of the token's
            log-ratio, and of the sequence's mean one in "gspo".
        is_weights: same shape, or `(B, 1)`; detached, multiply the policy term only, and a 0 drops
            it, whatever it is.
        sequence_weights: `(B,)`, or `(S,)` with cu_seqlens; detached, multiply every term of their
            sequence. D and the other statistics are as without.
        advantage_moments: whiten A on the fly: shifted, unbiased, 1e-8 added to the variance.
        entropy: same shape (nats), differentiable; `entropy_coef` times it is subtracted.
        kl_estimator: k1, k2, k3 or abs of logprobs − ref_logprobs; "+" keeps the value and takes
            k2's gradient. `kl_clamp` bounds the value, `kl_ratio_clip` ("+" only) multiplies the
            gradient by the detached min(ρ, it).
        kl_weight: "ratio" makes the KL term ρ·kl (TRL's use_bias_correction_kl), "score"
            exp(logprobs − sg(logprobs))·kl (NeMo-RL), the clamped kl in both, and the gradient
            flows through the weight too; not with "+", "penalty" or "linear". `ref_kl` in the
            statistics is without the weight.
        reduction: "token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum" or
            "seq-mean-token-sum-norm"; `denom` (a number or 0-d tensor) replaces D whole.
        cu_seqlens: `(S + 1,)` int32 or int64 for packed `(N,)` inputs.
        rollout_logprobs: same shape, of the policy that sampled; a field of `TokenTerms`, and what
            a `correction` (`ppo_fast.Correction`) makes weights and rejections of, which multiply
            `is_weights`. With `old_logprobs=None` they are those of the current log-probabilities.
        context_group: ranks each of which holds a part of every sequence (context or sequence
            parallelism), empty ones included: the same number of sequences, in one order, with the
            `cu_seqlens` of the own part. Lengths, D and ratios are then those of the whole
            sequences, and the result is this rank's share: losses, gradients and `Stats` of the
            ranks add up to the whole's, if all have the same incoming gradient. Not with
            `clip_cov` and `kl_cov`. docs/parallel.md.

    Returns:
        `Loss(loss, stats)`: a 0-d fp32 loss (fp64 for fp64 inputs) and mergeable `Stats`.
        Under `retain_graph`, change only a copy of a gradient in place: it can be the tensor that
        is kept for the next backward, which raises then.

    Raises:
        ValueError: shape, device or range. TypeError: dtype or wrong object.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    logprobs = _checks.main(_OP, "logprobs", logprobs, cu_seqlens)
    if entropy is not None:
        _checks.alike(_OP, logprobs, entropy=entropy)
    mask = _checks.flags(_OP, "mask", mask, logprobs.shape, logprobs.device)
    policy = check_policy(
        _OP,
        logprobs,
        old_logprobs,
        advantages,
        is_weights=is_weights,
        sequence_weights=sequence_weights,
        advantage_moments=advantage_moments,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        correction=correction,
        cu_seqlens=cu_seqlens,
        context_group=context_group,
        options=loss_options(
            variant=variant,
            ratio_level=ratio_level,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            ratio_cap=ratio_cap,
            log_ratio_clamp=log_ratio_clamp,
            entropy_coef=entropy_coef,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_clamp=kl_clamp,
            kl_ratio_clip=kl_ratio_clip,
            kl_weight=kl_weight,
            reduction=reduction,
            denom=denom,
        ),
        has_entropy=entropy is not None,
    )
    name = _backend.select(_OP, backend, logprobs)
    if name == "reference":
        return reference.ppo_loss(
            logprobs, mask=mask, entropy=entropy, **policy.for_reference(_OP)
        )
    grads = n_grads(logprobs, entropy)
    loss, stats = loss_and_stats(logprobs, entropy, mask, policy, grads, name)
    return Loss(loss, Stats(stats))


def loss_and_stats(
    logprobs: Tensor,
    entropy: Tensor | None,
    mask: Tensor | None,
    policy: PolicyInputs,
    grads: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss of checked arguments, differentiable by the first `grads` of its inputs."""
    if grads:
        constants = (mask, policy, grads, backend)
        out: tuple[Tensor, Tensor] = _PPOLoss.apply(logprobs, entropy, constants)
        return out
    loss, stats, *_ = policy_loss(policy, backend, logprobs, mask, entropy, 0)
    return loss, stats
