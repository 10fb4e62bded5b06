"""Masked moments and whitening."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast._results import Moments
from ppo_fast.reference.common import compute, keep_of


def moments(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Count, mean and Σ(x − mean)² of the unmasked slots, in fp64."""
    keep = keep_of(x, mask)
    kept = torch.where(keep, x.double(), 0.0)
    n = keep.sum().double()
    mean = kept.sum() / n.clamp(min=1)
    m2 = torch.where(keep, (kept - mean) ** 2, 0.0).sum()
    return Moments(torch.stack([n, mean, m2]).detach())


def whiten(
    x: Tensor,
    mask: Tensor | None,
    moments: Moments,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    eps_at: str = "var",
) -> Tensor:
    """(x − mean)·rsqrt(var + eps), or /(std + eps); plus the mean without `shift_mean`."""
    n, mean, m2 = moments.values.unbind()
    free = n - 1 if unbiased else n
    var = torch.where(free > 0, m2 / free.clamp(min=1), 0.0)
    scale = (var + eps).rsqrt() if eps_at == "var" else 1.0 / (var.sqrt() + eps)
    centred = (x.detach().double() - mean) * scale
    zero = torch.zeros_like(centred)
    # With no variance the centred value is 0; a NaN variance shows.
    centred = torch.where(var == 0, zero, centred)
    out = centred if shift_mean else centred + mean
    return torch.where(keep_of(x, mask), out, zero).to(compute(x).dtype)
