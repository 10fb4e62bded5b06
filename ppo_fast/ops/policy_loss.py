"""A policy loss from its log-probabilities: its correction first, then a surrogate or a kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ppo_fast._boundary import calls
from ppo_fast._boundary.options import TokenTensors
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
    if policy.correction is not None or policy.context_group is not None:
        policy, mask = corrected(policy, backend, mask, logprobs)
    form = policy.by_kernel if policy.surrogate is None else partial(surrogate_loss, policy)
    out = form(backend, logprobs, mask, entropy, n_grads)
    if policy.rollout is not None:
        set_fields(out[1], **correction.rollout_sums(policy.rollout))
    whole, own = policy.whole, policy.own_denom
    if whole is not None and own is not None:
        set_fields(out[1], n_seqs=whole.once((whole.tokens > 0).sum()), loss_denom=whole.once(own))
    elif own is not None:
        set_fields(out[1], loss_denom=own)
    return out


def corrected(
    policy: PolicyInputs, backend: str, mask: Tensor | None, logprobs: Tensor | None = None
) -> tuple[PolicyInputs, Tensor | None]:
    """The loss with its correction's weights and its context group's w and D, and its mask, where
    all they depend on is known."""
    c, x = policy.correction, policy.per_token
    now = logprobs if policy.late else x.old_logprobs
    if c is None or now is None:
        return policy.settled(mask), mask
    rows = keep_of(now, mask)
    every = rows if policy.counted is None else policy.counted
    known = rows if policy.late else every
    split = (policy.cu_seqlens, policy.context_group)
    tokens, kept, stats = _weighted(backend, c, now, x, known, *split)
    policy = policy._replace(per_token=tokens, correction=None, rollout=stats)
    if not correction.recounts(c):
        return policy.settled(mask), mask
    new = correction.counted(c, kept, rows, every, **policy.counting_options())
    return policy.with_counts(new), new.rows


def of_rows(
    policy: PolicyInputs, backend: str, logprobs: Tensor, keep: Tensor, entropy: Tensor
) -> tuple[PolicyInputs, Tensor]:
    """The kernels' loss of rows (R,) that do not depend on others, and its mask."""
    c = policy.correction
    if c is not None:
        x, kept, _ = _weighted(backend, c, logprobs, policy.per_token, keep, None, None)
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
    context_group: dist.ProcessGroup | None,
) -> tuple[TokenTensors, Tensor, Tensor]:
    """The constants with the correction's weights, what is not rejected, and the statistics."""
    rollout: Any = x.rollout_logprobs  # checked with the correction
    form = partial(formed, backend)
    split = (cu_seqlens, context_group)
    found = correction.corrected(c, logprobs, rollout, x.is_weights, keep, *split, form)
    drops = c.reject and c.drops == "policy"
    tokens = x._replace(is_weights=found.is_weights, accepted=found.kept if drops else None)
    return tokens, found.kept, found.stats
