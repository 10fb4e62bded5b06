"""The kernel ops: a typed function for each schema of `schema.py`, on the backend that is named.

Arguments are checked and constants detached by `ops/`; the results carry no gradient. An op whose
name ends in `_` writes over its logits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ppo_fast._boundary.options import (
    Lambda,
    Pairs,
    PolicyOptions,
    RowStats,
    Scoring,
    Softmax,
    TokenTensors,
    ValueOptions,
    rollout_options,
)
from ppo_fast._boundary.schema import HANDLES
from ppo_fast.corrections import Correction

# (loss, stats, scale, grads) of the losses.
RawLoss = tuple[Tensor, Tensor, Tensor, Tensor]

# Backend -> overload; a name for each, so that a call looks up one dictionary alone.
_LOGPROBS_FWD = HANDLES["logprobs_fwd"]
_LOGPROBS_BWD = HANDLES["logprobs_bwd"]
_LOGPROBS_BWD_ = HANDLES["logprobs_bwd_"]
_LOGPROBS_BWD_BF16_ = HANDLES["logprobs_bwd_bf16_"]
_TOKEN_STATS = HANDLES["token_stats"]
_SUPPORT_FWD = HANDLES["support_fwd"]
_SUPPORT_BWD = HANDLES["support_bwd"]
_SPARSE_LOGITS = HANDLES["sparse_logits"]
_SPARSE_HIDDEN_GRAD = HANDLES["sparse_hidden_grad"]
_SPARSE_WEIGHT_GRAD = HANDLES["sparse_weight_grad"]
_PPO_LOSS = HANDLES["ppo_loss"]
_LOGITS_PPO_LOSS = HANDLES["logits_ppo_loss"]
_LOGITS_PPO_LOSS_ = HANDLES["logits_ppo_loss_"]
_LOGITS_PPO_LOSS_BF16_ = HANDLES["logits_ppo_loss_bf16_"]
_VALUE_LOSS = HANDLES["value_loss"]
_GAE = HANDLES["gae"]
_RLHF_ADVANTAGES = HANDLES["rlhf_advantages"]
_MOMENTS = HANDLES["moments"]
_WHITEN = HANDLES["whiten"]
_SCALED = HANDLES["scaled"]
_SCALED_ = HANDLES["scaled_"]
_FEW_ROWS_LINEAR = HANDLES["few_rows_linear"]
_BF16_PRODUCT_ = HANDLES["bf16_product_"]["cpu"]
_ROLLOUT_WEIGHTS = HANDLES["rollout_weights"]


def logprobs_fwd(backend: str, logits: Tensor, s: Scoring) -> Softmax:
    """Softmax numbers of every row of `logits` (..., V), fp32 (fp64 for fp64)."""
    return Softmax(
        *_LOGPROBS_FWD[backend](
            logits, s.tokens, s.mask, s.temperature_tensor, s.temperature, s.ignore_index
        )
    )


def logprobs_bwd(
    backend: str,
    logits: Tensor,
    s: Scoring,
    softmax: Softmax,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """The logits' gradient, in their dtype."""
    out: Tensor = _LOGPROBS_BWD[backend](
        *_backward(logits, s, softmax, grad_logprobs, grad_entropy)
    )
    return out


