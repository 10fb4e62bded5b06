"""Validated arguments of a policy loss, and the call into its kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast import _checks
from ppo_fast._boundary import calls
from ppo_fast._boundary.options import PolicyOptions, TokenTensors
from ppo_fast._results import Moments
from ppo_fast._sequences import Sequences
from ppo_fast.ops.backward import detached
from ppo_fast.ops.loss_options import LossOptions, log_ratio_bounds, need_sequences
from ppo_fast.reference.common import own_denom, token_weights


class PolicyInputs(NamedTuple):
    """A loss's arguments but log-probabilities, mask and entropy; constants all."""

    per_token: TokenTensors
    cu_seqlens: Tensor | None
    sequence_weights: Tensor | None
    options: PolicyOptions
    given: LossOptions

    def loss(
        self,
        backend: str,
        logprobs: Tensor,
        mask: Tensor | None,
        entropy: Tensor | None,
        n_grads: int,
    ) -> calls.RawLoss:
        """(loss, stats, scale, grads) of `n_grads` gradients."""
        return calls.ppo_loss(
            backend,
            logprobs,
            self.per_token,
            self.options,
            n_grads,
            mask=mask,
            entropy=entropy,
            cu_seqlens=self.cu_seqlens,
            sequence_weights=self.sequence_weights,
        )

    def divided_by(self, denom: Tensor) -> PolicyInputs:
        """The same loss with another divisor, 0-d on the device."""
        return self._replace(options=self.options._replace(denom_tensor=denom))

    def weights(self, rows: Tensor, counted: Tensor) -> Tensor:
        """w / D of every slot: w over the `rows` of the loss, D over those that are `counted`."""
        reduction, dtype = self.given.reduction, self.per_token.advantages.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        w = token_weights(Sequences(rows, self.cu_seqlens), reduction, wide, self.sequence_weights)
        return _over(w, self.denom(counted))

    def denom(self, counted: Tensor) -> Tensor:
        """D, 0-d on the device; 1 for "token-sum"."""
        given, reduction = self.given.denom, self.given.reduction
        if given is not None:
            return torch.as_tensor(given, device=counted.device).detach()
        own = own_denom(Sequences(counted, self.cu_seqlens), reduction)
        return torch.ones_like(own) if reduction == "token-sum" else own

    def for_reference(self, op: str) -> dict[str, Any]:
        """Keyword arguments of the reference."""
        x = self.per_token
        return self.given._asdict() | {
            "log_ratio_clamp": log_ratio_bounds(op, self.given.log_ratio_clamp),
            "old_logprobs": x.old_logprobs,
            "advantages": x.advantages,
            "is_weights": x.is_weights,
            "advantage_moments": x.moments,
            "ref_logprobs": x.ref_logprobs,
            "cu_seqlens": self.cu_seqlens,
            "sequence_weights": self.sequence_weights,
        }


def _over(w: Tensor, denom: Tensor) -> Tensor:
    """w / D, and 0 where D is not positive; a NaN passes."""
    nothing = denom <= 0
    safe = torch.where(nothing, torch.ones_like(denom), denom).to(torch.float64)
    return torch.where(nothing, torch.zeros_like(w), w / safe).to(w.dtype)


def check_policy(
    op: str,
    main: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    is_weights: Tensor | None,
    sequence_weights: Tensor | None,
    advantage_moments: Any,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    options: LossOptions,
    has_entropy: bool,
) -> PolicyInputs:
    """`main` sets shape, device and precision; raises ValueError or TypeError."""
    advantages = _widened(_checks.tensor(op, "advantages", advantages), main)
    is_weights = _widened(is_weights, main)
    _checks.alike(
        op,
        main,
        old_logprobs=old_logprobs,
        advantages=advantages,
        is_weights=is_weights,
        ref_logprobs=ref_logprobs,
    )
    checked = options.checked(
        op,
        main,
        cu_seqlens,
        has_ref=ref_logprobs is not None,
        has_entropy=has_entropy,
    )
    _check_sequence_weights(op, sequence_weights, main, cu_seqlens)
    tensors = TokenTensors(
        old_logprobs=detached(old_logprobs),
        advantages=detached(advantages),
        is_weights=detached(is_weights),
        ref_logprobs=detached(ref_logprobs),
        moments=_check_moments(op, advantage_moments, main),
    )
    return PolicyInputs(tensors, cu_seqlens, detached(sequence_weights), checked, options)


def _widened(x: Any, main: Tensor) -> Any:
    """(B, 1) as (B, T), without a copy; anything else as it is."""
    shape = main.shape
    column = isinstance(x, Tensor) and main.dim() == 2 and x.shape == (shape[0], 1)
    return x.expand(shape) if column else x


def _check_sequence_weights(
    op: str, weights: Tensor | None, main: Tensor, cu_seqlens: Tensor | None
) -> None:
    if weights is None:
        return
    need_sequences(op, "sequence_weights", main, cu_seqlens)
    count = main.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    _checks.sized(
        op, "sequence_weights", weights, main, (count,), "(B,)" if cu_seqlens is None else "(S,)"
    )


def _check_moments(op: str, moments: Any, main: Tensor) -> Tensor | None:
    if moments is None:
        return None
    if not isinstance(moments, Moments):
        raise TypeError(f"{op}: advantage_moments must be Moments, got {type(moments).__name__}")
    values: Tensor = moments.values
    if values.device != main.device:
        raise ValueError(f"{op}: advantage_moments must be on {main.device}, got {values.device}")
    return values.detach()
