"""`logits_ppo_loss`: a policy loss straight from logits, gradient formed in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._boundary import calls
from ppo_fast._boundary.options import Scoring
from ppo_fast._results import HeadLoss, Moments, Stats
from ppo_fast.corrections import Correction
from ppo_fast.ops.backward import n_grads, once_differentiable, scaled, scaled_
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.logprobs import check_scoring, kept, score
from ppo_fast.ops.loss_options import Bounds, Coefficient, Variant, loss_options
from ppo_fast.ops.policy import PolicyInputs, check_policy
from ppo_fast.ops.policy_loss import corrected, policy_loss
from ppo_fast.ops.ppo_loss import loss_and_stats
from ppo_fast.ops.support import check_support
from ppo_fast.support import Support

_OP = "logits_ppo_loss"


def one_pass(
    logits: Tensor, s: Scoring, policy: PolicyInputs, backend: str, inplace: bool
) -> tuple[Tensor, ...]:
    """(loss, stats, logprobs, entropy, gradient): the kernel reads each row from memory once."""
    keep: Any = s.mask  # never None here: ignored tokens are left out
    args = (backend, logits, s, policy.per_token, policy.weights(keep, keep), policy.options)
    if inplace:
        logprobs, entropy = calls.logits_ppo_loss_(*args)
        dlogits = logits
    else:
        logprobs, entropy, dlogits = calls.logits_ppo_loss(*args)
    loss, stats, *_ = policy_loss(policy, backend, logprobs, keep, entropy, 0)
    return loss, stats, logprobs, entropy, dlogits


class _LogitsPPOLoss(torch.autograd.Function):
    """Saves the logits' gradient; where it lies over the logits, a second backward raises."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, constants: tuple[Scoring, PolicyInputs, str, bool]
    ) -> Any:
        loss, stats, logprobs, entropy, dlogits = one_pass(logits, *constants)
        *_, ctx.backend, ctx.inplace = constants
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(dlogits)
        ctx.mark_non_differentiable(stats, logprobs, entropy)
        ctx.set_materialize_grads(False)
        return loss, stats, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return None, None
        (dlogits,) = ctx.saved_tensors
        if not ctx.inplace:
            return scaled(ctx.backend, dlogits, grad), None
        # A second backward would scale what is scaled already: the version's bump makes it raise.
        torch.autograd.graph.increment_version(dlogits)
        return scaled_(ctx.backend, dlogits.detach(), grad), None


def two_passes(
    logits: Tensor,
    s: Scoring,
    policy: PolicyInputs,
    backend: str,
    grads: int,
    inplace: bool,
    support: Support | None,
) -> tuple[Tensor, ...]:
    """(loss, stats, logprobs, entropy) by both ops in turn: a backward reads the logits again.

    For gspo, where a token's slope needs its whole sequence first; for surrogates and corrections
    by the current log-probabilities, which the kernel has not; and for fp16, whose gradient must
    not be rounded before it is multiplied by the incoming one, a loss scale mostly; and for a
    support, whose pairs alone are read. Without a gradient (`grads` 0) there is one pass.
    """
    logprobs, entropy = score(logits, s, None, backend, inplace, support)
    loss, stats = loss_and_stats(logprobs, entropy, s.mask, policy, grads, backend)
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
    support: Support | None = None,
    backend: str | None = None,
) -> HeadLoss:
    """`ppo_loss` of `token_logprobs(logits, tokens)` with its entropies, gradient and all.

    Args:
        logits: `(B, T, V)` or `(N, V)`, as in `token_logprobs`; differentiable.
        inplace: write the gradient over the logits, which nothing else may use; their version is
            bumped, so a second backward raises. Without a gradient to form, nothing is written.
            "gspo", surrogates, corrections by the current log-probabilities and fp16 read the
            logits twice and form the gradient in the backward: in fp16 a loss scale
            (`torch.amp.GradScaler`) must reach it before it is rounded.
        tokens, temperature, ignore_index, support: as in `token_logprobs`. Ignored tokens are
            masked.
        old_logprobs, advantages, mask and the options of the loss: as in `ppo_loss`.

    Returns:
        `HeadLoss(loss, stats, logprobs, entropy)`; the last two `(...)`, detached, 0 where masked.
        Gradients under `retain_graph`: as `ppo_loss`'s.

    Raises:
        ValueError: shape, device or range. TypeError: dtype. IndexError: see `token_logprobs`.
        NotImplementedError: a forward-mode tangent of a constant, or on a named kernel backend.
    """
    scoring = check_scoring(_OP, logits, tokens, mask, temperature, ignore_index)
    policy = check_policy(
        _OP,
        _checks.main(_OP, "logits[..., 0]", logits.detach()[..., 0], cu_seqlens),
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
        has_entropy=True,
    )
    s = scoring._replace(mask=kept(scoring))
    if _checks.DEBUG:
        _checks.tokens_in_range(_OP, tokens, kept(s), logits.shape[-1])
    name = _backend.select_beside(_OP, backend, logits, None if support is None else "a support")
    check_support(_OP, support, tokens, s.mask, logits.shape[-1])
    if name == "reference":
        if inplace:
            raise ValueError(f"{_OP}: inplace must be False on 'reference', got True")
        return reference.logits_ppo_loss(
            logits,
            tokens,
            mask=s.mask,
            temperature=s.divisor(),
            support=support,
            **policy.for_reference(_OP),
        )
    return _head_loss(logits, s, policy, name, inplace, support)


def _head_loss(
    logits: Tensor,
    s: Scoring,
    policy: PolicyInputs,
    name: str,
    inplace: bool,
    support: Support | None,
) -> HeadLoss:
    policy, keep = corrected(policy, name, s.mask)
    s = s._replace(mask=keep)
    grads = 2 if n_grads(logits) else 0
    if grads and policy.one_pass and logits.dtype != torch.float16 and support is None:
        constants = (s, policy, name, inplace)
        loss, stats, logprobs, entropy = _LogitsPPOLoss.apply(logits, constants)
    else:
        args = (logits, s, policy, name, grads, inplace, support)
        loss, stats, logprobs, entropy = two_passes(*args)
    return HeadLoss(loss, Stats(stats), logprobs, entropy)
