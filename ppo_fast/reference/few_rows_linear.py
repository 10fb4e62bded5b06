"""Linear layer of a few rows."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias."""
    return functional.linear(x, weight, bias)