def logprobs_bwd_(
    backend: str,
    logits: Tensor,
    s: Scoring,
    softmax: Softmax,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """The same over the logits."""
    _LOGPROBS_BWD_[backend](*_backward(logits, s, softmax, grad_logprobs, grad_entropy))


def logprobs_bwd_bf16_(
    backend: str,
    logits: Tensor,
    s: Scoring,
    softmax: Softmax,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """The same over fp32 logits, the gradient rounded to bfloat16.

    A row's gradient starts where the row does: it is `logits.view(bfloat16)[..., :V]`.
    """
    _LOGPROBS_BWD_BF16_[backend](*_backward(logits, s, softmax, grad_logprobs, grad_entropy))


def _backward(
    logits: Tensor,
    s: Scoring,
    softmax: Softmax,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Any, ...]:
    return (
        grad_logprobs,
        grad_entropy,
        logits,
        s.tokens,
        s.mask,
        s.temperature_tensor,
        softmax.entropy,
        softmax.row_max,
        softmax.log_sum,
        s.temperature,
        s.ignore_index,
    )


def token_stats(backend: str, logits: Tensor, s: Scoring) -> RowStats:
    """The same with the row's other statistics, of fp32 or fp64 logits."""
    return RowStats(
        *_TOKEN_STATS[backend](
            logits, s.tokens, s.mask, s.temperature_tensor, s.temperature, s.ignore_index
        )
    )


def support_fwd(backend: str, logits: Tensor, pairs: Pairs, s: Scoring) -> Softmax:
    """Softmax numbers (N,) of every row's pairs, logits (M,); the token is a row's first pair."""
    return Softmax(
        *_SUPPORT_FWD[backend](
            logits, pairs.offsets, pairs.mask, s.temperature_tensor, s.temperature
        )
    )


def support_bwd(
    backend: str,
    logits: Tensor,
    pairs: Pairs,
    s: Scoring,
    softmax: Softmax,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """The gradient by the pairs' logits, (M,), 0 in masked rows."""
    out: Tensor = _SUPPORT_BWD[backend](
        grad_logprobs,
        grad_entropy,
        logits,
        pairs.offsets,
        pairs.mask,
        s.temperature_tensor,
        softmax.entropy,
        softmax.row_max,
        softmax.log_sum,
        s.temperature,
    )
    return out


def sparse_logits(backend: str, hidden: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
    """hidden[row] · weight[id] of every pair, (M,) fp32 (fp64): -inf where absent, NaN where the
    id is wrong, undefined in masked rows; hidden (N, H)."""
    out: Tensor = _SPARSE_LOGITS[backend](hidden, weight, pairs.ids, pairs.offsets, pairs.mask)
    return out


def sparse_hidden_grad(backend: str, grad_logits: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
    """Σ grad · weight[id] over each row's pairs, (N, H) in the weight's dtype, 0 where masked."""
    out: Tensor = _SPARSE_HIDDEN_GRAD[backend](
        grad_logits, weight, pairs.ids, pairs.offsets, pairs.mask
    )
    return out


def sparse_weight_grad(
    backend: str, grad_logits: Tensor, rows: Tensor, starts: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ grad · hidden[row] and Σ grad over each id's pairs: (V, H) in hidden's dtype, (V,) wide.

    The pairs stand in the order of their ids: id v's are [starts[v], starts[v + 1]). Those whose
    gradient is 0 take no part, whatever their row holds.
    """
    out: tuple[Tensor, Tensor] = _SPARSE_WEIGHT_GRAD[backend](grad_logits, rows, starts, hidden)
    return out


def ppo_loss(
    backend: str,
    logprobs: Tensor,
    x: TokenTensors,
    options: PolicyOptions,
    n_grads: int,
    *,
    mask: Tensor | None,
    entropy: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_weights: Tensor | None,
) -> RawLoss:
    """Loss, statistics and `grads` (n_grads, ...): by logprobs, by entropy, to be times `scale`.

    `scale` is 1/D, or 1 from a backend that knew D beforehand.
    """
    out: RawLoss = _PPO_LOSS[backend](
        logprobs,
        x.old_logprobs,
        x.advantages,
        mask,
        x.is_weights,
        x.moments,
        entropy,
        x.ref_logprobs,
        cu_seqlens,
        sequence_weights,
        options.entropy_coef_tensor,
        options.kl_coef_tensor,
        options.denom_tensor,
        options.codes(n_grads),
        options.params(),
    )
    return out


def logits_ppo_loss(
    backend: str,
    logits: Tensor,
    s: Scoring,
    x: TokenTensors,
    weights: Tensor,
    options: PolicyOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and the logits' gradient, with one read of the logits.

    `weights` is w/D of every token, or 0-d for all; the loss itself and gspo, whose slopes need
    whole sequences first, are `ppo_loss`'s.
    """
    out: tuple[Tensor, Tensor, Tensor] = _LOGITS_PPO_LOSS[backend](
        *_one_pass(logits, s, x, weights, options)
    )
    return out


def logits_ppo_loss_(
    backend: str,
    logits: Tensor,
    s: Scoring,
    x: TokenTensors,
    weights: Tensor,
    options: PolicyOptions,
) -> tuple[Tensor, Tensor]:
    """The same, the gradient over the logits."""
    out: tuple[Tensor, Tensor] = _LOGITS_PPO_LOSS_[backend](
        *_one_pass(logits, s, x, weights, options)
    )
    return out


def logits_ppo_loss_bf16_(
    backend: str,
    logits: Tensor,
    s: Scoring,
    x: TokenTensors,
    weights: Tensor,
    options: PolicyOptions,
) -> tuple[Tensor, Tensor]:
    """The same over fp32 logits, the gradient rounded to bfloat16.

    A row's gradient starts where the row does: it is `logits.view(bfloat16)[..., :V]`.
    """
    out: tuple[Tensor, Tensor] = _LOGITS_PPO_LOSS_BF16_[backend](
        *_one_pass(logits, s, x, weights, options)
    )
    return out


def _one_pass(
    logits: Tensor, s: Scoring, x: TokenTensors, weights: Tensor, options: PolicyOptions
) -> tuple[Any, ...]:
    return (
        logits,
        s.tokens,
        s.mask,
        s.temperature_tensor,
        x.old_logprobs,
        x.advantages,
        x.is_weights,
        x.moments,
        x.ref_logprobs,
        weights,
        options.entropy_coef_tensor,
        options.kl_coef_tensor,
        s.temperature,
        s.ignore_index,
        options.codes(0),
        options.params(),
    )


def value_loss(
    backend: str,
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    options: ValueOptions,
    *,
    n_grads: int,
) -> RawLoss:
    """Loss, statistics and `grads` (n_grads, ...) by the values, as of `ppo_loss`."""
    out: RawLoss = _VALUE_LOSS[backend](
        values,
        old_values,
        returns,
        mask,
        cu_seqlens,
        options.denom_tensor,
        options.codes(n_grads),
        options.params(),
    )
    return out


def gae(
    backend: str,
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    lam_adv: Lambda,
    lam_ret: Lambda,
    mask: Tensor | None,
    masked: int,
    next_values: Tensor | None,
    bootstrap: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    cu_seqlens: Tensor | None,
    time_major: bool,
    rho: Tensor | None,
    c: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages and returns in the rewards' shape, and the advantages' moments (3,)."""
    out: tuple[Tensor, Tensor, Tensor] = _GAE[backend](
        rewards,
        values,
        mask,
        next_values,
        bootstrap,
        terminated,
        truncated,
        cu_seqlens,
        rho,
        c,
        lam_adv.tensor,
        lam_ret.tensor,
        masked,
        bool(time_major),
        lam_adv.per_step,
        lam_ret.per_step,
        gamma,
        lam_adv.number,
        lam_ret.number,
    )
    return out


def rlhf_advantages(
    backend: str,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_coef_tensor: Tensor | None,
    estimator: int,
    kl_clamp: float,
    gamma: float,
    lam: float,
    score_at: int,
    masked: int,
    bootstrap: Tensor | None,
    reward_min: float,
    reward_max: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards and KL in the log-probabilities' shape, and moments (3,)."""
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _RLHF_ADVANTAGES[backend](
        scores,
        logprobs,
        ref_logprobs,
        values,
        mask,
        bootstrap,
        cu_seqlens,
        kl_coef_tensor,
        masked,
        estimator,
        score_at,
        gamma,
        lam,
        kl_coef,
        kl_clamp,
        reward_min,
        reward_max,
    )
    return out


def moments(backend: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Count, mean and sum of squared deviations of the unmasked slots, (3,) float64."""
    out: Tensor = _MOMENTS[backend](x, mask)
    return out


def whiten(
    backend: str,
    x: Tensor,
    mask: Tensor | None,
    moments: Tensor,
    *,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    eps_at_std: bool,
) -> Tensor:
    """The standardised tensor, in x's shape; masked slots are 0."""
    out: Tensor = _WHITEN[backend](
        x, mask, moments, bool(shift_mean), bool(unbiased), eps_at_std, eps
    )
    return out


def scaled(backend: str, grads: Tensor, factor: Tensor, scale: Tensor | None) -> Tensor:
    """grads·factor·scale, the factors 0-d, in the gradients' dtype."""
    out: Tensor = _SCALED[backend](grads, factor, scale)
    return out


def scaled_(backend: str, grads: Tensor, factor: Tensor, scale: Tensor | None) -> None:
    """The same over the gradients, which are not touched where factor·scale is exactly 1."""
    _SCALED_[backend](grads, factor, scale)


def few_rows_linear(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (R, K) · weightᵀ + bias, (R, V) float32."""
    out: Tensor = _FEW_ROWS_LINEAR[backend](x, weight, bias)
    return out


def bf16_product_(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """out (M, N) float32 = a (M, K) · b (K, N), or that more; b is bfloat16, a that or float32.

    An element of a float32 `a` is taken as the sum of two bf16 numbers, which leaves 2^-16 of it.
    Raises RuntimeError where `_backend.bf16_dot()` is false.
    """
    _BF16_PRODUCT_(a, b, out, add)


def rollout_weights(
    backend: str,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    correction: Correction | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and the bool mask in the log-probabilities' shape, and `RolloutStats.values`."""
    out: tuple[Tensor, Tensor, Tensor] = _ROLLOUT_WEIGHTS[backend](
        old_logprobs, rollout_logprobs, mask, cu_seqlens, *rollout_options(correction)
    )
    return out
