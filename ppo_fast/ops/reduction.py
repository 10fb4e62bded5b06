"""Reduction of a loss's terms over its tokens, for losses whose terms no kernel reduces."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast._results import DivergenceLoss, TokenDivergence
from ppo_fast._sequences import Sequences
from ppo_fast.ops.loss_options import Coefficient, check_denom, check_reduction
from ppo_fast.ops.policy import over
from ppo_fast.reference.common import own_denom, token_weights
from ppo_fast.reference.divergence import reduced


class Reduction(NamedTuple):
    """A loss's reduction over tokens (...), with its sequences and the caller's D."""

    name: str
    denom: float | Tensor | None
    cu_seqlens: Tensor | None

    def for_reference(self) -> dict[str, Any]:
        """Keyword arguments of the reference."""
        return {"reduction": self.name, "denom": self.denom, "cu_seqlens": self.cu_seqlens}

    def divisor(self, counted: Tensor) -> Tensor:
        """D, 0-d on the device; 1 for "token-sum"."""
        if isinstance(self.denom, Tensor):
            return self.denom
        if self.denom is not None:  # written by the device: a copy would wait for it
            return torch.full((), self.denom, dtype=torch.float64, device=counted.device)
        own = own_denom(Sequences(counted, self.cu_seqlens), self.name)
        return torch.ones_like(own) if self.name == "token-sum" else own

    def weights(self, rows: Tensor, counted: Tensor, dtype: torch.dtype) -> Tensor:
        """w / D of every slot, 0 where masked; w over the `rows`, D over those `counted`."""
        w = token_weights(Sequences(rows, self.cu_seqlens), self.name, dtype)
        return over(w, self.divisor(counted))

    def reduced(
        self, tokens: TokenDivergence, rows: Tensor, counted: Tensor, coef: float | Tensor
    ) -> DivergenceLoss:
        """coef·Σ w·divergence / D over `rows`, differentiable by the divergences."""
        divisor = self.divisor(counted)
        rows = rows.contiguous()  # strides change the order of a sum
        return reduced(tokens, rows, counted, coef, self.name, divisor, self.cu_seqlens)


def check_loss_reduction(
    op: str, main: Tensor, name: str, denom: Coefficient | None, cu_seqlens: Tensor | None
) -> Reduction:
    """The reduction of a loss over the shape of `main`, or ValueError or TypeError."""
    check_reduction(op, name, denom, main, cu_seqlens)
    number, tensor = check_denom(op, denom, main)
    given = None if denom is None else number
    return Reduction(name, given if tensor is None else tensor, cu_seqlens)
