"""Linear layers of a model in decoding: a product of a few rows in one read of the weight."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import ppo_fast

# Rows up to which `few_rows_linear` is faster than torch's product.
_FEW = 32


@contextmanager
def few_rows(model: Any, backend: str) -> Iterator[None]:
    """Within the block the fp32 linear layers of a model on a CPU take `few_rows_linear`.

    That is for forwards without gradients over a few tokens; those over many take torch's product
    as before, as do layers of any other class or precision, layers whose forward is not their
    class's, and all of them under another backend than "cpu" and under autocast. A result differs
    from torch's by rounding, and has the same bits beside any other rows.
    """
    layers = [m for m in model.modules() if backend == "cpu" and _plain(m)]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _plain(module: nn.Module) -> bool:
    """True for a linear layer that computes just that, with a whole fp32 weight in memory."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    whole = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.stride(1) == 1
    return whole and weight.dtype == torch.float32


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    few = x.numel() <= _FEW * layer.in_features and x.dtype == torch.float32
    if few and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
        return ppo_fast.few_rows_linear(x, layer.weight, layer.bias, backend="cpu")
    return functional.linear(x, layer.weight, layer.bias)
