"""What the policy losses share: their per-token arguments, checked once, and the op's call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast import _checks
from ppo_fast._results import Moments
from ppo_fast._schema import HANDLES, REDUCTIONS
from ppo_fast.ops.options import Packed, PPOOptions, log_ratio_bounds
from ppo_fast.reference.common import Sequences, own_denom, token_weights


class Policy(NamedTuple):
    """A loss's per-token arguments but log-probabilities, mask and entropy; constants all."""

    old_logprobs: Tensor | None
    advantages: Tensor
    is_weights: Tensor | None
    moments: Tensor | None
    ref_logprobs: Tensor | None
    cu_seqlens: Tensor | None
    options: PPOOptions
    packed: Packed

    def call(
        self, backend: str, logprobs: Tensor, mask: Tensor | None, entropy: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, stats, scale, grads) of `_schema.py`."""
        result: tuple[Tensor, Tensor, Tensor, Tensor] = HANDLES["ppo_loss"][backend](
            logprobs,
            self.old_logprobs,
            self.advantages,
            mask,
            self.is_weights,
            self.moments,
            entropy,
            self.ref_logprobs,
            self.cu_seqlens,
            *self.packed,
        )
        return result

    def replace(self, *, n_grads: int, denom: Tensor | None = None) -> Policy:
        """The same loss with other gradients and, where given, another divisor."""
        packed = self.packed._replace(codes=[*self.packed.codes[:-1], n_grads])
        if denom is not None:
            packed = packed._replace(denom=denom)
        return self._replace(packed=packed)

    def per_token(self) -> Policy:
        """The loss of flat tokens, each for itself: what its slopes are taken from."""
        variant, estimator, straight, *_ = self.packed.codes
        codes = [variant, estimator, straight, REDUCTIONS.index("token-sum"), 2]
        params = [*self.packed.params[:-1], 0.0]
        packed = self.packed._replace(denom=None, codes=codes, params=params)
        return self._replace(packed=packed, cu_seqlens=None)

    def weights(self, rows: Tensor, counted: Tensor) -> Tensor:
        """w / D of every slot: w over the `rows` of the loss, D over those that are `counted`."""
        reduction = self.options.reduction
        wide = torch.float64 if self.advantages.dtype == torch.float64 else torch.float32
        w = token_weights(Sequences(rows, self.cu_seqlens), reduction, wide)
        return _over(w, self.denom(counted))

    def denom(self, counted: Tensor) -> Tensor:
        """D, 0-d on the device; 1 for "token-sum"."""
        given = self.options.denom
        if given is not None:
            return torch.as_tensor(given, device=counted.device).detach()
        own = own_denom(Sequences(counted, self.cu_seqlens), self.options.reduction)
        return torch.ones_like(own) if self.options.reduction == "token-sum" else own

    def plain(self, op: str) -> dict[str, Any]:
        """As the reference takes them, `advantages` and `old_logprobs` apart."""
        named = self.options._asdict()
        named["log_ratio_clamp"] = log_ratio_bounds(op, self.options.log_ratio_clamp)
        return named | {
            "is_weights": self.is_weights,
            "advantage_moments": self.moments,
            "ref_logprobs": self.ref_logprobs,
            "cu_seqlens": self.cu_seqlens,
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
    advantage_moments: Any,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    options: PPOOptions,
    has_entropy: bool,
    n_grads: int,
) -> Policy:
    """`main` sets shape, device and precision; raises ValueError or TypeError."""
    shape = main.shape
    if _checks.tensor(op, "advantages", advantages).shape == (*shape[:-1], 1) and main.dim() == 2:
        advantages = advantages.expand(shape)
    _checks.alike(
        op,
        main,
        old_logprobs=old_logprobs,
        advantages=advantages,
        is_weights=is_weights,
        ref_logprobs=ref_logprobs,
    )
    packed = options.pack(
        op,
        main,
        cu_seqlens,
        has_ref=ref_logprobs is not None,
        has_entropy=has_entropy,
        n_grads=n_grads,
    )
    return Policy(
        _constant(old_logprobs),
        advantages.detach(),
        _constant(is_weights),
        _check_moments(op, advantage_moments, main),
        _constant(ref_logprobs),
        cu_seqlens,
        options,
        packed,
    )


def _constant(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _check_moments(op: str, moments: Any, main: Tensor) -> Tensor | None:
    if moments is None:
        return None
    if not isinstance(moments, Moments):
        raise TypeError(f"{op}: advantage_moments must be Moments, got {type(moments).__name__}")
    values: Tensor = moments.values
    if values.device != main.device:
        raise ValueError(f"{op}: advantage_moments must be on {main.device}, got {values.device}")
    return values.detach()
