"""`topk_divergence`: divergence of two distributions from their log-probabilities at K ids.

Plain PyTorch: the work is that of `linear_logprobs_at`, which makes such log-probabilities without
logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppo_fast import _checks
from ppo_fast._boundary.schema import compute_dtype
from ppo_fast._results import TopKDivergence
from ppo_fast.reference.divergence import divergence_terms
from ppo_fast.teacher import check_kind

_OP = "topk_divergence"
TAILS = ("drop", "bucket", "renormalise", "zero")
# ln of the largest mass that leaves a tail: TRL's SDFT (trl/experimental/sdft/loss_utils.py).
_NEARLY_ALL = -1e-7
# ln of a teacher's probability of 0, finite in a reverse KL: NeMo-RL's `log_infinitesimal`
# (`DistillationLossFn`, nemo_rl/algorithms/loss_functions.py).
_ZERO = -100.0


def topk_divergence(
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str,
    beta: float = 0.5,
    tail: str = "drop",
    entropy: Tensor | None = None,
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
            SDFT), "renormalise" divides by the mass of the K ids. "zero" (NeMo-RL's
            `zero_outside_topk`) divides the teacher's by it, which then has no other id; the
            student's stay those of the whole vocabulary. ln 0 is -100 in a reverse KL.
        entropy: `(...)`, the student's over the whole vocabulary, differentiable, as
            `linear_logprobs_at` gives it; "reverse" and "mixed" need it with tail "zero".
        floor: log-probabilities of the K ids and of the bucket below it are it, without a
            gradient; after the tail (verl's `log_prob_min_clamp`).
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
    _check_entropy(entropy, logprobs, kind, tail)
    low = None if floor is None else _checks.number(_OP, "floor", floor, high=0.0)
    wide = compute_dtype(logprobs)
    keep = _kept(mask, logprobs)
    # −inf has no probability, and a masked slot may hold anything.
    student = torch.where(keep, logprobs.to(wide), -torch.inf)
    teacher = torch.where(keep, teacher_logprobs.detach().to(wide), -torch.inf)
    masses = [x.detach().exp().sum(-1) for x in (student, teacher)]
    some = keep.any(-1, keepdim=True)
    beyond = None
    if tail == "zero":
        beyond = _beyond(student, entropy, kind, beta)
        teacher = _tailed(teacher, "renormalise", some)
    else:
        student, teacher = (_tailed(x, tail, some) for x in (student, teacher))
    if low is not None:
        inside = keep if tail != "bucket" else torch.cat([keep, some], -1)
        student, teacher = (
            torch.where(inside, x.clamp(min=low), -torch.inf) for x in (student, teacher)
        )
    out = divergence_terms(student, teacher, kind, beta).sum(-1)
    if beyond is not None:
        out = out + beyond
    elif tail == "drop":
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


def _beyond(student: Tensor, entropy: Tensor | None, kind: str, beta: float) -> Tensor | None:
    """The terms of the ids beyond the K, where the teacher has none of its mass."""
    rest = 1 - student.exp().sum(-1)
    if kind == "jsd":  # the mixture is (1 - beta) of the student there
        return -(1 - beta) * math.log1p(-beta) * rest
    if kind == "forward" or entropy is None:
        return None
    none = student.isneginf()
    known = torch.where(none, 0.0, student.exp() * torch.where(none, 0.0, student)).sum(-1)
    reverse = -entropy.to(student.dtype) - known - _ZERO * rest
    return beta * reverse if kind == "mixed" else reverse


def _check_entropy(entropy: Tensor | None, logprobs: Tensor, kind: str, tail: str) -> None:
    if entropy is None:
        if tail == "zero" and kind in ("reverse", "mixed"):
            raise ValueError(f"{_OP}: entropy must be given with tail 'zero' and kind {kind!r}")
        return
    if tail != "zero":
        raise ValueError(
            f"{_OP}: entropy must be None with tail {tail!r}, got {type(entropy).__name__}"
        )
    _checks.sized(_OP, "entropy", entropy, logprobs, tuple(logprobs.shape[:-1]), "(...)")


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
