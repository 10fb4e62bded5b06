"""`logits_ppo_loss`: a policy loss straight from logits, gradient formed in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._results import HeadLoss, Moments, Stats
from ppo_fast._schema import HANDLES
from ppo_fast.ops.backward import n_grads, once_differentiable, scaled, scaled_
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.logprobs import (
    Scoring,
    check_ignore_index,
    check_logits,
    check_temperature,
    score,
)
from ppo_fast.ops.options import Bounds, Coefficient, PPOOptions
from ppo_fast.ops.policy import Policy, check_policy
from ppo_fast.ops.ppo_loss import loss_and_stats

_OP = "logits_ppo_loss"


def one_pass(
    logits: Tensor, scoring: Scoring, policy: Policy, inplace: bool
) -> tuple[Tensor, ...]:
    """(loss, stats, logprobs, entropy, gradient): the kernel reads each row from memory once."""
    variant, estimator, straight, *_ = policy.packed.codes
    backend = scoring.backend
    keep: Any = scoring.mask  # never None here: ignored tokens are left out
    results = HANDLES["logits_ppo_loss_" if inplace else "logits_ppo_loss"][backend](
        logits, scoring.tokens, keep, scoring.heat, policy.old_logprobs,
        policy.advantages, policy.is_weights, policy.moments, policy.ref_logprobs,
        policy.weights(keep, keep), policy.packed.entropy_coef,
        policy.packed.kl_coef, [*scoring.codes, variant, estimator, straight],
        [*scoring.params, *policy.packed.params[:-1]],
    )  # fmt: skip
    logprobs, entropy = results[:2]
    loss, stats, *_ = policy.call(backend, logprobs, keep, entropy)
    return loss, stats, logprobs, entropy, logits if inplace else results[2]


class _LogitsPPOLoss(torch.autograd.Function):
    """Saves the logits' gradient; where it lies over the logits, a second backward raises."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, scoring: Scoring, policy: Policy, inplace: bool) -> Any:
        loss, stats, logprobs, entropy, dlogits = one_pass(logits, scoring, policy, inplace)
        if inplace:
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(dlogits)
        ctx.inplace = inplace
        ctx.mark_non_differentiable(stats, logprobs, entropy)
        ctx.set_materialize_grads(False)
        return loss, stats, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return None, None, None, None
        (dlogits,) = ctx.saved_tensors
        if not ctx.inplace:
            return scaled(dlogits, grad), None, None, None
        # A second backward would scale what is scaled already: the version's bump makes it raise.
        torch.autograd.graph.increment_version(dlogits)
        return scaled_(dlogits.detach(), grad), None, None, None


def two_passes(
    logits: Tensor, scoring: Scoring, policy: Policy, grads: int, inplace: bool
) -> tuple[Tensor, ...]:
    """(loss, stats, logprobs, entropy) by both ops in turn: a backward reads the logits again.

    For gspo, where a token's slope needs its whole sequence first, and for fp16, whose gradient
    must not be rounded before it is multiplied by the incoming one, a loss scale mostly.
    Without a gradient (`grads` 0) there is one pass.
    """
    logprobs, entropy = score(logits, scoring, inplace)
    loss, stats = loss_and_stats(
        logprobs, entropy, scoring.mask, policy.replace(n_grads=grads), grads, scoring.backend
    )
    return loss, stats, logprobs.detach(), entropy.detach()


@derivatives("logits")
def logits_ppo_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    inplace: bool = False,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    variant: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: Bounds = 20.0,
    is_weights: Tensor | None = None,
    advantage_moments: Moments | None = None,
    entropy_coef: Coefficient = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: Coefficient = 0.0,
    kl_estimator: str = "k3",
    kl_clamp: float | None = 10.0,
    kl_ratio_clip: float | None = None,
    reduction: str = "token-mean",
    denom: Coefficient | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> HeadLoss:
    """`ppo_loss` of `token_logprobs(logits, tokens)` with its entropies, gradient and all.

    Args:
        logits: `(B, T, V)` or `(N, V)`, as in `token_logprobs`; differentiable.
        inplace: write the gradient over the logits, which nothing else may use; their version is
            bumped, so a second backward raises. Without a gradient to form, nothing is written.
            "gspo" and fp16 read the logits twice and form the gradient in the backward: in fp16 a
            loss scale (`torch.amp.GradScaler`) must reach it before it is rounded.
        tokens, temperature, ignore_index: as in `token_logprobs`. Ignored tokens are masked.
        old_logprobs, advantages, mask and the options of the loss: as in `ppo_loss`.

    Returns:
        `HeadLoss(loss, stats, logprobs, entropy)`; the last two `(...)`, detached, 0 where masked.
        Gradients under `retain_graph`: as `ppo_loss`'s.

    Raises:
        ValueError: shape, device or range. TypeError: dtype. IndexError: see `token_logprobs`.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    check_logits(_OP, logits)
    shape = logits.shape[:-1]
    _checks.indices(_OP, "tokens", tokens, shape, logits.device)
    mask = _checks.flags(_OP, "mask", mask, shape, logits.device)
    scalar, per_token = check_temperature(_OP, temperature, logits)
    check_ignore_index(_OP, ignore_index)
    main = _checks.main(_OP, "logits[..., 0]", logits.detach()[..., 0], cu_seqlens)
    policy = check_policy(
        _OP, main, old_logprobs, advantages, is_weights=is_weights,
        advantage_moments=advantage_moments, ref_logprobs=ref_logprobs, cu_seqlens=cu_seqlens,
        options=PPOOptions(
            variant, clip_low, clip_high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef,
            kl_estimator, kl_clamp, kl_ratio_clip, reduction, denom,
        ),
        has_entropy=True, n_grads=0,
    )  # fmt: skip
    keep = tokens != ignore_index
    keep = keep if mask is None else keep & (mask != 0)
    if _checks.DEBUG:
        _checks.tokens_in_range(_OP, tokens, keep, logits.shape[-1])
    name = _backend.select(_OP, backend, logits)
    if name == "reference":
        if inplace:
            raise ValueError(f"{_OP}: inplace must be False on 'reference', got True")
        return reference.logits_ppo_loss(
            logits, tokens, policy.old_logprobs, policy.advantages, keep,
            temperature=scalar if per_token is None else per_token, **policy.plain(_OP),
        )  # fmt: skip
    scoring = Scoring(tokens, keep, per_token, [ignore_index], [scalar], None, name)
    grads = 2 if n_grads(logits) else 0
    if grads and variant != "gspo" and logits.dtype != torch.float16:
        loss, stats, logprobs, entropy = _LogitsPPOLoss.apply(logits, scoring, policy, inplace)
    else:
        loss, stats, logprobs, entropy = two_passes(logits, scoring, policy, grads, inplace)
    return HeadLoss(loss, Stats(stats), logprobs, entropy)
