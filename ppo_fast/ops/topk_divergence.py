"""`topk_divergence`: divergence of two distributions from their log-probabilities at K ids.

Plain PyTorch: the work is that of `linear_logprobs_at`, which makes such log-probabilities without
logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast import _checks
from ppo_fast._boundary.schema import compute_dtype
from ppo_fast._results import TopKDivergence
from ppo_fast.reference.divergence import divergence_terms
from ppo_fast.teacher import check_kind

_OP = "topk_divergence"
TAILS = ("drop", "bucket", "renormalise")
# ln of the largest mass that leaves a tail: TRL's SDFT (trl/experimental/sdft/loss_utils.py).
_NEARLY_ALL = -1e-7


def topk_divergence(
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str,
    beta: float = 0.5,
    tail: str = "drop",
    floor: float | None = None,
    max: float | None = None,
) -> TopKDivergence:
    """Divergence per token of student and teacher, known at the same K ids of each token.

    Args:
        logprobs: `(..., K)` fp32, bf16 or fp16 (fp64), the student's, over the whole vocabulary;
            differentiable.
        teacher_logprobs: the teacher's at the same ids, a constant.
        mask: `(..., K)` or `(..., 1)` of any real dtype, non-zero keeps: an id that is 0 takes no
            part. Of a token without ids all results are 0.
        kind: "reverse" is KL(student‖teacher), "forward" KL(teacher‖student), "jsd" the
            generalised Jensen-Shannon divergence β·KL(t‖m) + (1 − β)·KL(s‖m) with
            m = (1 − β)s + βt (GKD, Agarwal et al. 2024), "mixed" β·reverse + (1 − β)·forward.
        beta: β of the last two, in (0, 1) for "jsd", in [0, 1] for "mixed".
        tail: mass beyond the K ids. "drop" leaves it out (verl's `forward_kl_topk`, whose results
            below 0 are 0 without a gradient, as here), "bucket" makes one more id of it (TRL's
            SDFT), "renormalise" divides by the mass of the K ids.
        floor: log-probabilities below it are it, without a gradient; after the tail (verl's
            `log_prob_min_clamp`).
        max: results beyond ±max are that, without a gradient (verl's `loss_max_clamp`).

    Returns:
        `TopKDivergence(divergence, student_mass, teacher_mass)`, `(...)` each, fp32 (fp64 for
        fp64), in nats; the masses are those of the K ids before the tail, detached.

    Raises:
        ValueError: shape, device, range or a name. TypeError: dtype.
    """
    _check(logprobs, teacher_logprobs)
    kind, beta = check_kind(_OP, kind, beta)
    _checks.choice(_OP, "tail", tail, TAILS)
    wide = compute_dtype(logprobs)
    keep = _kept(mask, logprobs)
    # −inf has no probability, and a masked slot may hold anything.
    student = torch.where(keep, logprobs.to(wide), -torch.inf)
    teacher = torch.where(keep, teacher_logprobs.detach().to(wide), -torch.inf)
    masses = [x.detach().exp().sum(-1) for x in (student, teacher)]
    some = keep.any(-1, keepdim=True)
    student, teacher = (_tailed(x, tail, some) for x in (student, teacher))
    if floor is not None:
        low = _checks.number(_OP, "floor", floor, high=0.0)
        inside = keep if tail != "bucket" else torch.cat([keep, some], -1)
        student, teacher = (
            torch.where(inside, x.clamp(min=low), -torch.inf) for x in (student, teacher)
        )
    out = divergence_terms(student, teacher, kind, beta).sum(-1)
    if tail == "drop":
        out = out.clamp(min=0.0)
    if max is not None:
        bound = _checks.number(_OP, "max", max, 0.0)
        out = out.clamp(-bound, bound)
    return TopKDivergence(torch.where(some[..., 0], out, 0.0), *masses)


def _tailed(x: Tensor, tail: str, some: Tensor) -> Tensor:
    """Log-probabilities with what a tail makes of the mass beyond them."""
    if tail == "drop":
        return x
    total = torch.where(some, x, 0.0).logsumexp(-1, keepdim=True)
    if tail == "renormalise":
        return x - total
    rest = torch.log(-torch.expm1(total.clamp(max=_NEARLY_ALL)))
    return torch.cat([x, torch.where(some, rest, -torch.inf)], -1)


def _check(logprobs: Tensor, teacher_logprobs: Tensor) -> None:
    if _checks.floating(_OP, "logprobs", logprobs).dim() < 1 or logprobs.shape[-1] < 1:
        raise ValueError(
            f"{_OP}: logprobs must have shape (..., K) with K >= 1, got {tuple(logprobs.shape)}"
        )
    _checks.alike(_OP, logprobs, teacher_logprobs=teacher_logprobs)


def _kept(mask: Tensor | None, logprobs: Tensor) -> Tensor:
    """True for the ids that take part, (..., K)."""
    shape = logprobs.shape
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=logprobs.device)
    one = _checks.tensor(_OP, "mask", mask).shape == (*shape[:-1], 1)
    flags = _checks.flags(_OP, "mask", mask, (*shape[:-1], 1) if one else shape, logprobs.device)
    keep = mask if flags is None else flags
    return (keep != 0).expand(shape)
