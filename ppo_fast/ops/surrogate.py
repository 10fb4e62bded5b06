"""A surrogate inside a loss: its value and slope for the kernels' internal variant `given`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppo_fast._boundary import calls
from ppo_fast._boundary.options import PolicyOptions, TokenTensors
from ppo_fast._boundary.schema import KERNEL_VARIANTS, compute_dtype
from ppo_fast._sequences import Sequences
from ppo_fast.reference.common import keep_of, select, whitening
from ppo_fast.reference.surrogate import Evaluated, TermInputs, TermOptions, evaluate

if TYPE_CHECKING:
    from ppo_fast.ops.policy import PolicyInputs

_GIVEN = KERNEL_VARIANTS.index("given")
# Rows of a block on the CPU: below PyTorch's grain, so one thread, and whole vectors: its tails
# can have other bits.
_BLOCK, _MULTIPLE = 16384, 64


def given(x: TokenTensors, options: PolicyOptions, value: Tensor, slope: Tensor) -> Any:
    """Constants and options of the kernels that take the term and its slope as they are."""
    x = x._replace(is_weights=value, advantages=slope, moments=None)
    return x, options._replace(variant=_GIVEN)


def of_rows(
    policy: PolicyInputs, x: TokenTensors, logprobs: Tensor, mask: Tensor | None, entropy: Tensor
) -> Evaluated:
    """The terms of an elementwise surrogate on rows, in blocks: a row's bits do not depend on the
    others on a CPU."""
    inputs = _inputs(x, keep_of(logprobs, mask), entropy, None)
    options = _term_options(policy, None)
    new = select(inputs.keep, logprobs.detach()).reshape(-1)
    whole = torch.compiler.is_compiling() or not new.is_cpu
    step = max(new.shape[0], 1) if whole else _BLOCK
    blocks = [
        evaluate(policy.surrogate, *_block(new, inputs, at, step, whole), options)
        for at in range(0, max(new.shape[0], 1), step)
    ]
    columns = zip(*blocks, strict=True)
    joined = Evaluated(*(torch.cat(c) if len(blocks) > 1 else c[0] for c in columns))
    return Evaluated(*(part[: new.shape[0]].view(logprobs.shape) for part in joined))


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


def of_call(
    policy: PolicyInputs, logprobs: Tensor, mask: Tensor | None, entropy: Tensor | None
) -> Evaluated:
    """The terms of a surrogate that needs the whole call, and their slopes times w/D."""
    keep = keep_of(logprobs, mask)
    known = keep.dim() == 2 or policy.cu_seqlens is not None
    seqs = Sequences(keep, policy.cu_seqlens) if known else None
    coef = None
    if policy.given.ratio_level == "sequence" and policy.given.kl_weight == "ratio":
        coef = policy.given.kl_coef
    inputs = _inputs(policy.per_token, keep, entropy, None if seqs is None else seqs.flat())
    weights = policy.weights(keep, keep).to(inputs.advantages.dtype).reshape(-1)
    new = select(keep, logprobs.detach()).reshape(-1)
    found = evaluate(policy.surrogate, new, inputs, _term_options(policy, coef), weights)
    return Evaluated(*(part.view(logprobs.shape) for part in found))


def _term_options(policy: PolicyInputs, kl_coef: Any) -> TermOptions:
    o = policy.options
    return TermOptions(
        level=policy.given.ratio_level,
        bounds=(o.log_ratio_min, o.log_ratio_max),
        kl_estimator=policy.given.kl_estimator,
        kl_clamp=policy.given.kl_clamp,
        kl_coef=kl_coef,
    )


def _inputs(
    x: TokenTensors, keep: Tensor, entropy: Tensor | None, seqs: Sequences | None
) -> TermInputs:
    """A call's constants, flat, fp32 (fp64), 0 in masked slots, the advantages whitened."""
    dtype = compute_dtype(x.advantages)

    def flat(part: Tensor | None) -> Any:
        return None if part is None else select(keep, part).to(dtype).reshape(-1)

    adv = select(keep, x.advantages).to(dtype)
    if x.moments is not None:
        mean, rstd = whitening(x.moments)
        adv = select(keep, (adv.double() - mean) * rstd).to(dtype)
    weights = keep.to(dtype) if x.is_weights is None else select(keep, x.is_weights).to(dtype)
    acting = keep if x.accepted is None else keep & x.accepted
    return TermInputs(
        old=flat(x.old_logprobs),
        advantages=adv.reshape(-1),
        weights=weights.reshape(-1),
        keep=keep.reshape(-1),
        acting=acting.reshape(-1),
        rollout=flat(x.rollout_logprobs),
        ref=flat(x.ref_logprobs),
        entropy=flat(None if entropy is None else entropy.detach()),
        seqs=seqs,
    )


def loss(
    policy: PolicyInputs,
    backend: str,
    logprobs: Tensor,
    mask: Tensor | None,
    entropy: Tensor | None,
    n_grads: int,
) -> calls.RawLoss:
    """(loss, stats, scale, grads) of a loss with a surrogate: its terms, then the kernel."""
    x, options = policy.per_token, policy.options
    if policy.couples:
        found = of_call(policy, logprobs, mask, entropy)
        slope = torch.zeros_like(found.slope)
    else:
        found = of_rows(policy, x, logprobs, mask, entropy)
        slope = found.slope
    check_slopes(policy, found.slope)
    inside = policy.couples and found.value is not found.policy
    if policy.given.kl_weight is not None and policy.given.ratio_level == "sequence" and inside:
        options = options._replace(kl_coef=0.0, kl_coef_tensor=None)
    tensors, options = given(x, options, found.value, slope)
    result, stats, scale, grads = calls.ppo_loss(
        backend,
        logprobs,
        tensors,
        options,
        n_grads,
        mask=mask,
        entropy=entropy,
        cu_seqlens=policy.cu_seqlens,
        sequence_weights=policy.sequence_weights,
    )
    _set(stats, "clip_low", (found.clipped & found.below).sum())
    _set(stats, "clip_high", (found.clipped & ~found.below).sum())
    if policy.couples and n_grads:
        grads = grads * scale
        grads[0] += found.slope
        scale = torch.ones_like(scale)
    return result, stats, scale, grads
