"""Rounding error of forwards: the distance allowed between two of one model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
# Spacing of what float32 products round their inputs to: TF32 and bf16.
_PRODUCTS = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}
_CHUNK = 2048  # rows of a weight in one fp64 product


def spacing(dtype: torch.dtype) -> float:
    """Twice the largest relative rounding of a product in `dtype`."""
    if dtype == torch.float32:
        return _PRODUCTS[torch.get_float32_matmul_precision()]
    return torch.finfo(dtype).eps


def allowed_gap(dtype: torch.dtype) -> float:
    """Nats by which two forwards in `dtype` may differ at a token: half the digits, sqrt(spacing).

    Other shapes, a cache and padding reorder sums: each layer then rounds otherwise, which moves
    a log-prob by a small multiple of the spacing (1e-6 in fp32 for most models, 2e-5 for long
    recurrences), and a wrong mask, position or state moves it by 1e-3 to several nats. The root,
    3.5e-4 in fp32 and 0.09 in bf16, is where half of the digits are gone. Models keep norms and
    rotations in fp32 whatever their own precision, so it is the least there is for fp64 too.
    """
    return math.sqrt(max(spacing(dtype), spacing(torch.float32)))


def excess_gap(gaps: Tensor, dtype: torch.dtype, routed: bool) -> str | None:
    """Description of `gaps` (n,), in nats, beyond `allowed_gap`; None if there are none.

    In fp32 the largest counts. With `routed` experts a near tie may be broken otherwise, which
    moves a token and those behind it: there nine tenths of the tokens must be near. In half
    precision rare tokens are far off and ties are common: the median counts.
    """
    share = 0.5 if dtype in HALVES else 0.9 if routed else 1.0
    found = gaps[gaps.isfinite()].double()
    if not found.numel():
        return None
    # the value below or at which `share` of them lie
    reached = float(found.sort().values[math.ceil(share * found.numel()) - 1])
    bound = allowed_gap(dtype)
    if reached <= bound:
        return None
    what = {0.5: "the median", 0.9: "the 0.9 quantile", 1.0: "the largest"}[share]
    return f"{what} is {reached:.2g} nats, and rounding in {dtype} explains {bound:.2g}"


def has_routed_experts(model: Any) -> bool:
    """True if a router sends tokens to some of several experts."""
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def product(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    low_rank: Sequence[tuple[Tensor, Tensor]] = (),
) -> tuple[Tensor, Tensor]:
    """hidden·weightᵀ + bias of inputs rounded to `dtype`, and how far one computed in it may be.

    Products b·a of `low_rank`, (V, r) and (r, H), are added to the weight, some rows at a time.
    Both (n, V) fp64, from hidden (n, H). The bound, with roundings at random as in Higham & Mary
    2019 ("A New Approach to Probabilistic Rounding Error Analysis"): eight roundings of each of
    the H terms, whose squares add; the sum's own, by sqrt(H) of its absolute sum in at least fp32;
    and four of the result.
    """
    rows = hidden.to(dtype).double()
    eps, summed = spacing(dtype), min(spacing(dtype), spacing(torch.float32))
    values, bounds = [], []
    pairs = [(b.detach().to(dtype).double(), a.detach().to(dtype).double()) for b, a in low_rank]
    for start in range(0, len(weight), _CHUNK):
        at = slice(start, start + _CHUNK)
        w = weight.detach()[at].to(dtype).double()
        size = w.abs()
        for b, a in pairs:
            w, size = w + b[at] @ a, size + b[at].abs() @ a.abs()
        values.append(rows @ w.T)
        terms = 8 * eps * (rows.square() @ size.square().T).sqrt()
        sums = math.sqrt(rows.shape[1]) * summed * (rows.abs() @ size.T)
        bounds.append(terms + sums)
    value, bound = torch.cat(values, 1), torch.cat(bounds, 1)
    if bias is not None:
        value = value + bias.detach().double()
        bound = bound + 4 * eps * bias.detach().double().abs()
    return value, bound + 4 * eps * value.abs()
