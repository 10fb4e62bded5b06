"""A policy loss from its log-probabilities: its correction first, then a surrogate or a kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ppo_fast._boundary import calls
from ppo_fast._boundary.options import TokenTensors
from ppo_fast._boundary.schema import REDUCTIONS, compute_dtype
from ppo_fast.corrections import Correction
from ppo_fast.ops.policy import PolicyInputs
from ppo_fast.ops.rollout_weights import formed
from ppo_fast.ops.surrogate import elementwise, given, set_fields, surrogate_loss
from ppo_fast.reference import correction
from ppo_fast.reference.common import keep_of


def policy_loss(
    policy: PolicyInputs,
    backend: str,
    logprobs: Tensor,
    mask: Tensor | None,
    entropy: Tensor | None,
    n_grads: int,
) -> calls.RawLoss:
    """(loss, stats, scale, grads) of `n_grads` gradients."""
    if policy.correction is not None:
        policy, mask = corrected(policy, backend, mask, logprobs)
    form = policy.by_kernel if policy.surrogate is None else partial(surrogate_loss, policy)
    out = form(backend, logprobs, mask, entropy, n_grads)
    if policy.rollout is not None:
        set_fields(out[1], **correction.rollout_sums(policy.rollout))
    if policy.own_denom is not None:
        set_fields(out[1], loss_denom=policy.own_denom)
    return out


def corrected(
    policy: PolicyInputs, backend: str, mask: Tensor | None, logprobs: Tensor | None = None
) -> tuple[PolicyInputs, Tensor | None]:
    """The loss with its correction's weights, and its mask, where all they depend on is known."""
    c, x = policy.correction, policy.per_token
    now = logprobs if policy.late else x.old_logprobs
    if c is None or now is None:
        return policy, mask
    rows = keep_of(now, mask)
    every = rows if policy.counted is None else policy.counted
    known = rows if policy.late else every
    tokens, kept, stats = _weighted(backend, c, now, x, known, policy.cu_seqlens)
    policy = policy._replace(per_token=tokens, correction=None, rollout=stats)
    if not correction.recounts(c):
        return policy, mask
    g = policy.given
    new = correction.counted(
        c,
        kept,
        rows,
        every,
        policy.cu_seqlens,
        reduction=g.reduction,
        denom=None if g.denom is None else policy.given_denom(rows.device),
        sequence_weights=policy.sequence_weights,
        dtype=compute_dtype(x.advantages),
    )
    denom: Any = new.denom  # a tensor, as the one it was made of
    reduction = REDUCTIONS.index(new.reduction)
    policy = policy._replace(
        given=g._replace(reduction=new.reduction, denom=denom),
        options=policy.options._replace(reduction=reduction, denom=0.0, denom_tensor=denom),
        sequence_weights=new.sequence_weights,
        own_denom=new.own,
    )
    return policy, new.rows


def of_rows(
    policy: PolicyInputs, backend: str, logprobs: Tensor, keep: Tensor, entropy: Tensor
) -> tuple[PolicyInputs, Tensor]:
    """The kernels' loss of rows (R,) that do not depend on others, and its mask."""
    c = policy.correction
    if c is not None:
        x, kept, _ = _weighted(backend, c, logprobs, policy.per_token, keep, None)
        policy = policy._replace(per_token=x, correction=None)
        keep = keep & kept if c.drops == "all" else keep
    if policy.surrogate is not None:
        found = elementwise(policy, logprobs, keep, entropy)
        policy = given(policy, found.value, found.slope)
    return policy, keep


def _weighted(
    backend: str,
    c: Correction,
    logprobs: Tensor,
    x: TokenTensors,
    keep: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[TokenTensors, Tensor, Tensor]:
    """The constants with the correction's weights, what is not rejected, and the statistics."""
    rollout: Any = x.rollout_logprobs  # checked with the correction
    form = partial(formed, backend)
    found = correction.corrected(c, logprobs, rollout, x.is_weights, keep, cu_seqlens, form)
    drops = c.reject and c.drops == "policy"
    tokens = x._replace(is_weights=found.is_weights, accepted=found.kept if drops else None)
    return tokens, found.kept, found.stats
