"""Small batches of tokens for the policy losses: padded, with holes, packed, NaN where masked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("padded", "holes", "packed")


class Batch(NamedTuple):
    """Tokens of five sequences, one of them empty; masked slots hold NaN."""

    logprobs: Tensor
    old: Tensor
    rollout: Tensor
    ref: Tensor
    entropy: Tensor
    advantages: Tensor
    mask: Tensor
    cu_seqlens: Tensor | None
    spans: list[slice]  # the flat slots of every sequence

    def per_sequence(self) -> list[Tensor]:
        """Flat indices of the unmasked slots of every sequence."""
        keep = self.mask.reshape(-1)
        every = torch.arange(keep.numel())
        return [every[span][keep[span]] for span in self.spans]


def batch(layout: str, dtype: torch.dtype = torch.float64, seed: int = 0, t: int = 23) -> Batch:
    """Log-ratios of about 0.3, so that every clip, cap and bound is met on both sides."""
    g = torch.Generator().manual_seed(seed)
    lengths, b = (t, 5, 0, 17, 1), 5
    column = torch.arange(t)
    mask = torch.stack([column < n for n in lengths])
    if layout == "holes":
        mask &= torch.rand(b, t, generator=g) > 0.3
    old = -1.5 + torch.randn(b, t, generator=g, dtype=torch.float64) * 0.5
    near = [old + 0.3 * torch.randn(b, t, generator=g, dtype=torch.float64) for _ in range(3)]
    adv = torch.randn(b, t, generator=g, dtype=torch.float64)
    entropy = torch.rand(b, t, generator=g, dtype=torch.float64)
    values = [torch.where(mask, x, float("nan")).to(dtype) for x in (*near, old, entropy, adv)]
    spans = [slice(i * t, (i + 1) * t) for i in range(b)]
    cu = None
    if layout == "packed":
        live = mask.clone()
        live[0, 3:6] = False  # a hole within a segment
        values = [torch.where(live, x, float("nan"))[mask] for x in values]
        mask = live[mask]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        cu = ends.to(torch.int32)
        spans = [slice(i, j) for i, j in itertools.pairwise(ends.tolist())]
    new, rollout, ref, old, entropy, adv = values
    return Batch(new, old, rollout, ref, entropy, adv, mask, cu, spans)


Formula = Callable[[Batch, Tensor], Tensor]


def flat(b: Batch, x: Tensor) -> Tensor:
    """The flat tensor with 0 in masked slots."""
    return torch.where(b.mask, x, 0.0).reshape(-1)


def wanted(b: Batch, formula: Formula) -> tuple[Tensor, Tensor]:
    """Mean over tokens of the formula's terms, and its gradient."""
    new = flat(b, b.logprobs).requires_grad_()
    keep = b.mask.reshape(-1)
    loss = formula(b, new)[keep].sum() / keep.sum()
    (grad,) = torch.autograd.grad(loss, new)
    return loss.detach(), torch.where(keep, grad, 0.0).view(b.mask.shape)


def given(b: Batch) -> tuple[Tensor, ...]:
    return b.old, b.advantages, b.mask
