"""`rlhf_advantages`: KL-shaped rewards, score placement, GAE and moments in one pass."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._boundary import calls
from ppo_fast._boundary.schema import MASKED, SCORE_AT
from ppo_fast._results import Moments, RLHFAdvantages
from ppo_fast.ops.backward import detached
from ppo_fast.ops.forward_mode import derivatives
from ppo_fast.ops.gae import n_sequences
from ppo_fast.ops.loss_options import Coefficient, check_estimator, check_kl_clamp

_OP = "rlhf_advantages"


@derivatives()
def rlhf_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: Coefficient,
    kl_estimator: str = "k1",
    kl_clamp: float | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    score_at: str = "last-token",
    masked: str = "carry",
    bootstrap: Tensor | None = None,
    reward_clip: tuple[float, float] | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> RLHFAdvantages:
    """r_t = −kl_coef·kl_t, plus the score at its slot; then GAE, returns and moments (detached).

    Ziegler et al. 2019, eq. 2. `kl_t` estimates KL(π‖π_ref) from logprobs − ref_logprobs.

    Args:
        scores: `(B,)`, `(S,)` when packed, or the log-probs' shape for "per-token".
        logprobs, ref_logprobs, values: `(B, T)`, or flat `(N,)` with `cu_seqlens`.
        mask: same shape, any real dtype, non-zero keeps.
        kl_coef: a number or a 0-d tensor; positive subtracts from the reward.
        kl_estimator, kl_clamp: k1, k2, k3 or abs (a "+" changes nothing: no gradient flows);
            `kl_clamp` bounds |kl|.
        score_at: "last-token" (the last unmasked one), "first-pad" (TRL: the slot after it, where
            the sequence has one; it joins the recursion and carries a return, but no advantage),
            or "per-token".
        reward_clip: (lo, hi) on the score, before the KL.
        gamma, lam, masked, bootstrap: as in `gae`.

    Returns:
        `RLHFAdvantages(advantages, returns, rewards, kl, moments)`; kl is unscaled.

    Raises:
        ValueError: shape, device or range. TypeError: dtype or wrong object.
        NotImplementedError: a forward-mode tangent, as the op has no derivative.
    """
    logprobs = _checks.main(_OP, "logprobs", logprobs, cu_seqlens)
    keep = _check_tokens(logprobs, ref_logprobs, values, mask, cu_seqlens)
    place = _check_scores(logprobs, scores, score_at, bootstrap, cu_seqlens)
    coef, coef_tensor = _checks.coefficient(_OP, "kl_coef", kl_coef, logprobs.device)
    masked_code = _checks.choice(_OP, "masked", masked, MASKED)
    estimator, _ = check_estimator(_OP, kl_estimator)
    gamma = _checks.number(_OP, "gamma", gamma, 0.0, 1.0)
    lam = _checks.number(_OP, "lam", lam, 0.0, 1.0)
    clamp = check_kl_clamp(_OP, kl_clamp)
    reward_min, reward_max = _reward_bounds(reward_clip)
    name = _backend.select(_OP, backend, logprobs, sequences=n_sequences(logprobs, cu_seqlens))
    if name == "reference":
        return reference.rlhf_advantages(
            scores,
            logprobs,
            ref_logprobs,
            values,
            mask,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_clamp=kl_clamp,
            gamma=gamma,
            lam=lam,
            score_at=score_at,
            masked=masked,
            bootstrap=detached(bootstrap),
            reward_clip=reward_clip,
            cu_seqlens=cu_seqlens,
        )
    advantages, returns, rewards, kl, moments = calls.rlhf_advantages(
        name,
        scores,
        logprobs,
        ref_logprobs,
        values,
        keep,
        kl_coef=coef,
        kl_coef_tensor=coef_tensor,
        estimator=estimator,
        kl_clamp=clamp,
        gamma=gamma,
        lam=lam,
        score_at=place,
        masked=masked_code,
        bootstrap=bootstrap,
        reward_min=reward_min,
        reward_max=reward_max,
        cu_seqlens=cu_seqlens,
    )
    return RLHFAdvantages(advantages, returns, rewards, kl, Moments(moments))


def _check_tokens(
    logprobs: Tensor, ref_logprobs: Any, values: Any, mask: Any, cu_seqlens: Tensor | None
) -> Tensor:
    """The mask, as bytes."""
    if logprobs.dim() == 1 and cu_seqlens is None:
        raise ValueError(
            f"{_OP}: cu_seqlens must be given for flat logprobs {tuple(logprobs.shape)}"
        )
    for name, x in (("ref_logprobs", ref_logprobs), ("values", values), ("mask", mask)):
        _checks.tensor(_OP, name, x)
    _checks.alike(_OP, logprobs, ref_logprobs=ref_logprobs, values=values)
    keep: Any = _checks.flags(_OP, "mask", mask, logprobs.shape, logprobs.device)
    return keep


def _check_scores(
    logprobs: Tensor, scores: Any, score_at: str, bootstrap: Any, cu_seqlens: Tensor | None
) -> int:
    """The code of `score_at`."""
    place = _checks.choice(_OP, "score_at", score_at, SCORE_AT)
    count = n_sequences(logprobs, cu_seqlens)
    if score_at == "per-token":
        _checks.alike(_OP, logprobs, scores=_checks.tensor(_OP, "scores", scores))
    else:
        _checks.sized(_OP, "scores", scores, logprobs, (count,), "(B,)")
    if bootstrap is not None:
        _checks.sized(_OP, "bootstrap", bootstrap, logprobs, (count,), "(B,)")
    return place


def _reward_bounds(clip: Any) -> tuple[float, float]:
    """(low, high) of the scores, infinite where absent."""
    if clip is None:
        return -math.inf, math.inf
    if not isinstance(clip, tuple) or len(clip) != 2:
        raise ValueError(f"{_OP}: reward_clip must be (lo, hi), got {clip!r}")
    low = _checks.number(_OP, "reward_clip", clip[0])
    return low, _checks.number(_OP, "reward_clip", clip[1], low)
