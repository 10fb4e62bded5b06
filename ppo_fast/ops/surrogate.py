"""A surrogate inside a loss: its value and slope for the kernels' internal variant `given`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast import _checks
from ppo_fast._boundary import calls
from ppo_fast._boundary.options import TokenTensors
from ppo_fast._boundary.schema import KERNEL_VARIANTS, compute_dtype
from ppo_fast._results import STATS_FIELDS
from ppo_fast._sequences import Sequences
from ppo_fast.ops.context import eager
from ppo_fast.ops.policy import PolicyInputs, over
from ppo_fast.reference.common import keep_of, select, whitened
from ppo_fast.reference.surrogate import Evaluated, TermInputs, TermOptions, evaluate

_GIVEN = KERNEL_VARIANTS.index("given")
# Rows of a block on the CPU: below PyTorch's grain, so one thread, and whole vectors: its tails
# can have other bits.
_BLOCK, _MULTIPLE = 16384, 64


def elementwise(
    policy: PolicyInputs, logprobs: Tensor, mask: Tensor | None, entropy: Tensor | None
) -> Evaluated:
    """The terms of an elementwise surrogate on rows, in blocks: a row's bits do not depend on the
    others on a CPU."""
    inputs = _inputs(policy.per_token, keep_of(logprobs, mask), entropy, None)
    options = _term_options(policy, None)
    new = select(inputs.keep, logprobs.detach().reshape(-1))
    whole = torch.compiler.is_compiling() or not new.is_cpu
    step = max(new.shape[0], 1) if whole else _BLOCK
    surrogate: Any = policy.surrogate
    blocks = [
        evaluate(surrogate, *_block(new, inputs, at, step, whole), options)
        for at in range(0, max(new.shape[0], 1), step)
    ]
    columns = (torch.cat(c) if len(blocks) > 1 else c[0] for c in zip(*blocks, strict=True))
    found = Evaluated(*(part[: new.shape[0]].view(logprobs.shape) for part in columns))
    return _checked(policy, found)


def _block(
    new: Tensor, x: TermInputs, at: int, step: int, whole: bool
) -> tuple[Tensor, TermInputs]:
    """Rows from `at` on, padded with masked ones to whole vectors."""
    if whole:
        return new, x
    left = min(step, new.shape[0] - at)
    padding = (0, -left % _MULTIPLE)

    def cut(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        return torch.nn.functional.pad(part[at : at + left], padding)

    return cut(new), TermInputs(*map(cut, x))


def coupled(
    policy: PolicyInputs, logprobs: Tensor, mask: Tensor | None, entropy: Tensor | None
) -> Evaluated:
    """The terms of a surrogate that needs the whole call, and their slopes times w/D."""
    keep = keep_of(logprobs, mask)
    seqs = policy.whole
    if seqs is None and (keep.dim() == 2 or policy.cu_seqlens is not None):
        seqs = Sequences(keep, policy.cu_seqlens)
    coef = policy.given.kl_coef if _kl_inside(policy) else None
    inputs = _inputs(policy.per_token, keep, entropy, None if seqs is None else seqs.flat())
    every = keep if policy.counted is None else policy.counted
    weights = over(policy.row_weights(keep), policy.denom(every)).reshape(-1)
    new = select(keep, logprobs.detach()).reshape(-1)
    surrogate: Any = policy.surrogate
    run = evaluate if policy.whole is None else eager(evaluate)
    found = run(surrogate, new, inputs, _term_options(policy, coef), weights)
    return _checked(policy, Evaluated(*(part.view(logprobs.shape) for part in found)))


def _checked(policy: PolicyInputs, found: Evaluated) -> Evaluated:
    """The same; debug only: ValueError at the first slope that is not finite."""
    if _checks.DEBUG and not bool(found.slope.isfinite().all()):
        where = tuple(int(i) for i in (~found.slope.isfinite()).nonzero()[0])
        surrogate: Any = policy.surrogate
        got = f"got {float(found.slope[where])} at {where}"
        raise ValueError(f"Surrogate {surrogate.name!r}: slopes must be finite, {got}")
    return found


def _term_options(policy: PolicyInputs, kl_coef: Any) -> TermOptions:
    o = policy.options
    return TermOptions(
        level=policy.given.ratio_level,
        bounds=(o.log_ratio_min, o.log_ratio_max),
        kl_estimator=policy.given.kl_estimator,
        kl_clamp=policy.given.kl_clamp,
        kl_coef=kl_coef,
        kl_ratio_clip=policy.given.kl_ratio_clip,
    )


def _inputs(
    x: TokenTensors, keep: Tensor, entropy: Tensor | None, seqs: Sequences | None
) -> TermInputs:
    """A call's constants, flat, fp32 (fp64), 0 in masked slots, the advantages whitened."""
    dtype = compute_dtype(x.advantages)

    def flat(part: Tensor | None) -> Any:
        return None if part is None else select(keep, part).to(dtype).reshape(-1)

    weights = keep.to(dtype) if x.is_weights is None else select(keep, x.is_weights).to(dtype)
    acting = keep if x.accepted is None else keep & x.accepted
    return TermInputs(
        old=flat(x.old_logprobs),
        advantages=whitened(x.advantages, x.moments, keep, dtype).reshape(-1),
        weights=weights.reshape(-1),
        keep=keep.reshape(-1),
        acting=acting.reshape(-1),
        rollout=flat(x.rollout_logprobs),
        ref=flat(x.ref_logprobs),
        entropy=flat(None if entropy is None else entropy.detach()),
        seqs=seqs,
    )


