"""The kernel ops of divergences: a typed function for each, as `calls.py` has for the others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ppo_fast._boundary.options import Scoring, Softmax, Teaching
from ppo_fast._boundary.schema import HANDLES

# By the student's log-probability, entropy and divergence.
Grads = tuple[Tensor | None, Tensor | None, Tensor]

_DIVERGENCE_FWD = HANDLES["divergence_fwd"]
_DIVERGENCE_BWD = HANDLES["divergence_bwd"]
_DIVERGENCE_BWD_ = HANDLES["divergence_bwd_"]
_DIVERGENCE_BWD_BF16_ = HANDLES["divergence_bwd_bf16_"]


def divergence_fwd(
    backend: str, logits: Tensor, s: Scoring, softmax: Softmax, t: Teaching
) -> tuple[Tensor, Tensor]:
    """(divergence, kl) of every row from its teacher's, or this share's part of both, unclamped.

    `kl` is the student's own KL, from the teacher or, for jsd, from the mixture.
    """
    out: tuple[Tensor, Tensor] = _DIVERGENCE_FWD[backend](
        logits,
        t.logits,
        s.mask,
        s.temperature_tensor,
        t.temperature_tensor,
        softmax.row_max,
        softmax.log_sum,
        t.row_max,
        t.log_sum,
        s.temperature,
        t.temperature,
        t.kind,
        t.beta,
    )
    return out


def divergence_bwd(
    backend: str,
    logits: Tensor,
    s: Scoring,
    softmax: Softmax,
    t: Teaching,
    kl: Tensor,
    grads: Grads,
) -> Tensor:
    """The logits' gradient, in their dtype, by (logprobs, entropy, divergence)."""
    out: Tensor = _DIVERGENCE_BWD[backend](*_divergence(logits, s, softmax, t, kl, grads))
    return out


def divergence_bwd_(
    backend: str,
    logits: Tensor,
    s: Scoring,
    softmax: Softmax,
    t: Teaching,
    kl: Tensor,
    grads: Grads,
) -> None:
    """The same over the logits."""
    _DIVERGENCE_BWD_[backend](*_divergence(logits, s, softmax, t, kl, grads))


def divergence_bwd_bf16_(
    backend: str,
    logits: Tensor,
    s: Scoring,
    softmax: Softmax,
    t: Teaching,
    kl: Tensor,
    grads: Grads,
) -> None:
    """The same over fp32 logits, the gradient rounded to bfloat16, as `logprobs_bwd_bf16_`'s."""
    _DIVERGENCE_BWD_BF16_[backend](*_divergence(logits, s, softmax, t, kl, grads))


def _divergence(
    logits: Tensor,
    s: Scoring,
    softmax: Softmax,
    t: Teaching,
    kl: Tensor,
    grads: Grads,
) -> tuple[Any, ...]:
    return (
        *grads,
        logits,
        t.logits,
        s.tokens,
        s.mask,
        s.temperature_tensor,
        t.temperature_tensor,
        softmax.entropy,
        softmax.row_max,
        softmax.log_sum,
        t.row_max,
        t.log_sum,
        kl,
        s.temperature,
        t.temperature,
        t.kind,
        t.beta,
    )
