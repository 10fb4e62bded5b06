"""`few_rows_linear`: a linear layer of a few rows, as in decoding, at the speed of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast import _backend, _checks, reference
from ppo_fast._boundary import calls
from ppo_fast.ops.forward_mode import derivatives

_OP = "few_rows_linear"
_BACKENDS = ("reference", "cpu")


@derivatives()
def few_rows_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """x · weightᵀ + bias (detached) in one read of the weight, for up to some 32 rows of x.

    A library's product first copies the weight into a layout of its own, which many rows pay for
    and few do not. Here each element of the weight is broadcast to 16 rows at a time, and every
    sum runs over K in order: a row's result has the same bits beside any other rows. More than 16
    rows are right, and beyond about 32 slower than torch's own product.

    Args:
        x: `(..., K)` fp32, any strides.
        weight: `(V, K)` fp32 with contiguous rows, as `nn.Linear` has it.
        bias: `(V,)` fp32.

    Returns:
        `(..., V)` fp32, contiguous. On other devices than a CPU, torch's product.

    Raises:
        ValueError: shape, stride, device, or a backend without this op. TypeError: dtype.
        NotImplementedError: a forward-mode tangent, as the op has no derivative.
    """
    for name, value in (("weight", weight), ("x", x), ("bias", bias)):
        if name != "bias" or value is not None:
            _check(name, value, weight)
    if weight.dim() != 2 or (weight.shape[1] > 1 and weight.stride(1) != 1):
        raise ValueError(
            f"{_OP}: weight must be (V, K) with contiguous rows, got {tuple(weight.shape)} with"
            f" strides {weight.stride()}"
        )
    v, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{_OP}: x must have shape (..., K) = (..., {k}), got {tuple(x.shape)}")
    if bias is not None and bias.shape != (v,):
        raise ValueError(f"{_OP}: bias must have shape (V,) = ({v},), got {tuple(bias.shape)}")
    if _backend.select_among(_OP, _BACKENDS, backend, x) == "reference":
        return reference.few_rows_linear(x, weight, bias).detach()
    bias = None if bias is None else bias.contiguous()
    out = calls.few_rows_linear("cpu", x.reshape(-1, k), weight, bias)
    return out.view(*x.shape[:-1], v)


def _check(name: str, value: Any, weight: Tensor) -> None:
    if _checks.tensor(_OP, name, value).dtype != torch.float32:
        raise TypeError(f"{_OP}: {name} must be float32, got {value.dtype}")
    if value.device != weight.device:
        raise ValueError(f"{_OP}: {name} must be on {weight.device}, got {value.device}")