def surrogate_loss(
    policy: PolicyInputs,
    backend: str,
    logprobs: Tensor,
    mask: Tensor | None,
    entropy: Tensor | None,
    n_grads: int,
) -> calls.RawLoss:
    """(loss, stats, scale, grads) of a loss with a surrogate: its terms, then the kernel."""
    couples = policy.surrogate_couples
    if couples:
        found = coupled(policy, logprobs, mask, entropy)
        slope = torch.zeros_like(found.slope)
    else:
        found = elementwise(policy, logprobs, mask, entropy)
        slope = found.slope
    ready = given(policy, found.value, slope)
    out, stats, scale, grads = ready.by_kernel(backend, logprobs, mask, entropy, n_grads)
    below = found.log_ratio < 0
    set_fields(
        stats,
        clip_low=(found.clipped & below).sum(),
        clip_high=(found.clipped & ~below).sum(),
    )
    if policy.whole is not None and policy.given.ratio_level != "token":
        set_fields(stats, **_ratio_fields(policy, found, keep_of(logprobs, mask)))
    if _kl_inside(policy):
        keep = keep_of(logprobs, mask)
        terms = torch.where(keep, policy.row_weights(keep).double() * found.policy.double(), 0.0)
        set_fields(stats, policy_loss=terms.sum())
    if couples and n_grads:
        grads = grads * scale
        grads[0] += found.slope
        scale = torch.ones_like(scale)
    return out, stats, scale, grads


def _ratio_fields(policy: PolicyInputs, found: Evaluated, keep: Tensor) -> dict[str, Tensor]:
    """Statistics of whole sequences' ratios, which a kernel would form of this rank's parts."""
    o, x = policy.options, policy.per_token
    ratio, low, high = found.log_ratio.exp(), 1.0 - o.clip_low, 1.0 + o.clip_high
    adv = whitened(x.advantages, x.moments, keep, ratio.dtype)
    held = torch.maximum(-adv * ratio, -adv * ratio.clamp(low, high))
    dual = (adv < 0) & (held > -adv * o.dual_clip)
    wide, inf = torch.where(keep, ratio.double(), 0.0), float("inf")
    none = torch.full((1,), inf, dtype=torch.float64, device=keep.device)  # amin needs a number
    smallest, largest = (wide.masked_fill(~keep, edge).flatten() for edge in (inf, -inf))
    return {
        "ratio": wide.sum(),
        "ratio_sq": (wide * wide).sum(),
        "clip_eps": (keep & ((ratio < low) | (ratio > high))).sum(),
        "clip_dual": dual.sum(),
        "ratio_min": torch.cat([none, smallest]).amin(),
        "ratio_max": torch.cat([-none, largest]).amax(),
    }


def given(policy: PolicyInputs, value: Tensor, slope: Tensor) -> PolicyInputs:
    """The loss for the kernels' variant that takes the term and its slope as they are."""
    x = policy.per_token._replace(is_weights=value, advantages=slope, moments=None)
    options = policy.options._replace(variant=_GIVEN)
    if policy.whole is not None:
        options = options._replace(by_sequence=0)  # the kernel has a part of them
    if _kl_inside(policy):
        options = options._replace(kl_coef=0.0, kl_coef_tensor=None, kl_weight=0)
    return policy._replace(per_token=x, options=options, surrogate=None)


def _kl_inside(policy: PolicyInputs) -> bool:
    """True where the KL term's weight is a sequence's ratio, whose gradient is no token's, or
    which no kernel has."""
    x, options = policy.per_token, policy.given
    level = options.ratio_level
    by_ratio = options.kl_weight == "ratio"
    if policy.whole is None:
        inside = level == "sequence" and by_ratio
    else:
        inside = level != "token" and (by_ratio or options.kl_ratio_clip is not None)
    return inside and x.ref_logprobs is not None


def set_fields(stats: Tensor, **fields: Tensor) -> None:
    """Write sums into a loss's statistics."""
    for name, value in fields.items():
        stats[STATS_FIELDS.index(name)] = value.to(stats.dtype)
