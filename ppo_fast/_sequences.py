"""Sums and means over the sequences of a batch, and their way back to the tokens."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_fast._torch_private import graph_break


class _Gathered(torch.autograd.Function):
    """Every rank's `x`, stacked in rank order (W, ...); the gradient is the sum of all ranks'."""

    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, dist.ProcessGroup], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mine = _Gathered.apply(grad, ctx.group)[:, dist.get_rank(ctx.group)]
        return _folded(mine), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        every: Tensor = _Gathered.apply(tangent, ctx.group)
        return every


def _folded(parts: Tensor) -> Tensor:
    """Sum of (W, ...) in rank order: the same bits on every rank."""
    return functools.reduce(torch.add, parts.unbind(0))


class Sequences:
    """Sequences of a call's slots: rows of `(B, T)`, or segments of `(N,)`; masked slots are out.

    `count` is S. Sums run in a fixed order on every device. Token values come in the slots' shape
    or flat. With a `group`, every rank holds a part of every sequence, in the same order: what is
    summed, counted or compared is the whole sequence, in float64, folded in rank order.
    """

    def __init__(
        self,
        keep: Tensor,
        cu_seqlens: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.keep, self.shape, self.group = keep, keep.shape, group
        self._offsets: Tensor | None = None
        if keep.dim() == 2:
            self.count = keep.shape[0]
        elif cu_seqlens is None:
            self.count = 1
        else:
            self.count = cu_seqlens.numel() - 1
            # Offsets are not checked on a GPU: none leads out of bounds.
            self._offsets = cu_seqlens.long().clamp(0, keep.shape[0])
            position = torch.arange(keep.shape[0], device=keep.device)
            last = self._offsets[1:].contiguous()
            self._index = torch.bucketize(position, last, right=True).clamp(max=self.count - 1)
        self._tokens: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """Unmasked slots of each sequence, (S,) float64."""
        if self._tokens is None:
            whole = self.group is not None
            self._tokens = self._counts[:-2] if whole else self.sum(self.keep.double())
        return self._tokens

    @property
    def kept(self) -> Tensor:
        """Unmasked slots of all sequences, 0-d float64."""
        return self.keep.sum(dtype=torch.float64) if self.group is None else self._counts[-2]

    @property
    def width(self) -> int | Tensor:
        """Slots of a row, masked ones included."""
        return self.keep.shape[-1] if self.group is None else self._counts[-1]

    @functools.cached_property
    def _counts(self) -> Tensor:
        """The group's `tokens`, `kept` and `width`, (S + 2,): exchanged at once."""
        kept = self.keep.sum(dtype=torch.float64)
        width = torch.full_like(kept, self.keep.shape[-1])
        tokens = self._reduce(self.keep.double(), "sum", 0.0)
        return _folded(self._gathered(torch.cat([tokens, torch.stack([kept, width])])))

    def once(self, x: Tensor) -> Tensor:
        """A number of all ranks on the first, 0 on the others: what their statistics add up to."""
        first = self.group is None or dist.get_rank(self.group) == 0
        return x if first else torch.zeros_like(x)

    def flat(self) -> Sequences:
        """The same sequences of flat slots, (B·T,)."""
        other = object.__new__(Sequences)
        other.__dict__.update(self.__dict__)
        other.shape = torch.Size((self.keep.numel(),))
        return other

    def sum(self, x: Tensor) -> Tensor:
        """Sum of `x` over each sequence, (S,)."""
        if self.group is None:
            return self._reduce(self._kept(x, 0.0), "sum", 0.0)
        own = self._reduce(self._kept(x.double(), 0.0), "sum", 0.0)
        return _folded(self._gathered(own)).to(x.dtype)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of `x` over each sequence, (S,); 0 where it is empty."""
        return self.sum(x) / self.tokens.clamp(min=1).to(x.dtype)

    def min(self, x: Tensor) -> Tensor:
        """Smallest `x` of each sequence, (S,); inf where it is empty."""
        own = self._reduce(self._kept(x, float("inf")), "min", float("inf"))
        return own if self.group is None else self._gathered(own).amin(0)

    def max(self, x: Tensor) -> Tensor:
        """Largest `x` of each sequence, (S,); −inf where it is empty."""
        return -self.min(-x)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """Each slot's own sequence's value, masked slots included."""
        if self._offsets is not None:
            return per_sequence[self._index]
        whole = per_sequence[:, None] if self.keep.dim() == 2 else per_sequence
        return whole.expand(self.keep.shape).reshape(self.shape)

    def _gathered(self, own: Tensor) -> Tensor:
        """Every rank's, (W, ...)."""
        if torch.compiler.is_compiling():
            graph_break()
        every: Tensor = _Gathered.apply(own, self.group)
        return every

    def _kept(self, x: Tensor, other: float) -> Tensor:
        return torch.where(self.keep, x.reshape(self.keep.shape), other)

    def _reduce(self, x: Tensor, how: str, empty: float) -> Tensor:
        if self._offsets is not None:
            return torch.segment_reduce(
                x, how, offsets=self._offsets, initial=empty, unsafe=True, axis=0
            )
        rows = x if x.dim() == 2 else x[None]
        if rows.shape[1] == 0:
            return rows.sum(1) + empty  # of the graph: every rank takes part in a backward
        return rows.sum(1) if how == "sum" else rows.amin(1)
