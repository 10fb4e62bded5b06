"""`rollout_weights` and `off_policy_mask`: what a loss takes for samples of another policy."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._boundary import calls
from ppo_fast._boundary.schema import compute_dtype
from ppo_fast._results import RolloutStats, RolloutWeights
from ppo_fast._sequences import Sequences
from ppo_fast.corrections import Correction
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.loss_options import need_sequences

_OP = "rollout_weights"
_BACKENDS = ("reference", "cpu")


@derivatives()
def rollout_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    correction: Correction | None,
    normalize: bool = False,
    data_group: dist.ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> RolloutWeights:
    """Importance weights and rejections of tokens that another policy sampled.

    With x = old_logprobs − rollout_logprobs (detached), weights and mask are those that
    `Correction` describes: pass them to a loss as `is_weights` and `mask`, or let the loss form
    them (`rollout_logprobs=`, `correction=`). A NaN at an unmasked slot, a token that the sampler
    gave no log-probability, has x = 0 and is counted (`missing`); so has −inf of both.

    Args:
        old_logprobs, rollout_logprobs: `(B, T)`, or flat `(N,)`. fp32, bf16, fp16 or fp64.
        mask: same shape, any real dtype, non-zero keeps.
        correction: None gives weights of 1 and the statistics.
        normalize: divide the weights by their mean over tokens ("token"), or over sequences of
            each sequence's mean ("sequence", "geometric"), as verl's batch normalisation does;
            a mean of at most 1e-8 divides nothing.
        data_group: ranks over which that mean is taken (None: this call's alone).
        cu_seqlens: `(S + 1,)` for packed `(N,)`, where the correction needs sequences.

    Returns:
        `RolloutWeights(weights, mask, stats)`: fp32 (fp64) weights, 0 where masked, not changed by
        rejections; the bool mask without what was rejected; `RolloutStats`.

    Raises:
        ValueError: shape, device, or a backend without this op. TypeError: dtype, wrong object.
    """
    main = _checks.main(_OP, "old_logprobs", old_logprobs, cu_seqlens)
    _checks.alike(_OP, main, rollout_logprobs=rollout_logprobs)
    keep = _checks.flags(_OP, "mask", mask, main.shape, main.device)
    check_correction(_OP, correction, main, cu_seqlens)
    args = (main.detach(), rollout_logprobs.detach(), keep)
    name = _backend.select_among(_OP, _BACKENDS, backend, main)
    weights, kept, values = formed(name, *args, correction=correction, cu_seqlens=cu_seqlens)
    stats = RolloutStats(values)
    if normalize:
        weights = _normalized(weights, stats, main, keep, correction, cu_seqlens, data_group)
    return RolloutWeights(weights, kept, stats)


def formed(
    backend: str,
    old: Tensor,
    rollout: Tensor,
    mask: Tensor | None,
    *,
    correction: Correction | None,
    cu_seqlens: Tensor | None,
    context_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, mask and statistics of checked arguments; PyTorch where there is no kernel."""
    parts = context_group is not None and correction is not None and correction.needs_sequences()
    if backend == "cpu" and not parts:
        return calls.rollout_weights("cpu", old, rollout, mask, cu_seqlens, correction)
    split: dict[str, Any] = {"cu_seqlens": cu_seqlens, "context_group": context_group}
    return reference.rollout_weights(old, rollout, mask, correction=correction, **split)


def check_correction(
    op: str, correction: Any, main: Tensor, cu_seqlens: Tensor | None
) -> Correction | None:
    """`correction` itself; TypeError or ValueError where the call cannot have it."""
    if correction is None:
        return None
    if not isinstance(correction, Correction):
        raise TypeError(
            f"{op}: correction must be a ppo_fast.Correction, got {type(correction).__name__}"
        )
    if main.dim() == 1 and cu_seqlens is None and correction.needs_sequences():
        need_sequences(op, f"correction {correction}", main, cu_seqlens)
    return correction


def _normalized(
    weights: Tensor,
    stats: RolloutStats,
    main: Tensor,
    mask: Tensor | None,
    correction: Correction | None,
    cu_seqlens: Tensor | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The weights over their mean."""
    if correction is None or correction.level in (None, "token"):
        total = torch.stack([stats.field("weight"), stats.field("tokens")])
    else:
        seqs = Sequences(reference.common.keep_of(main, mask), cu_seqlens)
        total = torch.stack([seqs.mean(weights.double()).sum(), stats.field("seqs")])
    if group is not None:
        parts = [torch.empty_like(total) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, total, group=group)
        total = torch.stack(parts).sum(0)
    mean = total[0] / total[1].clamp(min=1)
    return (weights / torch.where(mean > 1e-8, mean, 1.0)).to(weights.dtype)


@derivatives()
def off_policy_mask(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    delta: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Weights of 0 or 1 that drop bad sequences which the policy has left (DeepSeek-V3.2 2025).

    0 where A < 0 and the mean of rollout_logprobs − logprobs over the sequence's unmasked tokens
    is above `delta`; 1 elsewhere. Pass it to a loss as `is_weights`, times others. In PyTorch.

    Args:
        logprobs: the current policy's, `(B, T)`, or flat `(N,)` with `cu_seqlens`; detached.
        rollout_logprobs: the sampler's, same shape; a NaN counts as no difference.
        advantages: same shape, or `(B, 1)`.
        mask: same shape, any real dtype, non-zero keeps.
        delta: bound in nats.

    Returns:
        Weights in the shape of `advantages`, fp32 (fp64 for fp64).

    Raises:
        ValueError: shape, device, range. TypeError: dtype.
    """
    op = "off_policy_mask"
    main = _checks.main(op, "logprobs", logprobs, cu_seqlens)
    need_sequences(op, "off_policy_mask", main, cu_seqlens)
    _checks.alike(op, main, rollout_logprobs=rollout_logprobs)
    rows = (main.shape[0], 1)
    per_sequence = main.dim() == 2 and _checks.tensor(op, "advantages", advantages).shape == rows
    if per_sequence:
        _checks.sized(op, "advantages", advantages, main, rows, "(B, 1)")
    else:
        _checks.alike(op, main, advantages=advantages)
    bound = _checks.number(op, "delta", delta)
    flags = _checks.flags(op, "mask", mask, main.shape, main.device)
    dtype = compute_dtype(main)
    gap = rollout_logprobs.detach().to(dtype) - main.detach().to(dtype)
    gap = torch.where(gap.isnan(), 0.0, gap)
    seqs = Sequences(reference.common.keep_of(main, flags), cu_seqlens)
    far = seqs.mean(gap) > bound
    far = far[:, None] if per_sequence else seqs.spread(far)
    return torch.where((advantages.detach() < 0) & far, 0.0, 1.0).to(dtype)
